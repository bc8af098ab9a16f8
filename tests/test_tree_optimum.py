"""The study of the optimum of trees: its linear program, and what it says that rules accept, against the library."""

from itertools import product

import numpy as np
import pytest

from experiments.studies.toy_rules import kseq, level, sibling, traversal
from experiments.studies.toy_trees import family, prefixes, trees
from experiments.studies.tree_optimum import SAMPLED, optimum
from specdec import Law
from specdec.rules import KSeq, LevelVerification, SiblingRejection, TraversalVerification
from specdec.testing import Table, TabularDrafter, TabularTarget, exact_law
from specdec.theory import chain_optimum, one_step_ceiling
from specdec.trees import Widths

PROMPT = (0, 1, 0)
SOLVED = 1e-6  # HiGHS is content when constraints hold to 1e-7
ON_A_GRID = 1e-5  # `KSeq` rounds its rho up to a grid


def laws(table, depth):
    """After every text of fewer than `depth` tokens."""
    return {u: table.logits((*PROMPT, *u)).softmax(0).numpy() for u in prefixes(3, depth)}


@pytest.mark.parametrize("seed", range(3))
def test_optimum_of_a_chain_is_that_of_block_verification(seed):
    p, q = laws(Table(3, seed), 2), laws(Table(3, seed + 50), 2)
    chain = chain_optimum(p.__getitem__, q.__getitem__, 2)
    assert 1 + optimum([({}, p, q)], (1, 1), Law.IID) == pytest.approx(chain, abs=SOLVED)


@pytest.mark.parametrize("law", SAMPLED, ids=lambda law: law.name)
def test_optimum_of_one_node_is_its_ceiling(law):
    for seed in range(10):
        p, q = laws(Table(3, seed), 1), laws(Table(3, seed + 50), 1)
        top = [int(q[()].argmax())] if law == Law.SAMPLED_THEN_TOP else []
        ceiling = one_step_ceiling(p[()], law, q[()], count=2, top=top)
        assert optimum([({}, p, q)], (2,), law) == pytest.approx(ceiling, abs=SOLVED)


@pytest.mark.parametrize("law", SAMPLED, ids=lambda law: law.name)
def test_rules_accept_what_the_study_expects_of_them_and_stay_below_the_optimum(law):
    table, widths = Table(3, 3), (2, 1)
    p, q = laws(Table(3, 2), 2), laws(table, 2)
    found = trees(q, widths, law)
    expected = {
        SiblingRejection(): sum(chance * sibling(p, tree) for chance, tree in found),
        TraversalVerification(): sum(chance * traversal(p, tree)[1] for chance, tree in found),
        LevelVerification(2): level(p, q, found, widths, law, 2),
    }
    if law == Law.IID:
        expected[KSeq()] = sum(chance * kseq(p, tree) for chance, tree in found)
    most = optimum([({}, p, q)], widths, law)
    for rule, accepted in expected.items():
        run = exact_law(
            TabularTarget(3, 2), PROMPT, TabularDrafter(table, Widths(widths, law)), rule=rule, max_new_tokens=3
        )
        assert run.expected_tokens == pytest.approx(1 + accepted, abs=ON_A_GRID)
        assert 0.8 * most < accepted < most


def test_a_verifier_that_sees_less_accepts_less():
    members = list(family(2, 3, 0, False, 2))
    assert len(members) == 64
    known = np.mean([optimum([member], (2, 1, 1), Law.IID) for member in members])
    assert known - 0.02 < optimum(members, (2, 1, 1), Law.IID) < known - 1e-4


def test_the_chances_of_all_trees_add_up_to_one():
    q = laws(Table(3, 3), 2)
    for law, widths in product(SAMPLED, [(1,), (2, 1), (2, 2)]):
        assert sum(chance for chance, _ in trees(q, widths, law)) == pytest.approx(1)
