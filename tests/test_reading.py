"""What other times are compared with: the fastest of several ways to read the same numbers."""

import itertools
import time

import pytest
import torch

from experiments.bench import recurrent
from experiments.studies import hot_paths
from specdec.tuning import reading

TENSORS = [torch.arange(24.0).view(4, 6) - 3, torch.tensor([5.0, -7.0, 1.0]), torch.full((2, 4096), 0.5)]


def clock(monkeypatch, *durations):
    """Calls take these seconds, again and again, whatever they do."""
    ticks = itertools.chain.from_iterable((0.0, seconds) for seconds in itertools.cycle(durations))
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))


def test_every_way_reads_every_number_once():
    found = {way: run() for way, run in reading.ways(TENSORS).items()}
    assert [each.item() for each in found["maxima"]] == [20, 5, 0.5]
    assert [each.item() for each in found["sums"]] == [204, -1, 4096]
    assert [each.sum().item() for each in found["matrix times vector"]] == [204, -1, 4096]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_parameters_of_any_type_are_read(dtype):
    [total] = reading.ways([torch.nn.Parameter(torch.ones(8, 4, dtype=dtype))])["matrix times vector"]()
    assert total.dtype == dtype and total.sum() == 32


def test_the_least_time_of_the_fastest_way_is_told(monkeypatch):
    clock(monkeypatch, 5, 6, 4, 3, 7, 2)  # maxima twice, sums twice, products twice
    assert reading.least(TENSORS, repeats=2) == {"milliseconds": 2000, "way": "matrix times vector"}


def test_ratios_are_to_the_fastest_reading_of_each_round(monkeypatch):
    timed = {"reading | maxima": list, "reading | sums": list, "5 | ours": list}
    clock(monkeypatch, 9, 9, 9, 2, 4, 6, 5, 1, 2)  # the first round is not counted
    found = hot_paths.measure(timed, rounds=2, base="reading")
    assert {name: row["ratio"] for name, row in found.items()} == {
        "reading | maxima": 3,  # 1 and 5
        "reading | sums": 1.5,  # 2 and 1
        "5 | ours": 2.5,  # 3 and 2
    }


@pytest.mark.parametrize("make", [recurrent.gated_delta_rule, recurrent.state_space])
def test_nodes_whose_time_is_taken_compute_what_tokens_one_by_one_do(make):
    timed = make()
    one_by_one = timed["5 tokens, one by one | transformers"]()
    torch.testing.assert_close(timed["5 nodes | specdec"](), one_by_one, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(timed["5 nodes and a commit | specdec"](), one_by_one, rtol=1e-4, atol=1e-4)
