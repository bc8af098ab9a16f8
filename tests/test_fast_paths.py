"""The certificate of batched code holds on all that is hard for floating point, and finds the faults that were there."""

import json
from dataclasses import replace

import pytest
import torch
from random_trees import differing

from certificates.fast_cases import KEYS
from certificates.mutants.fast import FAST
from experiments.bench.results import ROOT, provenance
from experiments.certify import certify
from experiments.certify_fast import RULES, cases, document, failures, row
from specdec import Coins, Law, Sampling
from specdec.batch import Batch
from specdec.coins import Purpose, inverse_cdf
from specdec.drafters import TreeDrafter, TreeDraftRun
from specdec.rules import LenientRejection, Rule, SiblingRejection
from specdec.target_law import LogitsLaw
from specdec.testing import assert_fast_path
from specdec.testing.coins import ExactCoins, Script
from specdec.testing.fast_paths import FastDecisions, emitted_laws
from specdec.testing.hard_laws import hard_nodes
from specdec.trees import Chain, Widths, draw

RESULTS = ROOT / "experiments" / "results"
ROWS = json.loads((RESULTS / "certificates_fast.json").read_text("utf-8"))
EVERY = 13  # a prime: the sample runs through all rules, laws, samplings and dtypes
NEAR = 1e-5  # how far a float32 threshold may be from the float64 one: a few roundings of a sum over the vocabulary


def name_of(value) -> str:
    return type(value).__name__


def test_a_sample_of_the_certificates_is_found_again_and_none_fails():
    sample = list(range(0, len(cases()), EVERY))
    rows = certify(sample, row=row)
    assert failures(rows) == []
    assert [row["refused"] for row in rows] == [ROWS[i]["refused"] for i in sample]


def test_the_committed_certificates_cover_every_case_and_none_fails():
    assert len(ROWS) == len(cases())
    assert all(tuple(row) == KEYS for row in ROWS)
    assert failures(ROWS) == []


@pytest.mark.parametrize("mutant", FAST, ids=lambda mutant: mutant.name.replace(" ", "_"))
def test_the_certificate_finds_a_planted_fault(mutant):
    with mutant.planted():
        assert failures([mutant.case.row()]) != []


@pytest.mark.parametrize(
    "wrong",
    [{"total_variation": 2e-6}, {"total_variation": float("nan")}, {"nan": True}, {"refused": "no"}, {"due": False}],
    ids=str,
)
def test_a_row_that_contradicts_the_claim_fails(wrong):
    row = next(row for row in ROWS if row["vocab"] == 3 and row["refused"] is None)
    assert failures([row]) == []
    assert failures([{**row, **wrong}]) != []


@pytest.mark.parametrize("law", [Law.IID, Law.WITHOUT_REPLACEMENT, Law.SAMPLED_THEN_TOP], ids=lambda law: law.name)
def test_the_drafts_that_are_certified_are_those_that_trees_draw(law):
    """`draw` followed through every coin gives the drafts and probabilities that the certificate enumerates."""
    sampling, width = Sampling(1.0), 2
    hard = hard_nodes(3, law, width, sampling, torch.float32)
    enumerated = [{} for _ in hard.names]
    for node, chance, tokens in hard.drafts():
        enumerated[node][tokens] = chance
    for node, name in enumerate(hard.names):
        found, queue = {}, [[]]
        while queue:
            script = Script(queue.pop())
            coins = ExactCoins([script], 1 + width)
            drawn = _draw(hard, node, coins)
            tokens = tuple(drawn.tokens[0].tolist())
            tokens = tokens if drawn.exists is None else tuple(drawn.tokens[0, drawn.exists[0]].tolist())
            found[tokens] = found.get(tokens, 0) + float(script.probability)
            queue += script.branches
        found = {tokens: chance for tokens, chance in found.items() if chance > 1e-13}
        assert found == pytest.approx(enumerated[node], abs=1e-12), name


def _draw(hard, node, coins):
    """The children of one node, by the logits of its weights: they give these weights again."""
    logits = hard.weights[node].double().log()[None, None]
    probs = logits.softmax(-1)
    assert torch.allclose(probs[0, 0], hard.weights[node].double(), rtol=1e-6, atol=0)
    return draw(logits, hard.width, hard.law, hard.sampling, coins, 1)


