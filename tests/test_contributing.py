"""What CONTRIBUTING.md says: its code runs, its house stands, and what it tells newcomers to read is little."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from test_package import MODULES, Imported

import specdec
from experiments.benchmark import with_models
from specdec.rules import SiblingRejection, TraversalVerification

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
LINKED = {path: (ROOT / path).read_text("utf-8") for path in re.findall(r"\((tests/contributing/\w+\.py)\)", PAGE)}
EXAMPLES = [*re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL), *LINKED.values()]
# Files and lines that were to be read for the same before runs were values: at most half of them is promised.
BEFORE = {
    "a drafter on the target's states": (14, 2178),
    "a cache kind": (12, 1356),
    "an engine": (10, 1574),
    "an experiment": (7, 822),
}


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def in_ticks(text):
    return re.findall(r"`([^`]+)`", text)


TABLE = {row[0]: row[1:] for row in map(cells, re.findall(r"^\| an? .*\|$", PAGE, re.MULTILINE))}


def file(name):
    """A file that the table of "Extending" names."""
    return ROOT / name if name.startswith(("conf/", "tests/")) else ROOT / "specdec" / name


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: re.findall(r"class (\w+)", e)[-1])
def test_code_runs_and_passes_the_certificate_that_it_names(example):
    exec(example, {"__name__": "contributing"})


def test_every_part_has_an_example():
    assert len(TABLE) == len(EXAMPLES) + 1  # the experiment's is a preset
    assert {*LINKED} == {f"tests/contributing/{path.name}" for path in (ROOT / "tests" / "contributing").glob("*.py")}


def test_experiment_preset_runs(tmp_path):
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    (preset,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "conf" / "experiment" / "rules.yaml").write_text(preset)
    with initialize_config_dir(str(tmp_path / "conf"), version_base="1.3"):
        config = compose("benchmark", ["experiment=rules"])
    pair = specdec.demo.load()
    methods = with_models(config, pair)
    assert [*methods] == ["autoregressive", "tree", "tree, traversal verification"]
    both = [*methods.values()][1:]
    assert [type(method.keywords["rule"]) for method in both] == [SiblingRejection, TraversalVerification]
    for method in both:
        out = method(pair.target, torch.tensor([5, 6, 7]), max_new_tokens=8, stop_tokens=())
        assert len(out.tokens[0]) == 8 and out.trace.steps[0].nodes == 1 + 4 + 8 + 8


def test_modules_import_only_what_stands_above_them_in_the_house():
    house = PAGE[PAGE.index("## The house") : PAGE.index("## One step")]
    order = [name for line in re.findall(r"^\| `.*", house, re.MULTILINE) for name in in_ticks(cells(line)[0])]
    height = {name: place for place, name in enumerate(order)}
    folders = {module: module.split(".")[1] for module in MODULES if "." in module}
    assert {*folders.values()} == {*order}
    wrong = {
        (module, other)
        for module, mine in folders.items()
        for other in Imported(MODULES[module]).modules
        if other == "specdec" or height[folders[other]] > height[mine]
    }
    assert not wrong


def test_files_that_newcomers_are_told_to_read_are_there():
    named = [name for read, touched, *_ in TABLE.values() for name in in_ticks(read + touched) if "yours" not in name]
    assert len(named) > 12
    assert [name for name in named if not file(name).is_file()] == []


@pytest.mark.parametrize("part", BEFORE)
def test_newcomers_read_at_most_half_of_what_was_to_be_read(part):
    read = [len(file(name).read_text("utf-8").splitlines()) for name in in_ticks(TABLE[part][0])]
    files, lines = BEFORE[part]
    assert 0 < len(read) <= files / 2 and sum(read) <= lines / 2


def test_commands_name_what_there_is():
    targets = {*re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)}
    assert {*re.findall(r"`make ([\w-]+)", PAGE)} <= targets
    named = re.findall(r"python (?:-m pytest )?((?:experiments|tests|kernels)/[\w/.]+)", PAGE)
    assert len(named) > 4 and all((ROOT / name).exists() for name in named)
