"""The study of refilled rows: its ways write the same texts, and what parts is told with its place and its reason."""

import argparse
import json
from types import SimpleNamespace

import pytest
import torch

import specdec
from experiments.studies import batching, batching_page, batching_prompts
from experiments.studies.batching_page import SLOTS, THEIRS, TODAY
from experiments.studies.batching_ways import Case, Job, drafters, ways

torch.set_num_threads(1)
PAIR = specdec.demo.load()
IDS = [torch.tensor(PAIR.tokenizer(prompt.text)["input_ids"]) for prompt in PAIR.prompts[:5]]


@pytest.mark.parametrize("drafter", ["none", "chain of 2", "n-gram"])
def test_rows_that_are_refilled_write_the_same_texts_in_fewer_steps(drafter):
    case = Case(2, 5, drafter)
    row = batching.measured(Job(PAIR, IDS, drafters(PAIR)[drafter], case, tokens=24, seed=0))
    before, after = row["ways"][TODAY], row["ways"][SLOTS]
    assert row["partings"] == {} and row["partings_float64"] is None and before["tokens"] == after["tokens"]
    assert after["steps"] < before["steps"] and before["running"] < after["running"] <= 1
    assert (THEIRS in row["ways"]) == (drafter == "none")
    assert all(seconds > 0 for way in row["ways"].values() for seconds in way["seconds"].values())


def test_the_share_of_running_rows_is_that_of_the_steps():
    job = Job(PAIR, IDS[:2], None, Case(2, 2, "none"), tokens=24, seed=0)
    texts, counts = ways(job.case)[TODAY](job)
    lengths = [*map(len, texts)]
    assert counts == {"steps": max(lengths), "running": pytest.approx(sum(lengths) / (2 * max(lengths)))}


def test_a_text_that_parts_is_named_with_its_place_and_with_what_float64_says(monkeypatch):
    assert batching.partings([[1, 2, 3], [4], [5, 6]], [[1, 2, 3], [4, 5], [5, 7]]) == {"1": 1, "2": 1}
    ways = {TODAY: lambda job: ([[1, 2]], {}), SLOTS: lambda job: ([[1, 3]], {})}
    monkeypatch.setattr(batching, "ways", lambda case: ways)
    row = batching.measured(Job(PAIR, IDS[:1], None, Case(1, 1, "none"), tokens=2, seed=0))
    assert row["partings"] == {"0": 1} and row["partings_float64"] == {}
    assert "text 0 after 1 tokens; in float64 it is the same: rounding" in batching_page.parted([row])
    assert "it parts too" in batching_page.parted([{**row, "partings_float64": {"0": 1}}])


def test_shared_beginnings_are_read_once_and_the_texts_stay():
    found = batching_prompts.shared(SimpleNamespace(prompts=4))
    alone, copied = found["ways"]["read by each"], found["ways"]["copied"]
    assert found["same"] == 4 and copied["read"] < alone["read"] / 2
    assert alone["read"] == 2 * sum(303 + min(len(own), 60) - 1 for own in IDS[:4])
    # The rest of what is copied are rows that move to a smaller batch.
    assert copied["read"] + copied["copied"] == alone["read"] + alone["copied"]


def test_a_long_newcomer_is_read_between_steps():
    found = batching_prompts.gaps(SimpleNamespace(newcomer=1200))["ways"]
    assert [way["reading"] for way in found.values()] == [2, 0]
    assert all(0 < way["median"] < way["longest"] for way in found.values())


def test_figures_of_other_options_are_not_gone_on_with(tmp_path):
    asked = argparse.Namespace(output=str(tmp_path / "found.json"), rounds=1, prompts=4)
    found = batching.taken_up(asked)
    (tmp_path / "found.json").write_text(json.dumps({**found, "rows": [1]}))
    assert batching.taken_up(argparse.Namespace(**{**vars(asked), "rounds": 3}))["rows"] == [1]
    with pytest.raises(SystemExit, match="measured with other options: choose another output"):
        batching.taken_up(argparse.Namespace(**{**vars(asked), "prompts": 5}))


def test_ratios_are_of_equal_rounds():
    def row(seed, *speeds):
        seconds = [{"process": 100 / speed, "wall": 50 / speed} for speed in speeds]
        made = [{"tokens": 100, "seconds": s, "steps": 4, "running": 0.5} for s in seconds]
        return {
            "case": "batch 8, 2 prompts, none",
            "seed": seed,
            "partings": {},
            "ways": dict(zip((TODAY, SLOTS), made, strict=True)),
        }

    cells = batching_page.cells([row(0, 10, 20), row(1, 10, 15), row(2, 20, 32)])
    assert cells[3:] == ["10 -> 20", "1.60 (1.50-2.00)", "1.60 (1.50-2.00)", "-", "-", "6/6"]
