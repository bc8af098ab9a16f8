"""Run the notebooks as the tests do, and keep their outputs in them: what the pages show.

    python tests/run_notebooks.py                                  # all of them
    python tests/run_notebooks.py notebooks/1_quickstart.ipynb     # some

The first shows SmolLM2's text if that is on this machine: `specdec.demo.smollm2.load()` downloads it.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

QUIET = {"TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore:IProgress not found"}  # no bars in the pages
ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@contextmanager
def kernel(**env: str) -> Iterator[NotebookClient]:
    """One for all notebooks: most of the time of each would go into importing torch."""
    client = NotebookClient(new_notebook(), timeout=600, record_timing=False, coalesce_streams=True)
    with client.setup_kernel(env={**os.environ, **QUIET, **env}):
        yield client


def run(path: Path, client: NotebookClient, folder: Path) -> Any:
    """The notebook with its outputs, run in a folder of its own, without a name that another one left."""
    client.nb = nbformat.read(path, as_version=4)
    client.nb.cells.insert(0, new_code_cell(f"%reset -f\n%cd -q {folder}"))
    for index, cell in enumerate(client.nb.cells):
        client.execute_cell(cell, index)
    del client.nb.cells[0]
    for number, cell in enumerate((cell for cell in client.nb.cells if cell.cell_type == "code"), 1):
        for numbered in (cell, *(output for output in cell.outputs if "execution_count" in output)):
            numbered["execution_count"] = number  # the kernel has counted the cells of other notebooks too
    return client.nb


def main() -> None:
    with TemporaryDirectory() as folder, kernel() as client:
        for path in map(Path, sys.argv[1:] or NOTEBOOKS):
            own = Path(folder, path.stem)
            own.mkdir()
            nbformat.write(run(path, client, own), path)
            print(path)


if __name__ == "__main__":
    main()
