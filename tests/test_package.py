"""The package as a whole: what it declares, what it imports, what it leaves alone."""

import ast
import re
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import specdec

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]
DECLARED = [Requirement(text) for group in (PROJECT["dependencies"], *EXTRAS.values()) for text in group]
PINS = {
    canonicalize_name(pin.name): pin
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if (text := line.partition("#")[0].strip())
    for pin in [Requirement(text)]
}

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "specdec").rglob("*.py"))
}


class Imported(ast.NodeVisitor):
    """The modules of specdec that a file imports, in its functions too; not under TYPE_CHECKING, where nothing runs."""

    def __init__(self, path: Path):
        self.modules: set[str] = set()
        self.visit(ast.parse(path.read_text("utf-8")))

    def visit_If(self, node: ast.If) -> None:
        for part in node.orelse if ast.unparse(node.test) == "TYPE_CHECKING" else [*node.body, *node.orelse]:
            self.visit(part)

    def visit_Import(self, node: ast.Import) -> None:
        self.modules |= {alias.name for alias in node.names} & {*MODULES}

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        assert node.level == 0, "specdec imports by full names"
        names = (f"{node.module}.{alias.name}" for alias in node.names)
        self.modules |= {name if name in MODULES else str(node.module) for name in names} & {*MODULES}


def packages(module: str) -> list[str]:
    """Those below specdec that hold the module, from the outermost on, and itself."""
    parts = module.split(".")
    return [".".join(parts[:end]) for end in range(2, len(parts) + 1)]


def is_in(module: str, package: str) -> bool:
    return f"{module}.".startswith(f"{package}.")


def fresh_python(code: str, cwd: Path = ROOT) -> str:
    """What `code` prints in a new interpreter that has `cwd` on its path, as `python -c` does."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_transformers_models_import_from_the_repository_root():
    assert fresh_python("from transformers import LlamaForCausalLM as M; print(M.__name__)") == "LlamaForCausalLM"


def test_transformers_does_not_take_our_kernels_folder_for_the_package_of_that_name():
    """transformers optionally imports the PyPI package `kernels`, and would find ours if it were a regular package."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    spec = "__import__('importlib.util').util.find_spec('kernels')"
    origin = fresh_python(f"spec = {spec}; print(spec.origin if spec else None)")
    assert origin == "None" or not Path(origin).is_relative_to(ROOT / "kernels")


def test_importing_specdec_imports_nothing_that_a_model_and_its_tokenizer_do_not(tmp_path):
    """So it takes the time of its own files alone, and needs no dependency of the experiments.

    Run elsewhere than in the repository, so it also shows that the installed package is found.
    """
    code = """
import sys
from transformers import AutoTokenizer, LlamaForCausalLM
before = {*sys.modules}
import specdec
print(*sorted({*sys.modules} - before))
"""
    added = fresh_python(code, cwd=tmp_path).split()
    assert "specdec.loop" in added
    free = {"specdec", "specdec_kernels", *sys.stdlib_module_names}
    assert [module for module in added if module.partition(".")[0] not in free] == []


def test_modules_import_each_other_in_no_circle():
    """So each can be imported first: the packages that hold an imported module are loaded before it, so they count too."""
    graph = {
        module: {part for name in Imported(path).modules for part in packages(name) if not is_in(module, part)}
        for module, path in MODULES.items()
    }
    assert "specdec.generate" in graph["specdec"]
    TopologicalSorter(graph).prepare()  # raises a CycleError that names the circle


def test_folders_import_each_other_in_no_circle():
    """A module beside the folders counts as one. The package itself is left out: it imports them all."""
    graph: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        names = {packages(name)[0] for name in Imported(path).modules if name != "specdec"}
        if module != "specdec":
            graph.setdefault(packages(module)[0], set()).update(n for n in names if not is_in(module, n))
    assert "specdec.rules" in graph["specdec.arguments"]
    TopologicalSorter(graph).prepare()


def test_all_that_the_readme_and_the_pages_name_is_there_after_the_import():
    pages = [ROOT / "README.md", *({*ROOT.glob("notebooks/*.md")} - {ROOT / "notebooks" / "api.md"})]
    text = "".join(page.read_text("utf-8") for page in pages)
    names = sorted(set(re.findall(r"\bspecdec(?!\.adapters|\.training)(?:\.[a-zA-Z_]+)+(?=[^\w/])", text)))
    assert {"specdec.prediction", "specdec.theory"} <= {*names}
    fresh_python(f"import specdec; {'; '.join(names)}")


def test_kernels_need_neither_triton_nor_specdec(tmp_path):
    code = """
import sys
sys.modules["triton"] = sys.modules["specdec"] = None  # importing either raises ImportError
import specdec_kernels.reference
print("imported")
"""
    assert fresh_python(code, cwd=tmp_path) == "imported"


@pytest.mark.parametrize("requirement", DECLARED, ids=lambda requirement: requirement.name)
def test_constraints_pin_what_pyproject_declares(requirement):
    pin = PINS.get(canonicalize_name(requirement.name))
    assert pin is not None, f"constraints.txt has no pin for {requirement.name}"
    [exact] = pin.specifier
    assert exact.operator == "=="
    assert requirement.specifier.contains(exact.version)
    assert str(pin.marker) == str(requirement.marker)


def test_wheel_packages_exist():
    folders = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert [folder for folder in folders if not (ROOT / folder / "__init__.py").is_file()] == []


def test_bundled_weights_are_not_ignored_by_git():
    """hatch puts into the wheel what git does not ignore."""
    files = [f"specdec/demo/{name}" for name in specdec.demo.FILES]
    check = subprocess.run(["git", "check-ignore", *files], cwd=ROOT, capture_output=True, text=True, check=False)
    if check.returncode == 128:
        pytest.skip(f"not a git checkout: {check.stderr.strip()}")
    assert check.stdout == ""


def test_version_is_the_newest_in_the_changelog():
    newest = re.search(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == PROJECT["version"] == specdec.__version__
    assert newest[1] == version("specdec"), "the installed metadata is stale: run `make install`"
