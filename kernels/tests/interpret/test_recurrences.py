"""Linear attention and the gated delta rule over trees, kernels against specifications, with new inputs each run."""

import pytest
import torch
from planted import planted
from recurrence_cases import Case, assert_folds, assert_right, draw
from verification_cases import fresh_seed

from specdec_kernels.reference.gated_delta import gated_delta as specified
from specdec_kernels.triton import gated_delta, linear_attention

KERNELS = {"linear_attention": linear_attention.linear_attention, "gated_delta": gated_delta.gated_delta}
CASES = {
    "a root alone": Case(1),
    "16 nodes": Case(16),
    "17 nodes": Case(17, batch=2, heads=1),
    "64 nodes": Case(64, batch=2, heads=1),
    "nothing to fold": Case(7, kept=None),
    "a long path": Case(3, kept=33),
    "the last nodes of a tree": Case(4, earlier=5),
    "the last nodes of a large tree": Case(9, earlier=19, kept=None),
    "shared keys": Case(5, key_heads=2, heads=6, batch=2),
    "small heads": Case(5, dim=5, value_dim=3),
    "large heads": Case(5, dim=128, value_dim=64, heads=1, batch=2),
    "bfloat16": Case(9, dtype=torch.bfloat16),
    "keys that are alike": Case(40, alike=True, heads=1, batch=2),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("op", KERNELS)
def test_nodes_read_what_the_specification_says(op, case):
    assert_right(op, draw(op, CASES[case], fresh_seed()), KERNELS[op])


@pytest.mark.parametrize(
    "case", [Case(1), Case(1, kept=33, heads=4, key_heads=2), Case(1, dim=5, value_dim=3)], ids=str
)
def test_accepted_nodes_enter_the_state(case):
    assert_folds(case, fresh_seed(), linear_attention.fold_linear_attention)


def test_a_tree_that_grows_level_by_level_reads_as_a_whole_one():
    arguments = draw("gated_delta", Case(21, batch=2, heads=1), fresh_seed())
    whole = {**arguments, "state": arguments["state"].clone(), "update": arguments["update"].clone()}
    due = specified(**whole)
    found = []
    for start, end in ((0, 1), (1, 4), (4, 18), (18, 21)):
        last = {name: arguments[name][:, start:end] for name in ("query", "value", "beta")}
        every = {name: arguments[name][:, :end] for name in ("key", "decay", "update")}
        tree = {"ancestors": arguments["ancestors"][:, :end, :end], "fold": arguments["fold"] if start == 0 else None}
        found.append(gated_delta.gated_delta(**last, **every, **tree, state=arguments["state"]))
    torch.testing.assert_close(torch.cat(found, 1), due)
    torch.testing.assert_close(arguments["update"], whole["update"])
    torch.testing.assert_close(arguments["state"], whole["state"])


SMALL, LARGE = Case(9, earlier=3), Case(30, earlier=5, heads=2, key_heads=2)
MUTANTS = {
    "a node that is not kept enters": ("o_p < tl.minimum(tl.load(count[0] + at[0] * count[1]), steps)", "o_p < steps"),
    "a node decays itself": ("o_p[None, :] > o_p[:, None]", "o_p[None, :] >= o_p[:, None]"),
    "the state does not decay": ("b_state * decay", "b_state"),
    "the state is not written": ("tl.store(block(state, at, o_k, o_v), b_state,", "tl.store(block(state, at, o_k, o_v), 0.0,"),
    "decay of children": ("b_i[:, None] - b_j[None, :]", "b_j[None, :] - b_i[:, None]"),
    "nodes see no ancestors": ("tl.dot(b_score, b_value, b_out", "tl.dot(b_score * 0, b_value, b_out"),
    "reads do not decay": ("b_out * tl.exp(b_total)[:, None]", "b_out"),
}  # fmt: skip
DELTA_MUTANTS = {
    "one doubling less": ("DOUBLINGS: tl.constexpr = tl.constexpr(4)", "DOUBLINGS: tl.constexpr = tl.constexpr(3)"),
    "a tile is not solved": ("solve(b_beta * b_m, b_update, PRECISION)", "b_update"),
    "earlier tiles left out": ("tl.range(0, i, TILE,", "tl.range(0, 0, TILE,"),
    "earlier tiles not corrected by": ("b_beta * b_m, b_known", "0 * b_m, b_known"),
    "known nodes are forgotten": ("load(update, at, o_i, o_i < nodes", "load(update, at, o_i, m_i"),
    "what is found does not decay": ("- b_grown * b_found", "- b_found"),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the NaN that some of them make
@pytest.mark.parametrize("name", [*MUTANTS, *DELTA_MUTANTS])
def test_planted_bugs_are_found(name, tmp_path):
    op, module = ("gated_delta", gated_delta) if name in DELTA_MUTANTS else ("linear_attention", linear_attention)
    wrong = getattr(planted(module, *{**MUTANTS, **DELTA_MUTANTS}[name], tmp_path), op)
    with pytest.raises(AssertionError):
        for case in (SMALL, LARGE):
            assert_right(op, draw(op, case, 0), wrong)
