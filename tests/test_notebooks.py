"""The notebooks run from top to bottom as they stand, and are committed without their outputs."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_has_no_outputs(path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.source for cell in cells if cell.outputs or cell.execution_count is not None] == []


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """One kernel for all: most of the time of each would go into importing torch. No model was downloaded for it."""
    client = NotebookClient(nbformat.v4.new_notebook(), timeout=120)
    with client.setup_kernel(env={**os.environ, "SPECDEC_CACHE": str(tmp_path_factory.mktemp("cache"))}):
        yield client


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, client, tmp_path):
    client.nb = nbformat.read(path, as_version=4)
    client.nb.cells.insert(0, new_code_cell(f"%reset -f\n%cd {tmp_path}"))  # no name of another is left
    for index, cell in enumerate(client.nb.cells):
        client.execute_cell(cell, index)
