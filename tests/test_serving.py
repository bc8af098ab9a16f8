"""The metrics of serving are those of a small trace that was worked out by hand, and slots leave all others right."""

import pytest
import torch

import specdec
from experiments.bench.report import per_prompt
from experiments.bench.results import trees
from specdec import Generation, Sampling
from specdec.testing import Table, TabularDrafter, TabularTarget
from specdec.trace import Step, Trace, load
from specdec.trees import Widths

torch.set_num_threads(1)


def step(held, emitted, accepted, tried, enter=0.0, seconds=1.0):
    """Half of the seconds goes into verifying, a quarter each into drafting and all the rest."""
    return Step(3, held, emitted, accepted, tried, enter, seconds / 4, seconds / 2, seconds / 4)


# Two rows, four texts. Ends of the steps, from the call: 3, 4, 6, 7, 9.
TRACE = Trace(
    prefill_seconds=2.0,
    steps=[
        step([0, 1], [2, 1], [1, 0], [2, 1]),
        # text 0 ends
        step([0, 1], [1, 2], [0, 1], [1, 1]),
        # the first part of text 2's prompt is read in its place
        step([-1, 1], [0, 1], [0, 0], [0, 1], enter=1.0),
        # text 2 begins, and text 1 ends
        step([2, 1], [2, 3], [1, 2], [1, 2]),
        # text 3 begins, and ends with all its tokens; the row of text 1 is idle otherwise
        step([2, 3], [1, 1], [0, 0], [1, 0], enter=0.5, seconds=1.5),
    ],
)


def test_the_metrics_of_a_trace_worked_out_by_hand():
    found = TRACE.summary(price_per_hour=3.6)
    assert found["tokens"] == 3 + 7 + 3 + 1 and found["target_forwards"] == 5
    # the last three steps ran 1, 2 and 2 rows: all but one of ten
    assert found["rows_running"] == pytest.approx(0.9)
    assert found["acceptance_length"] == pytest.approx(14 / 9)
    # accepted at depth 1, 2 / tested there
    assert found["acceptance_rate"] == pytest.approx([4 / 8, 1 / 2])
    # texts 0 and 1 from the call: 3 s; text 2 from the step that read its first part: 7 - 4; text 3: 9 - 7
    assert found["ttft_seconds"] == pytest.approx({"median": 3.0, "p95": 3.0})
    # text 0: 1 token in 1 s; text 1: 6 in 4 s; text 2: 1 in 2 s; text 3 has none after its first step
    assert found["tpot_seconds"] == pytest.approx({"median": 1.0, "p95": 1.0 + 0.9 * 1.0})
    assert found["longest_gap_seconds"] == 2.0
    assert (found["enter_seconds"], found["decode_seconds"]) == (1.5, 7.0)
    assert found["tokens_per_second"] == pytest.approx(14 / 7)
    assert found["target_forwards_per_token"] == pytest.approx(5 / 14)
    # 9 s at 0.001 a second, for 14 tokens
    assert found["cost_per_million_tokens"] == pytest.approx(1e6 * 0.009 / 14)


def test_an_empty_trace_has_no_times_and_costs_nothing_that_is_known():
    found = Trace(prefill_seconds=1.0).summary(price_per_hour=1)
    assert found["ttft_seconds"] == found["tpot_seconds"] == {"median": None, "p95": None}
    assert found["cost_per_million_tokens"] is found["target_forwards_per_token"] is None
    assert found["rows_running"] == found["longest_gap_seconds"] == found["tokens_per_second"] == 0.0


def test_a_text_alone_has_its_first_tokens_after_prefill_and_one_step():
    only = Trace(2.0, [step([0], [1], [0], [0]), step([0], [1], [0], [0], seconds=3.0)]).summary()
    assert only["ttft_seconds"] == {"median": 3.0, "p95": 3.0} and only["tpot_seconds"]["median"] == 3.0
    assert only["tokens_per_second"] == 2 / 4 and "cost_per_million_tokens" not in only


@pytest.mark.parametrize("price", [0, -1.0, float("nan"), "3"])
def test_a_price_that_is_none_is_refused(price):
    with pytest.raises(ValueError, match="price_per_hour="):
        TRACE.summary(price_per_hour=price)


PROMPTS = [torch.tensor([b % 4, b // 4]) for b in range(12)]
OPTIONS = {"sampling": Sampling(1.0), "max_new_tokens": 12, "stop_tokens": (3,), "seed": 7}


def run(trace="ceiling", **options):
    drafter = TabularDrafter(Table(12, 4), Widths((3, 2)))
    return specdec.generate(TabularTarget(12, 3), PROMPTS, drafter, **OPTIONS, trace=trace, **options)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_what_is_counted_is_the_same_with_slots(batch_size):
    """Texts are the same, so the rows running, and what each of them accepted, are the same ones in another order."""
    slots, together = run(batch_size=batch_size).summary(), run().summary()
    for name in ("tokens", "acceptance_length", "acceptance_rate", "ceiling_share", "divergence"):
        assert slots[name] == pytest.approx(together[name]), name
    assert slots["rows_running"] > together["rows_running"]


def test_the_trace_of_slots_survives_its_file(tmp_path):
    out = run(batch_size=2)
    out.trace.save(tmp_path / "run.safetensors")
    loaded = load(tmp_path / "run.safetensors")
    assert [step.held for step in loaded.steps] == [step.held for step in out.trace.steps]
    assert loaded.summary(price_per_hour=2) == out.summary(price_per_hour=2)


def test_tokens_are_cut_from_the_step_and_row_that_gave_them():
    trace = Trace(steps=[step([0, 1], [2, 2], [1, 1], [1, 1]), step([1], [3], [2], [2])])
    trace.cut(1, 4)
    assert [each.emitted for each in trace.steps] == [[2, 1], [0]]
    assert [each.accepted for each in trace.steps] == [[1, 1], [0]]


def test_experiments_count_by_text_and_not_by_row():
    tokens = [torch.zeros(n, dtype=torch.int64) for n in (3, 7, 3, 1)]
    assert per_prompt([Generation(tokens, None, TRACE)] * 2).tolist() == [3 / 2, 7 / 4, 3 / 2, 1]


@pytest.mark.parametrize("batch_size", [None, 1, 5])
def test_experiments_show_the_trees_of_the_first_text_only(batch_size):
    assert trees(run("laws", batch_size=batch_size)) == trees(run("laws"))
