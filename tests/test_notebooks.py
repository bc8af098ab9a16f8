"""The notebooks run from top to bottom as they stand, and are committed with the outputs of such a run."""

import nbformat
import pytest
from run_notebooks import NOTEBOOKS, ROOT, kernel, run


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell):
    """What its outputs are: text, pictures, values."""
    return {kind for output in cell.outputs for kind in output.get("data", {output.get("name"): None})}


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """No model was downloaded for it."""
    with kernel(SPECDEC_CACHE=str(tmp_path_factory.mktemp("cache"))) as client:
        yield client


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_shows_what_it_was_committed_with(path, client, tmp_path):
    committed, done = code_cells(nbformat.read(path, as_version=4)), code_cells(run(path, client, tmp_path))
    assert [cell.execution_count for cell in committed] == [*range(1, 1 + len(committed))]
    assert [*map(kinds, committed)] == [*map(kinds, done)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_says_first_what_its_reader_will_know(path):
    assert "After this you will know" in nbformat.read(path, as_version=4).cells[0].source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_name_no_folder_of_the_machine_that_made_them(path):
    outputs = str([cell.outputs for cell in code_cells(nbformat.read(path, as_version=4))])
    assert str(ROOT) not in outputs and "/tmp/" not in outputs and "/home/" not in outputs


def test_quickstart_shows_a_tree_in_which_a_draft_was_accepted_and_a_text_of_the_real_model():
    [notebook] = [nbformat.read(path, as_version=4) for path in NOTEBOOKS if path.stem == "1_quickstart"]
    shown = {cell.source: str(cell.outputs) for cell in code_cells(notebook)}
    [tree] = [outputs for source, outputs in shown.items() if source.startswith("longest = ")]
    assert tree.count("accepted") > 2
    assert any("class Stack" in outputs for outputs in shown.values())
