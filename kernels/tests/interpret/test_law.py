"""Laws as numbers per row, kernel against specification."""

from types import ModuleType

import numpy as np
import pytest
import torch
from planted import planted
from program_order import backwards
from verification_cases import FILTERS, PLAIN, assert_law_is_right, law_logits

import specdec_kernels.triton.law as kernel
from specdec_kernels.reference.law import law as reference
from specdec_kernels.triton import filters as filtering
from specdec_kernels.triton import tiles as tiling
from specdec_kernels.triton.law import law

TOTAL = {
    torch.float64: 1e-14,
    torch.float32: 2e-7,
    torch.bfloat16: 2e-7,
}  # relative: roundings of exp, summed in float64


pytestmark = pytest.mark.usefixtures("poisoned")
EXTREME = [(1.0, 1, None, None), (0.5, 60, None, None), (0.75, None, 1e-9, None)]


def assert_exact(x, filters):
    (got, best), (due, first) = law(x, *filters), reference(x, *filters)
    kept = [(x.double() >= row[:, 1:2]) & x.isfinite() for row in (got, due)]
    assert torch.equal(*kept)
    assert torch.equal(best, first)
    assert torch.equal(got[:, 0], due[:, 0])
    torch.testing.assert_close(got[:, 2], due[:, 2], rtol=TOTAL[x.dtype], atol=0)


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_kernel_keeps_exactly_the_tokens_of_the_specification(dtype, filters):
    assert_exact(law_logits(70, dtype), filters)


@pytest.mark.parametrize("room", [1, 512])  # groups: 1 is too few wherever a filter keeps more than a few tokens
@pytest.mark.parametrize("filters", [*FILTERS, *EXTREME], ids=str)
def test_neither_tiles_nor_their_room_nor_the_order_of_programs_change_a_law(filters, room, monkeypatch):
    monkeypatch.setattr(tiling, "_TILE", 16)
    monkeypatch.setattr(filtering, "_ROOM", room)
    x = law_logits(70, torch.bfloat16)[: 3 if room > 1 else 1]
    assert_exact(x, filters)
    found = law(x, *filters)
    with backwards():
        assert all(map(torch.equal, law(x, *filters), found))  # bit by bit


NO_FALLBACK = "if tl.max(b_count) > stride:", "if tl.max(b_count) < 0:"
NO_COUNTS = "tl.where(depth < BINS, ", "tl.where(depth < 0, "


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # where there is no room, NaN is read
@pytest.mark.parametrize(
    "power, bugs, room",
    [(2.0, [NO_FALLBACK], True), (2.0, [NO_FALLBACK, NO_COUNTS], False), (0.0, [NO_FALLBACK], False)],
)
def test_words_find_room_under_top_p(power, bugs, room, tmp_path, monkeypatch):
    """Of 1024 tokens whose weights fall as a power of their rank 12 are kept; where all weigh much the same, most are."""
    generator = torch.Generator().manual_seed(0)
    x = -power * (torch.randperm(1024, generator=generator) + 1).log() + 0.01 * torch.randn(1024, generator=generator)
    wrong = filtering
    for old, changed in bugs:
        wrong = planted(wrong, old, changed, tmp_path)
    monkeypatch.setattr(tiling, "_TILE", 256)
    monkeypatch.setattr(wrong, "_ROOM", 10)  # of 64 groups of a tile
    monkeypatch.setattr(kernel, "Filters", wrong.Filters)
    assert differs(x[None], (1.0, None, 0.95, None)) != room


@pytest.mark.parametrize("filters", [(0.7, None, 0.9, None), (0.7, 50, None, None)], ids=str)
def test_large_vocabularies_of_hard_laws(filters):
    """Near and exact ties, one token that is certain, denormals, none but a few tokens that are possible."""
    x = torch.randn(5, 151936, generator=torch.Generator().manual_seed(0)) * 3
    x[1, 5:60] = x[1].max() + torch.arange(55) % 2 * 0.0625
    x[2, 77] = 200.0
    x[3, 9:-9] = -torch.inf
    assert_law_is_right(x[:4].bfloat16(), filters, law(x[:4].bfloat16(), *filters))
    x[4, :9], x[4, 9:] = 1e-40, -torch.inf
    assert_law_is_right(x[4:], filters, law(x[4:], *filters))


def test_rows_of_several_blocks_in_float64():
    x = law_logits(4100, torch.float64)
    (got, best), (due, first) = law(x, 0.75, None, None, 0.05), reference(x, 0.75, None, None, 0.05)
    assert torch.equal((x >= got[:, 1:2]), (x >= due[:, 1:2]))
    assert torch.equal(best, first)
    torch.testing.assert_close(got[:, 2], due[:, 2], rtol=TOTAL[torch.float64], atol=0)


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_logits_that_are_no_law_have_no_total(filters):
    x = torch.zeros(4, 9)
    x[0, 3], x[1], x[2, 2] = torch.nan, -torch.inf, torch.inf
    for compute in (law, reference):
        with np.errstate(invalid="ignore"):
            assert compute(x, *filters)[0][:, 2].isnan().tolist() == [True, True, True, False]


BUGS: dict[str, tuple[ModuleType, str, str]] = {
    "the floor of one tile is the threshold": (
        filtering,
        "cut = tl.maximum(cut, least)",
        "cut = tl.maximum(cut, floor)",
    ),
    "what found no room is forgotten": (filtering, *NO_FALLBACK),
    "tokens that are left out may weigh too much": (filtering, "0.999 * left", "4 * left"),
    "the mass of what top-k cut counts": (filtering, "if TOP_K:\n            due", "if not TOP_P:\n            due"),
    "sums of tiles in units of their own peaks": (tiling, "tl.sum(b_total * tl.exp2(", "tl.sum(b_total + 0 * tl.exp2("),
    "the first token of the last tile": (tiling, "tl.min(tl.where(mask & (b_peak", "tl.max(tl.where(mask & (b_peak"),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # overflows and NaN, which is what they are
@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_caught(bug, tmp_path, monkeypatch):
    module, old, changed = BUGS[bug]
    wrong = planted(module, old, changed, tmp_path)
    monkeypatch.setattr(tiling, "_TILE", 16)
    if module is filtering:
        monkeypatch.setattr(wrong, "_ROOM", 2)
        monkeypatch.setattr(kernel, "Filters", wrong.Filters)
    else:
        monkeypatch.setattr(kernel, "merged", wrong.merged)
    x = law_logits(70, torch.bfloat16)
    assert any(differs(x, filters) for filters in (PLAIN, *FILTERS[2:], (1.0, 5, 0.8, None)))


def differs(x, filters):
    try:
        assert_exact(x, filters)
    except AssertionError:
        return True
    return False
