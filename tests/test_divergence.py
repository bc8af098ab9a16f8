"""What is said of lossy rules is what they do."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from specdec import Law, Sampling, generate
from specdec.rules import Decision, LenientRejection, Rule, SiblingRejection, TypicalAcceptance
from specdec.testing import Table, TabularDrafter, TabularTarget, exact_law
from specdec.theory.divergence import divergence
from specdec.trees import Chain, Widths

VOCAB, PROMPT = 4, (0, 1, 0)
ROUNDING = 1e-12  # float64 against fractions
AVERAGED = 0.01  # 64 draws of the earlier siblings, of which there are few at this vocabulary
RULES = [LenientRejection(0.3), LenientRejection(0.7), TypicalAcceptance(0.3, 0.5)]


class Lossless(LenientRejection):
    """Sibling rejection under a name that has to prove itself."""

    def __init__(self):
        super().__init__(1)


def at_one_node(rule, law, width):
    """(by enumeration of the real loop, by `divergence`): the total variation of the first token's law from the target's."""
    target, table = TabularTarget(VOCAB, 5), Table(VOCAB, 7)
    drafter = TabularDrafter(table, Widths((width,), law))
    found = exact_law(target, PROMPT, drafter, rule=rule, max_new_tokens=2)
    first = [Fraction(0)] * VOCAB
    for text, probability in found.probabilities.items():
        first[text[0]] += probability
    p, q = (part.logits(PROMPT).softmax(-1).numpy() for part in (target, table))
    best = np.argsort(-q).tolist()
    top = {Law.POINT: best[:width], Law.SAMPLED_THEN_TOP: best[: width - 1]}.get(law, [])
    exact = sum(abs(float(got) - due) for got, due in zip(first, p, strict=True)) / 2
    return exact, divergence(rule, p, law, q, count=width, top=top)


@pytest.mark.parametrize("law", [law for law in Law if law != Law.PADDING], ids=lambda law: law.name)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{type(rule).__name__}_{vars(rule)}")
def test_divergence_is_what_the_loop_does(rule, law):
    for width in (1, 2, 3):
        exact, said = at_one_node(rule, law, width)
        drawn = law == Law.WITHOUT_REPLACEMENT and width > 1
        assert said == pytest.approx(exact, abs=AVERAGED if drawn else ROUNDING)
    assert said > 3 * AVERAGED


@pytest.mark.parametrize("law", [law for law in Law if law != Law.PADDING], ids=lambda law: law.name)
def test_a_rule_that_turns_out_lossless_diverges_by_nothing(law):
    assert at_one_node(Lossless(), law, 3)[1] < ROUNDING
    assert at_one_node(SiblingRejection(), law, 2)[1] == 0


def test_summary_averages_over_all_tokens():
    drafter = TabularDrafter(Table(VOCAB, 7), Chain(2))
    options = {"sampling": Sampling(1.0), "max_new_tokens": 30, "stop_tokens": ()}

    def run(rule):
        prompts = [torch.tensor(PROMPT)] * 8
        return generate(TabularTarget(VOCAB, 5), prompts, drafter, rule=rule, trace="ceiling", **options)

    lossy = run(LenientRejection(0.3))
    visits = [visit for step in lossy.trace.steps for row in step.visits for visit in row]
    assert lossy.summary()["divergence"] == pytest.approx(sum(visit.divergence for visit in visits) / (8 * 30))
    assert lossy.summary()["divergence"] > 0.01
    assert run(SiblingRejection()).summary()["divergence"] == 0


def test_a_lossy_rule_that_does_not_say_what_it_does_has_no_figure():
    class Always(Rule):
        lossless = False

        def decide(self, tree, target_law, coins):
            path = [0, *tree.children(0)[:1]]
            return Decision(path, coins.pick(path[-1], target_law.probs(path[-1])))

    drafter = TabularDrafter(Table(VOCAB, 7), Chain(1))
    out = generate(TabularTarget(VOCAB, 5), torch.tensor(PROMPT), drafter, rule=Always(), trace="ceiling")
    assert out.summary()["divergence"] is None