def test_decisions_at_random_coins_are_those_that_the_thresholds_say():
    """Thresholds are found one coin at a time: with the others at random the same children are accepted."""
    hard = hard_nodes(5, Law.WITHOUT_REPLACEMENT, 3, Sampling(1.0), torch.float32)
    decisions = FastDecisions(SiblingRejection(), hard)
    _, thresholds = emitted_laws(decisions.rule, hard)
    edges = torch.zeros(len(decisions.owner), hard.width, dtype=torch.float64)
    at_children = thresholds.child < hard.width
    edges[thresholds.draft[at_children], thresholds.child[at_children]] = thresholds.coin[at_children]
    accept = torch.rand(edges.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    hit = accept < edges
    due = torch.where(hit.any(1), hit.long().argmax(1) + 1, 0)
    # a child that is never reached has no threshold
    near = ((accept - edges).abs() < NEAR).any(1) | (edges == 0).any(1)
    found, _ = decisions(torch.arange(len(edges)), accept, accept[:, 0])
    assert torch.equal(found[~near], due[~near])
    assert int((~near).sum()) > 200


class HardDrafter(TreeDrafter):
    """Drafts by laws that are hard, another after every token."""

    def __init__(self, laws, tree):
        super().__init__(tree)
        self.laws = laws  # [case, vocab] draft logits

    def start(self, target, batch, last=None):
        return HardDraftRun(self, batch)


class HardDraftRun(TreeDraftRun):
    def score(self, frontier):
        laws = self.drafter.laws
        return laws[(7 * frontier.tokens + frontier.topology.depth) % len(laws)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "tree",
    [Chain(3), *(Widths((2, 2), law) for law in (Law.IID, Law.WITHOUT_REPLACEMENT, Law.SAMPLED_THEN_TOP)),
     Widths((2, 1, 2), Law.SAMPLED_THEN_TOP)],
    ids=lambda tree: f"{name_of(tree)}_{tree.widths}_{tree.law.name}",
)  # fmt: skip
@pytest.mark.parametrize("rule", RULES, ids=name_of)
def test_deeper_trees_of_hard_laws_are_decided_as_the_specification_does_in_float64(rule, tree, dtype):
    sampling, rows, vocab = Sampling(1.0), 400, 5
    try:
        rule.check(tree.spec(sampling))
    except ValueError:
        return
    hard = hard_nodes(vocab, Law.IID, 1, sampling, dtype)
    drafts = hard.weights.log().to(dtype)
    drafts[:, 0] = drafts[:, 0].clamp(min=-300)  # a law where all is underflow is none
    batch = Batch(rows, 2, vocab, torch.device("cpu"))
    batch.lengths.fill_(1)
    batch.tokens[:, 0] = torch.arange(rows) % vocab
    batch.sampling, batch.max_depth = sampling, tree.spec(sampling).depth
    batch.left.fill_(batch.max_depth + 1)
    coins = Shifted(5, rows, tree.spec(sampling).nodes)
    drafted = HardDrafter(drafts, tree).start(None, batch).propose(coins)
    at = (torch.arange(rows)[:, None] + 3 * drafted.tokens + 5 * drafted.topology.depths) % len(hard.logits)
    logits = hard.logits[at]
    exact = replace(drafted, draft_probs=drafted.draft_probs.double())

    def by_specification(shift):
        coins.shift = shift
        return Rule.decide_batch(rule, exact, LogitsLaw(logits.double(), exact, batch), coins)

    fast = rule.decide_batch(drafted, LogitsLaw(logits, drafted, batch), coins)
    odd = differing(fast, by_specification(0.0))
    assert odd.sum() <= rows // 50
    if odd.any():  # only where a coin lies next to a threshold
        assert not (odd & differing(fast, by_specification(NEAR)) & differing(fast, by_specification(-NEAR))).any()


class Shifted(Coins):
    """Coins that decide moved by a little; those that draw are not."""

    shift = 0.0

    def uniforms(self, purpose):
        shift = 0.0 if purpose == Purpose.DRAFT else self.shift
        return (super().uniforms(purpose) + shift).clamp(0, 1 - 1e-16)


def test_the_document_states_commit_and_what_the_kernel_decided():
    made = {**provenance("experiments/certify_fast.py", [], {}, "cpu"), "commit": "abc", "dirty": False}
    text = document(ROWS[::EVERY], {"sets": 1990, "otherwise": 0}, made)
    assert "commit abc" in text
    assert "1,990 sets of coins" in text


class WithoutRest(SiblingRejection):
    """Its batched code emits from the target's law after a rejection too."""

    def decide_batch(self, tree, target_law, coins):
        made = super().decide_batch(tree, target_law, coins)
        law = target_law.at(made.path.gather(1, made.accepted[:, None])[:, 0])
        return replace(made, token=inverse_cdf(law, coins.uniforms(Purpose.EMIT)[:, 0]))


def test_a_rule_of_ones_own_is_certified_in_one_call():
    assert_fast_path(SiblingRejection())
    with pytest.raises(AssertionError, match="WithoutRest is not lossless as it runs: total variation 0"):
        assert_fast_path(WithoutRest())
    with pytest.raises(AssertionError, match="does not claim to be lossless"):
        assert_fast_path(LenientRejection())
