"""What kernels read: each logit, key and value as often as it must be, and no program much more than the others."""

import pytest
import torch
from attention_cases import Case, draw
from planted import planted
from reads import counted

import specdec_kernels.triton.law as laws
from specdec_kernels.triton import filters, tiles, tree_attention

VOCAB, TILE = 1024, 256


@pytest.fixture
def logits(monkeypatch):
    """[1, VOCAB] of weights that fall as the rank squared, in four tiles."""
    monkeypatch.setattr(tiles, "_TILE", TILE)
    return -2.0 * (torch.randperm(VOCAB, generator=torch.Generator().manual_seed(0)) + 1).log().bfloat16()[None]


@pytest.mark.parametrize("temperature, numbers", [(0.0, 3), (0.7, 4)])
def test_laws_read_every_logit_once(temperature, numbers, logits):
    with counted() as launches:
        laws.law(logits, temperature, None, None, None)
    first, second = launches
    assert [first.elements, first.in_series] == [VOCAB, 1]
    assert [second.elements, second.in_series] == [4 * numbers, numbers]  # of tiles


def filters_read_few(logits, launch):
    """Every logit twice, counts of every tile for each, and in all passes of the bisection together little more."""
    with counted() as launches:
        launch(logits, 1.0, None, 0.95, None)
    first, second = launches
    return [first.elements, first.in_series] == [VOCAB, 1] and second.elements < 4 * VOCAB and second.in_series < 24


def attention_reads_once(launch):
    """Every program a block of queries, then its share of keys and values; the merge what each split wrote, side by side."""
    splits = 3
    case = Case(9, 400, 4, 2, splits=splits, dtype=torch.bfloat16)
    with counted() as launches:
        launch(**draw(case, 0), splits=splits)
    first, merge = launches
    queries, slots = 64 * case.head_dim * len(first), 2 * case.kv_heads * (case.nodes + case.length) * case.head_dim
    parts = splits * case.nodes * case.heads * case.head_dim
    return (
        first.elements < 1.01 * (queries + slots)
        and merge.elements < 1.05 * parts
        and [len(first), first.in_series, merge.in_series] == [6, 9, 3]
    )


def test_filters_read_every_logit_twice_and_then_few(logits):
    assert filters_read_few(logits, laws.law)


def test_attention_reads_every_key_and_value_once_and_every_partial_result_once():
    assert attention_reads_once(tree_attention.tree_attention)


AGAIN = """    for again in range(tiles):
        _, b_more = read_tile(p_logits, i_row, (i_tile + again) % tiles, vocab, tiles, BLOCK, LINE)
    b_top = tl.max("""
SLOWER_FILTERS = {
    "one program bisects the whole row": ("if tl.max(b_count) > stride:", "if tl.max(b_count) > -1:"),
    "every program reads the whole row": ("    b_top = tl.max(", AGAIN),
    "tokens are not counted": ("tl.where(depth < BINS, ", "tl.where(depth < 0, "),
}
TILES = "tl.range(tl.maximum(start, whole), tl.minimum(stop, prefix), num_stages=STAGES):"
TWICE = "tl.range(2 * tl.maximum(start, whole), 2 * tl.minimum(stop, prefix), num_stages=STAGES):\n        i = i // 2"
SLOWER_ATTENTION = {
    "every tile is multiplied twice": (TILES, TWICE),
    "splits are merged one by one": ("MERGE_SPLITS = 4, 16", "MERGE_SPLITS = 4, 1"),
    "one split does all the work": ("share = tl.cdiv(prefix + tree, tl.num_programs(2))", "share = prefix + tree"),
}


@pytest.mark.parametrize("fault", SLOWER_FILTERS)
def test_slower_filters_fail(fault, logits, tmp_path, monkeypatch):
    monkeypatch.setattr(laws, "Filters", planted(filters, *SLOWER_FILTERS[fault], tmp_path).Filters)
    assert not filters_read_few(logits, laws.law)


@pytest.mark.parametrize("fault", SLOWER_ATTENTION)
def test_slower_attention_fails(fault, tmp_path):
    assert not attention_reads_once(planted(tree_attention, *SLOWER_ATTENTION[fault], tmp_path).tree_attention)
