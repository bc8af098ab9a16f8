"""Losses for draft models: their values are what the loop accepts, their gradients that of what it accepts."""

from functools import partial
from itertools import product

import pytest
import torch

from specdec.rules import BlockVerification, SiblingRejection
from specdec.testing import Table, TabularDrafter, TabularTarget, exact_law
from specdec.theory import chain_optimum
from specdec.training.distillation import acceptance_by_depth, cross_entropy, expected_tau, kl, lk
from specdec.trees import Chain

torch.set_num_threads(1)
VOCAB, DEPTH, PROMPT = 3, 3, (0, 1)
ENUMERATED = 1e-12  # float64 sums over 27 texts
DIFFERENCED = 1e-6  # finite differences of step 1e-5 in float64: their error is about its square
TEXTS = torch.tensor(list(product(range(VOCAB), repeat=DEPTH)))  # [text, place]
RULES = {False: SiblingRejection(), True: BlockVerification()}


def laws(table, changes=None):
    """[text, place, vocab] log-probabilities before every token of every text; `changes` are added to logits, by prefix."""
    changes = {} if changes is None else changes
    return torch.stack([
        torch.stack([(table.logits((*PROMPT, *text[:i])) + changes.get(tuple(text[:i]), 0)) for i in range(DEPTH)])
        for text in TEXTS.tolist()
    ]).log_softmax(-1)  # fmt: skip


def chance(target_law):
    """[text]: the target's probability of each text."""
    return target_law.gather(2, TEXTS[..., None]).sum((1, 2)).exp()


def enumerated_tau(target_law, draft_law, block):
    """The expectation of -`expected_tau` over the texts that the target writes."""
    accepted = acceptance_by_depth(target_law, draft_law, TEXTS, DEPTH, block)[:, 0].sum(-1)
    return 1 + (chance(target_law) * accepted).sum()


@pytest.mark.parametrize("block", RULES)
@pytest.mark.parametrize("seed", range(4))
def test_expected_tau_is_that_of_the_loop(seed, block):
    target, draft = TabularTarget(VOCAB, seed), Table(VOCAB, seed + 10)
    drafter = TabularDrafter(draft, Chain(DEPTH))
    exact = exact_law(target, PROMPT, drafter, rule=RULES[block], max_new_tokens=DEPTH + 1).expected_tokens
    assert abs(float(enumerated_tau(laws(target), laws(draft), block)) - exact) <= ENUMERATED


@pytest.mark.parametrize("seed", range(4))
def test_product_of_the_overlaps_along_the_targets_text_is_not_the_chance_of_acceptance(seed):
    """What one would write first, and why it is not what is there."""
    target, draft = TabularTarget(VOCAB, seed), Table(VOCAB, seed + 10)
    p, q = laws(target), laws(draft)
    overlaps = torch.minimum(p, q).exp().sum(-1)
    naive = 1 + (chance(p) * overlaps.cumprod(1).sum(1)).sum()
    assert abs(float(naive - enumerated_tau(p, q, False))) > 1e-3


@pytest.mark.parametrize("seed", range(2))
def test_gradient_is_that_of_the_optimum_of_a_chain(seed):
    """Block verification reaches it; here its finite differences, logit by logit of every draft law."""
    target, draft, step = Table(VOCAB, seed), Table(VOCAB, seed + 10), 1e-5
    changes = {prefix: torch.zeros(VOCAB, dtype=torch.float64, requires_grad=True)
               for depth in range(DEPTH) for prefix in product(range(VOCAB), repeat=depth)}  # fmt: skip
    enumerated_tau(laws(target), laws(draft, changes), True).backward()

    def optimum(prefix, token, change):
        def q(text):
            logits = draft.logits(text).clone()
            logits[token] += change * (text == (*PROMPT, *prefix))
            return logits.softmax(-1).numpy()

        return chain_optimum(lambda text: target.logits(text).softmax(-1).numpy(), q, DEPTH, PROMPT)

    for prefix, change in changes.items():
        for token in range(VOCAB):
            difference = (optimum(prefix, token, step) - optimum(prefix, token, -step)) / (2 * step)
            assert abs(float(change.grad[token]) - difference) <= DIFFERENCED


LOSSES = {"cross_entropy": cross_entropy, "kl": kl, "lk": lk, "tau_token": partial(expected_tau, depth=2),
          "tau_block": partial(expected_tau, depth=2, block=True)}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_equals_finite_differences_and_places_without_a_token_have_none(name):
    torch.manual_seed(0)
    target_law, logits = torch.randn(2, 6, 5, dtype=torch.float64).log_softmax(-1), torch.randn(2, 6, 5).double()
    tokens = torch.randint(5, (2, 6))
    tokens[0, :2], tokens[1, 4:] = -1, -1  # a prompt, and an end

    def loss(logits):
        return LOSSES[name](target_law, logits.log_softmax(-1), tokens)

    assert torch.autograd.gradcheck(loss, logits.requires_grad_())
    loss(logits).backward()
    assert (
        logits.grad[0, 2:].abs().sum(-1).gt(0).all() and not logits.grad[0, :2].any() and not logits.grad[1, 4:].any()
    )


@pytest.mark.parametrize("name", ["kl", "lk", "tau_token", "tau_block"])
def test_a_draft_that_is_the_target_is_the_optimum(name):
    law = torch.randn(2, 6, 5, dtype=torch.float64).log_softmax(-1)
    tokens = torch.randint(5, (2, 6))
    assert abs(float(LOSSES[name](law, law, tokens)) - (-3 if "tau" in name else 0)) <= ENUMERATED


@pytest.mark.parametrize("block", RULES)
@pytest.mark.parametrize("drafted", [0, 1, 2])
def test_a_token_that_the_target_would_not_write_now_ends_the_chain(drafted, block):
    """Greedily a tie that another pass breaks otherwise: the target has written 1 and now says 0."""
    target, draft = (torch.eye(VOCAB)[[first, 1, 1]].log()[None] for first in (0, drafted))
    found = acceptance_by_depth(target, draft, torch.tensor([[1, 1, 1]]), DEPTH, block)
    assert found.tolist() == [[[float(drafted == 0), 0, 0]]]


def test_text_that_is_shorter_than_the_chain_is_refused():
    law = torch.zeros(1, 3, 5)
    with pytest.raises(ValueError, match="no room for a chain of 4"):
        expected_tau(law, law, torch.zeros(1, 3, dtype=torch.int64))
