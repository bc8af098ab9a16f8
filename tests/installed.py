"""Shows that the installed package is whole: it has every file of this checkout's, and runs the README's first example.

`make test-package` calls it with an interpreter that finds no package in the checkout: `python -I tests/installed.py`.
"""

import re
import sys
from pathlib import Path

import specdec
import specdec_kernels

ROOT = Path(__file__).resolve().parents[1]


def files(folder: Path) -> set[str]:
    """All files below a folder but what Python has compiled."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in found if "__pycache__" not in path.parts}


for package, source in ((specdec, ROOT / "specdec"), (specdec_kernels, ROOT / "kernels" / "specdec_kernels")):
    folder = Path(str(package.__file__)).parent
    assert folder.is_relative_to(sys.prefix), f"{folder} is not what was installed in {sys.prefix}"
    assert files(folder) == files(source), files(folder) ^ files(source)
example = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)[0]
exec(example, {})
