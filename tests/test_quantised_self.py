"""Drafts that are the target itself in fewer bits or with fewer keys: what they are, how they are scored and what they cost."""

import numpy as np
import pytest
import torch

import specdec
from experiments.studies.quantised_costs import BYTES, WEIGHTS, Pass, roofline
from experiments.studies.quantised_self import GRIDS, Grid, _own, _windowed, along, in_another_order, rounded

PAIR = specdec.demo.load()
IDS = torch.tensor(PAIR.tokenizer(PAIR.prompts[0].text)["input_ids"])[:60]


@pytest.mark.parametrize("name", GRIDS)
def test_weights_on_a_grid_stay_where_they_are(name):
    torch.manual_seed(0)
    once = GRIDS[name](torch.randn(8, 128))
    torch.testing.assert_close(GRIDS[name](once), once)


def test_a_grid_has_as_many_values_in_a_group_as_its_bits_say():
    torch.manual_seed(0)
    weight = torch.randn(4, 512)
    rounded_rows = Grid(3)(weight)
    assert max(len(row.unique()) for row in rounded_rows) == 7  # symmetric about 0
    assert max(len(group.unique()) for group in Grid(4, 128, offset=True)(weight).view(-1, 128)) == 16


def test_the_model_is_found_as_it_was_after_its_weights_were_rounded():
    before = _own(PAIR.target)(IDS, 20)
    with rounded(PAIR.target, Grid(3), Grid(8)):
        assert not torch.allclose(_own(PAIR.target)(IDS, 20), before)
    assert torch.equal(_own(PAIR.target)(IDS, 20), before)


def test_a_model_in_another_order_computes_the_same_and_is_on_no_grid_of_before():
    with rounded(PAIR.target, GRIDS["Q4_1"], GRIDS["Q4_1"]):
        made = in_another_order(PAIR.target)
        torch.testing.assert_close(_own(made)(IDS, 20), _own(PAIR.target)(IDS, 20), rtol=1e-4, atol=1e-4)
    weight = made.get_decoder().layers[0].self_attn.q_proj.weight
    assert not torch.allclose(GRIDS["Q4_1"](weight), weight, atol=1e-4)


def test_a_window_over_the_whole_text_drafts_with_the_targets_law():
    own, wide = (logits(IDS, 20) for logits in (_own(PAIR.target), _windowed(PAIR.target, len(IDS))))
    torch.testing.assert_close(wide, own, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(_windowed(PAIR.target, 4)(IDS, 20), own, atol=0.1)


def test_lengths_of_chains_follow_from_rates():
    assert along(np.ones(20), 4) == 5 and along(np.zeros(20), 4) == 1
    assert along(np.array([1.0, 0, 1, 1, 0, 1]), 2) == 6 / 3  # steps of 2, 3 and 1 tokens
    np.testing.assert_allclose(along(np.full(5000, 0.7), 3), 1 + 0.7 + 0.49 + 0.343, rtol=1e-3)


def test_a_pass_takes_as_long_as_reading_or_computing():
    assert Pass(4.8e9, 0).seconds(1, 1) == 1e-3  # 4.8 GB at 4.8 TB/s
    assert Pass(0, 0, attention=0).seconds(2, 8) == 16 * 2 * WEIGHTS / 989e12


def test_a_draft_of_fewer_bits_gains_only_where_the_target_has_more():
    lengths = {1: 2.0, 2: 3.0, 4: 5.0}  # every token is accepted
    found = roofline({"the target": {}, "int8, a scale per row": {"T = 0.7": {"lengths": lengths, "acceptance": 1.0}}})
    row = found["int8, a scale per row"]
    assert row["int8, batch 1"] is None
    cache = 2 * 131072 / 2 * 32768
    step = (4 * (BYTES["int8, a scale per row"] * WEIGHTS + cache) + 2 * WEIGHTS + cache) / (2 * WEIGHTS + cache)
    np.testing.assert_allclose(row["bf16, batch 1"], [5 / step, 4])
