"""The benchmark as a user runs it, and the figures it computes."""

import csv
import json
import platform
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import specdec
from experiments.bench.measure import AGAIN, Run, recorded, uninterrupted
from experiments.bench.report import figures, median, resolved, table
from experiments.bench.results import Csv, Nothing, Wandb, acceptance_by_depth, provenance
from experiments.bench.terminal import fitted
from experiments.peer_methods import baseline
from specdec import Sampling
from specdec.drafters import ModelDrafter
from specdec.trace import Step, Trace, load
from specdec.trees import Widths

SCRIPT = Path(__file__).resolve().parents[1] / "experiments" / "benchmark.py"
METHODS = ["autoregressive", "ngram", "chain", "tree", "chosen", "transformers", "assisted"]
TINY = ["task.per_task=1", "task.tasks=[functions,prose]", "repeats=2", "new_tokens=12", "target=hub"]
PAIR = specdec.demo.load()


def benchmark(cwd: Path, *overrides: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *overrides]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A small run of all methods on models in local folders, from a directory outside the repository."""
    models, cwd = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("elsewhere")
    PAIR.target.save_pretrained(models / "large")
    PAIR.tokenizer.save_pretrained(models / "large")
    PAIR.draft.save_pretrained(models / "small")
    names = [f"target.target={models / 'large'}", f"target.draft={models / 'small'}"]
    process = benchmark(cwd, *TINY, *names, f"methods=[{','.join(METHODS)}]")
    assert process.returncode == 0, process.stderr
    return process, cwd


def result(done) -> tuple[str, dict]:
    [file] = (done[1] / "outputs").iterdir()
    return file.read_text(), json.loads(file.read_text())


def test_result_is_the_only_file_written(done):
    process, cwd = done
    [file] = [path for path in cwd.rglob("*") if path.is_file()]
    assert re.fullmatch(r"outputs/benchmark_\d{8}_\d{6}\.json", str(file.relative_to(cwd)))
    assert process.stdout.endswith(f"\n{file.relative_to(cwd)}\n")


def test_every_method_writes_what_transformers_writes(done):
    process, _ = done
    found = result(done)[1]["figures"]
    assert list(found) == [*METHODS, AGAIN]
    assert {name: row["identical"] for name, row in found.items()} == dict.fromkeys(found, 2)
    assert fitted(table(found)) in process.stdout


def test_assisted_generation_drafts_as_the_chain_of_the_same_length_does(done):
    found = result(done)[1]["figures"]
    assert len(found["assisted"]["acceptance_rate"]) == len(found["chain"]["acceptance_rate"]) == 4
    assert found["transformers"]["acceptance_length"] == found["autoregressive"]["acceptance_length"] == 1


def test_share_of_the_ceiling_is_known_where_specdec_drafts(done):
    found = {name: row["ceiling_share"] for name, row in result(done)[1]["figures"].items()}
    assert {found[name] for name in ("chain", "tree", "chosen")} == {
        1.0
    }  # greedy: a child is the target's token or not
    assert {found[name] for name in ("autoregressive", "transformers", "assisted")} == {None}


def test_divergence_is_known_where_specdec_decides(done):
    found = {name: row["divergence"] for name, row in result(done)[1]["figures"].items()}
    assert {found[name] for name in ("autoregressive", "chain", "tree", "chosen")} == {0}
    assert {found[name] for name in ("transformers", "assisted")} == {None}


def test_result_says_what_produced_it_and_not_on_whose_machine(done):
    text, content = result(done)
    assert content["command"].startswith("python experiments/benchmark.py task.per_task=1 ")
    assert content["options"]["target"]["target"] == "large"
    assert content["options"]["dtype"] == "float32" and content["options"]["threads"] == 1
    assert content["figures"]["chain"]["speed_up"]["n"] == content["rounds"] * content["prompts"] == 4
    assert {"commit", "dirty", "versions", "cpu", "date"} <= set(content)
    assert str(done[1].parent) not in text and str(SCRIPT.parent) not in text and platform.node() not in text


def test_misspelt_key_fails_before_a_model_is_loaded(tmp_path):
    process = benchmark(tmp_path, "target=hub", "target.target=no/such/model", "+sampling.temprature=1")
    assert process.returncode == 1
    assert "did you mean 'temperature'?" in process.stderr and "Traceback" not in process.stderr
    assert list(tmp_path.iterdir()) == []


def test_provenance_keeps_no_folders():
    options = {"target": {"target": "/home/me/a b/model", "draft": "org/model"}, "task": {"path": "~/prompts.txt"}}
    overrides = ["target.target=/home/me/model", "+x=[/a/b,'/c/d']", "target.draft=org/model"]
    found = provenance("run.py", overrides, options, "cpu")
    assert found["command"] == """python run.py target.target=model '+x=[b,'"'"'d'"'"']' target.draft=org/model"""
    assert found["options"] == {"target": {"target": "model", "draft": "org/model"}, "task": {"path": "prompts.txt"}}


def test_transformers_baseline_is_not_changed_by_the_generation_config_of_the_model():
    prompt = torch.tensor(PAIR.tokenizer(PAIR.prompts[0].text)["input_ids"])
    expected = specdec.generate(PAIR.target, prompt, max_new_tokens=12).tokens[0]
    own = PAIR.target.generation_config
    own.repetition_penalty = 5.0
    try:
        out = baseline.generate(PAIR.target, [prompt], max_new_tokens=12)
    finally:
        own.repetition_penalty = None
    assert torch.equal(out.tokens[0], expected)
    assert PAIR.target.generation_config is own


def test_steps_of_transformers_end_when_the_device_has_done_them(monkeypatch):
    """Noted before, its prefill would count as decoding, and its last step would not."""
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    clock = baseline._Clock(2)
    clock(torch.zeros(1, 3, dtype=torch.int64, device="meta"), None)
    assert waited == [torch.device("meta")] and clock.steps.lengths == [0, 1]
    clock(torch.zeros(1, 4, dtype=torch.int64), None)
    assert len(waited) == 1


def interrupted(complete: int):
    for number in range(complete):
        yield {"autoregressive": [number]}
    raise KeyboardInterrupt


def test_interrupt_keeps_the_rounds_that_are_complete():
    assert uninterrupted(interrupted(2)) == [{"autoregressive": [0]}, {"autoregressive": [1]}]
    with pytest.raises(SystemExit, match="No round is complete"):
        uninterrupted(interrupted(0))


def test_median_of_one_value_repeated_has_no_spread():
    assert median(np.full((3, 4), 7.0)) == {"median": 7.0, "low": 7.0, "high": 7.0, "n": 12}


def test_one_value_has_no_interval():
    assert median(np.array([[7.0]])) == {"median": 7.0, "low": None, "high": None, "n": 1}


def test_interval_is_that_of_order_statistics():
    """The median of n = 100 lies between the 40th and 61st value with probability 0.95 (binomial)."""
    found = median(np.arange(1.0, 101.0)[None])
    assert found["median"] == 50.5
    assert abs(found["low"] - 40.5) < 1.5 and abs(found["high"] - 60.5) < 1.5


def test_decoding_the_same_prompts_again_does_not_narrow_the_interval():
    once = np.arange(1.0, 11.0)[None]
    one, ten = median(once), median(once.repeat(10, 0))
    assert ten["high"] - ten["low"] > 0.9 * (one["high"] - one["low"])


def run(tokens: int, seconds: float) -> Run:
    return Run(
        Trace(steps=[Step(5, [0], [tokens], [tokens - 1], [min(tokens, 4)], 0.0, 0.0, 0.75 * seconds, 0.25 * seconds)]),
        1,
        1,
    )


def test_figures_of_known_runs():
    slow = [run(1, 1.0), run(1, 2.0)]
    found = figures([{"slow": slow, "fast": [run(3, 1.0), run(1, 0.5)], AGAIN: slow}] * 2)["fast"]
    assert found["speed_up"]["median"] == 3.5  # 3 tokens in the time of 1, and 1 token in a quarter of the time
    assert (found["speed_up"]["low"], found["speed_up"]["high"]) == (3.0, 4.0)
    assert found["acceptance_length"] == 2.0
    assert found["acceptance_rate"] == [0.5, 1.0, 0.0]
    assert found["loop_share"] == 0.25
    assert (found["identical"], found["prompts"]) == (2, 2)


def test_texts_that_end_in_the_prefill_of_transformers_have_no_speed():
    """They are one token long: specdec writes it in a step, transformers before its first."""
    ours, theirs = [run(1, 1.0), run(2, 1.0)], [Run(Trace(), 1, 1), run(1, 1.0)]
    for first, second, faster in ((ours, theirs, 0.5), (theirs, ours, 2.0)):
        found = figures([{"first": first, "second": second, AGAIN: first}] * 2, tasks=["code", "prose"])["second"]
        assert (found["speed_up"]["median"], found["speed_up"]["n"], found["prompts"]) == (faster, 2, 2)
        assert list(found["tasks"]) == ["prose"]
    with pytest.raises(SystemExit, match="larger new_tokens"):
        figures([{"first": ours[:1], "second": theirs[:1], AGAIN: ours[:1]}])


def ratio(low: float, high: float, n: int = 9) -> dict:
    return {"median": (low + high) / 2, "low": low, "high": high, "n": n}


@pytest.mark.parametrize(
    "found, noise, differs",
    [
        (ratio(1.1, 1.3), ratio(0.95, 1.05), True),
        (ratio(0.7, 0.9), ratio(0.95, 1.05), True),
        (ratio(0.98, 1.3), ratio(0.95, 1.05), False),
        (ratio(1.04, 1.3), ratio(0.95, 1.05), False),
        (ratio(1.01, 1.03), ratio(1.04, 1.06), False),  # the machine's bias is larger than what was found
        ({"median": 3.0, "low": None, "high": None, "n": 1}, {"median": 1.0, "low": None, "high": None, "n": 1}, False),
    ],
)
def test_difference_is_resolved_beyond_one_and_beyond_the_noise_floor(found, noise, differs):
    assert resolved(found, noise) == differs


def by_task() -> dict:
    """Two batches of one task, on which the second method is twice as fast, and two of another, on which it is not."""
    slow, fast = [run(1, 1.0)] * 4, [run(2, 1.0)] * 2 + [run(1, 1.0)] * 2
    return figures([{"slow": slow, "fast": fast, AGAIN: slow}] * 3, tasks=["code", "code", "prose", "prose"])


def test_figures_by_task_are_those_of_its_batches():
    found = by_task()["fast"]
    assert found["acceptance_length"] == 1.5
    assert {task: row["speed_up"]["median"] for task, row in found["tasks"].items()} == {"code": 2.0, "prose": 1.0}
    assert {task: row["speed_up"]["resolved"] for task, row in found["tasks"].items()} == {"code": True, "prose": False}
    assert {task: row["prompts"] for task, row in found["tasks"].items()} == {"code": 2, "prose": 2}


def test_table_marks_what_is_not_resolved_and_states_the_noise_floor():
    text = table(by_task())
    assert "| fast | 2.00 (2.00-2.00), 2.00 | ~ 1.00 (1.00-1.00), 1.00 |" in text
    assert "Noise floor: slow against itself, 1.00 (1.00-1.00). ~: " in text


def test_tables_and_sentences_are_fitted_to_the_width_of_a_terminal_with_every_cell_kept():
    text = table(by_task()) + "\n\n" + "word " * 50
    shown = fitted(text, 60)
    assert max(map(len, shown.splitlines())) <= 60
    cells = [cell.strip() for line in text.splitlines() if "---" not in line for cell in line.strip("|").split(" | ")]
    assert {word for cell in cells for word in cell.split()} <= {*shown.split()}
    assert fitted("| method | a long header |\n| --- | --- |\n| x | 1.5 |") == (
        "        a long\nmethod  header\n------  ------\nx       1.5"
    )


def test_csv_has_a_row_for_every_method(tmp_path):
    source = {"command": "python x.py", "commit": "0123", "date": "today"}
    path = Csv(str(tmp_path / "new" / "found.csv")).write({**source, "figures": by_task()})
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["slow", "fast", AGAIN]
    assert rows[1]["speed_up.median"] == "1.5" and rows[1]["tasks.code.acceptance_length"] == "2.0"
    assert {row["commit"] for row in rows} == {"0123"}


def test_log_none_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "not kept" in Nothing().write({"figures": {}})
    assert list(tmp_path.iterdir()) == []


def test_acceptance_curve_has_every_depth_of_every_method():
    rows = acceptance_by_depth({"none": {"acceptance_rate": []}, "short": {"acceptance_rate": [0.5]},
                                "long": {"acceptance_rate": [0.7, 0.6]}})  # fmt: skip
    assert rows == [
        {"depth": 1, "acceptance_rate/short": 0.5, "acceptance_rate/long": 0.7},
        {"depth": 2, "acceptance_rate/long": 0.6},
    ]


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """A log whose run lies in one folder, artifacts included."""
    for name, value in {"SILENT": "true", "DATA_DIR": tmp_path, "CACHE_DIR": tmp_path / "cache"}.items():
        monkeypatch.setenv(f"WANDB_{name}", str(value))
    return Wandb("specdec", "offline", str(tmp_path))


def kept(folder: Path) -> bytes:
    """What the run has noted."""
    import wandb

    wandb.teardown()  # its process writes the file, when it finds the time
    [file] = folder.rglob("*.wandb")
    return file.read_bytes()


@pytest.mark.filterwarnings("ignore")  # of wandb's own
def test_wandb_run_has_configuration_summary_curve_and_artifact(tmp_path, offline):
    offline.write({"command": "python x.py", "figures": by_task()})
    found = kept(tmp_path)
    for part in (b"python x.py", b"speed_up", b"acceptance_rate/fast", b"result.json"):
        assert part in found, part
    assert b"trees/" not in found


@pytest.mark.filterwarnings("ignore")  # of wandb's own
def test_wandb_run_has_the_trees_and_the_traces_of_every_method(tmp_path, offline):
    drafter = ModelDrafter(PAIR.draft, Widths([2, 1]))
    methods = {"plain": baseline.generate, "tree": partial(specdec.generate, drafter=drafter)}
    prompt = torch.tensor(PAIR.tokenizer(PAIR.prompts[0].text)["input_ids"])
    offline.runs.update(recorded(PAIR.target, methods, prompt, sampling=Sampling(), tokenizer=PAIR.tokenizer))
    offline.write({"command": "python x.py", "figures": by_task()})
    found = kept(tmp_path)
    assert b"trees/tree" in found and b"tree.safetensors" in found and b"plain.safetensors" not in found
    [page] = tmp_path.rglob("*.html")
    steps = offline.runs["tree"].trace.steps
    assert page.read_text("utf-8").count("emitted") == len(steps) > 1
    files = [path for path in tmp_path.rglob("artifacts/**/*") if path.is_file()]
    [trace] = [path for path in files if not path.read_bytes().startswith(b"{")]  # the other is the result
    assert load(trace).summary() == offline.runs["tree"].trace.summary()
