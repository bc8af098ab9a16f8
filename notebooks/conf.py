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
include_patterns = [
    "*.md",
    "notebooks/*",
    "experiments/README.md",
    "experiments/results/*.md",
    "kernels/README.md",
    "specdec/demo/CARD.md",
]
exclude_patterns = ["notebooks/conf.py"]

# of notebooks and markdown
nb_execution_mode = "off"  # they are committed with their outputs
myst_heading_anchors = 3

# of docstrings, which write code in single backticks
default_role = "py:obj"
autodoc_default_options = {"members": True}
autodoc_mock_imports = ["lm_eval"]  # an adapter is for those who have it
autodoc_member_order = "bysource"
autodoc_typehints = "description"
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Class attributes", "params_style"), ("Metrics", "params_style")]

html_theme = "furo"
html_title = f"specdec {release}"
html_extra_path = ["index.html"]
html_copy_source = html_show_copyright = False


def setup(app):
    app.connect("source-read", add_title)
    app.connect("autodoc-process-docstring", show_examples_as_code)


def add_title(app, docname, source):
    """Tables that were written without a title have the name of their file."""
    folder, _, name = docname.rpartition("/")
    if folder == "experiments/results" and not source[0].startswith("# "):
        source[0] = f"# {name}\n\n{source[0]}"


def show_examples_as_code(app, what, name, obj, options, lines):
    """Indented lines below a line that ends with a colon are code, as in markdown."""
    lines[:] = re.sub(r"(?m)(?<=[^:\s]):\n\n(?= {4})", "::\n\n", "\n".join(lines)).split("\n")
