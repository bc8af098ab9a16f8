"""What the law of a child is said to be is what is drawn, and means the same for numbers, arrays and tensors."""

from collections import defaultdict

import numpy as np
import pytest
import torch

from specdec import Law, Sampling
from specdec.laws import SAMPLED, as_law, drafts, excludes_elders, is_random, is_struck
from specdec.testing.coins import ExactCoins, Script
from specdec.trees.draw import draw

LAWS = (Law.POINT, *SAMPLED)
WEIGHTS = np.array([0.125, 0.5, 0.0, 0.375])


def drawn(law, count):
    """{tokens in order: probability}: every outcome of the coins with which a node's children are drawn."""
    todo, found = [[]], defaultdict(float)
    while todo:
        script = Script(todo.pop())
        coins = ExactCoins([script], 1 + count)
        children = draw(torch.tensor(WEIGHTS).log()[None, None], count, law, Sampling(1.0), coins, 1)
        exists = [True] * count if children.exists is None else children.exists[0].tolist()
        tokens = zip(children.tokens[0].tolist(), exists, strict=True)
        found[tuple(token for token, there in tokens if there)] += float(script.probability)
        todo += script.branches
    return found


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_drafts_are_what_is_drawn(law, count):
    assert drafts(law, WEIGHTS, count) == pytest.approx(drawn(law, count))


@pytest.mark.parametrize("law", [Law.WITHOUT_REPLACEMENT, Law.SAMPLED_THEN_TOP], ids=lambda law: law.name)
def test_where_the_support_runs_out_there_are_fewer_children(law):
    assert {len(tokens) for tokens in drafts(law, WEIGHTS, 4)} == {3}
    assert drafts(law, WEIGHTS, 4) == pytest.approx(drawn(law, 4))


def test_numbers_arrays_and_tensors_are_told_the_same():
    laws, slots = np.arange(4)[:, None, None], np.arange(3)[:, None]
    for ask, arguments in (
        (is_random, (laws, slots)),
        (is_struck, (laws, slots, np.arange(3))),
        (excludes_elders, (laws,)),
    ):
        array, tensor = ask(*arguments), ask(*map(torch.from_numpy, arguments))
        numbers = np.vectorize(ask)(*arguments)
        assert array.tolist() == tensor.tolist() == numbers.tolist()
    assert [law.name for law in Law if excludes_elders(law)] == ["WITHOUT_REPLACEMENT"]


def test_a_law_that_no_child_can_have_is_refused():
    assert as_law(3) is Law.SAMPLED_THEN_TOP
    for law, message in ((Law.PADDING, "absent nodes; choose one of Law.POINT"), (5, "law=5: must be <= 4")):
        with pytest.raises(ValueError, match=message):
            as_law(law)
