"""The pages as a site: `make docs` builds it into build/site.

Its sources are the markdown files and notebooks of the repository where they lie, so that a link works here as it does there.
"""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

project = "specdec"
author = "The specdec authors"
release = version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "notebooks/pages"
include_patterns = ["*.md", "notebooks/*", "experiments/**.md", "kernels/README.md", "specdec/demo/CARD.md"]
exclude_patterns = ["notebooks/conf.py"]

# of notebooks and markdown
nb_execution_mode = "off"  # they are committed with their outputs
myst_heading_anchors = 3

# of docstrings, which write code in single backticks
default_role = "py:obj"
autodoc_default_options = {"members": True, "imported-members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "description"
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"specdec {release}"
html_extra_path = ["index.html"]
html_copy_source = False


def setup(app):
    app.connect("autodoc-process-docstring", show_examples_as_code)


def show_examples_as_code(app, what, name, obj, options, lines):
    """Indented lines below a line that ends with a colon are code, as in markdown."""
    shown = re.sub(r"(?m)^(?!\s*(?:Args|Returns|Raises|Yields):$)(.*[^:\s]):\n\n(?= {4})", r"\1::\n\n", "\n".join(lines))
    lines[:] = shown.split("\n")
