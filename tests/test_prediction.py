"""Where steps begin, given the text: proved by enumerating all texts and coins. What is known of a text is what models say."""

from collections import defaultdict
from fractions import Fraction

import numpy as np
import pytest
import torch
from block_nets import NORMS, config, drawn, dspark
from block_nets import target as block_target
from tiny_models import llama
from transformers import RepetitionPenaltyLogitsProcessor

from specdec import Law, Sampling, generate
from specdec.drafters import Eagle3Drafter, Eagle3Net, LayerSkipDrafter, ModelDrafter
from specdec.drafters.dspark import DSparkDrafter
from specdec.prediction import NotForetold, Text, acceptance_length, read_along, texts
from specdec.rules import BlockVerification, KSeq, LenientRejection, SiblingRejection, TraversalVerification
from specdec.testing import Table, TabularDrafter, TabularTarget, model_log_probs, target_law
from specdec.testing.laws import _enumerate
from specdec.trees import Chain, Static, Widths

torch.set_num_threads(1)

EXACT = 1e-12  # sums of float64
PROMPT, STOP, HORIZON = (0, 1), (2,), 4
TARGET, DRAFT = (
    TabularTarget(3, 11),
    Table(3, 3),
)  # chosen: on many tables the rules accept the same of such small trees
TOP = Law.SAMPLED_THEN_TOP
CHAIN, STAR = [-1, 0, 1, 2], [-1, 0, 0]
UNEVEN, MIRRORED = [-1, 0, 0, 2, 3, 1], [-1, 0, 0, 1, 3, 2]  # below the second child there is more, or the first
RULES = [SiblingRejection(), BlockVerification(), TraversalVerification()]


def begun(drafter, rule, sampling, target=TARGET, horizon=HORIZON):
    """{text so far: the probability that a run has written it and begins a step there}, every coin followed."""
    found, waiting = {}, {(): Fraction(1)}
    while waiting:
        text = min(waiting, key=len)
        found[text] = mass = waiting.pop(text)
        steps = _enumerate(target, [*PROMPT, *text], drafter, rule, sampling, horizon - len(text), STOP, True)
        for emitted, stopped, probability in steps:
            if not stopped:
                waiting[text + emitted] = waiting.get(text + emitted, 0) + mass * probability
    return found


def expected(parents, rule, law, sampling):
    """The same from the target's texts."""
    found = defaultdict(float)
    written = target_law(TARGET, PROMPT, sampling=sampling, max_new_tokens=HORIZON, stop_tokens=STOP)
    for tokens, probability in written.items():
        before = [(*PROMPT, *tokens[:place]) for place in range(len(tokens))]
        target, draft = (torch.stack([table.logits(text) for text in before]) for table in (TARGET, DRAFT))
        text = Text(list(tokens), sampling.probabilities(target), draft, sampling)
        for place, chance in enumerate(text.starts(Static(parents, law), rule)):
            found[tokens[:place]] += float(probability) * chance
    return found


def largest_difference(a, b):
    return max(abs(float(a.get(text, 0)) - float(b.get(text, 0))) for text in {*a, *b})


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.7, top_k=2)], ids=str)
@pytest.mark.parametrize(
    "parents, law", [(CHAIN, TOP), (STAR, Law.POINT), (STAR, Law.IID), (UNEVEN, TOP), (UNEVEN, Law.IID)]
)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_steps_begin_where_those_of_all_runs_do(rule, parents, law, sampling):
    if isinstance(rule, BlockVerification) and parents != CHAIN:
        return
    run = begun(TabularDrafter(DRAFT, Static(parents, law)), rule, sampling)
    assert largest_difference(run, expected(parents, rule, law, sampling)) < EXACT


def test_children_that_cannot_be_drawn_leave_those_after_them_in_their_places():
    """Of two possible tokens, both are in the top: there is no sampled child, and the next is still the second."""
    parents, sampling = [-1, 0, 0, 0, 2], Sampling(1.0, top_k=2)
    run = begun(TabularDrafter(DRAFT, Static(parents, TOP)), SiblingRejection(), sampling)
    assert largest_difference(run, expected(parents, SiblingRejection(), TOP, sampling)) < EXACT


@pytest.mark.parametrize("other, parents", [(BlockVerification(), CHAIN), (TraversalVerification(), UNEVEN)])
def test_another_rule_begins_its_steps_elsewhere(other, parents):
    run = begun(TabularDrafter(DRAFT, Static(parents, TOP)), SiblingRejection(), Sampling(1.0))
    assert largest_difference(run, expected(parents, other, TOP, Sampling(1.0))) > 1e-3


def test_another_order_of_the_children_begins_its_steps_elsewhere():
    run = begun(TabularDrafter(DRAFT, Static(UNEVEN, TOP)), SiblingRejection(), Sampling(1.0))
    assert largest_difference(run, expected(MIRRORED, SiblingRejection(), TOP, Sampling(1.0))) > 1e-3


@pytest.mark.parametrize("rule", RULES[::2], ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("widths, parents", [((1, 1, 1), [-1, 0, 1, 2]), ((3, 2), [-1, 0, 0, 0, 1, 1, 2, 2, 3, 3])])
def test_greedy_steps_are_those_of_the_run(widths, parents, rule):
    target, draft, lengths = TabularTarget(5, 3), Table(5, 6), []
    for prompt in torch.arange(16).remainder(5).view(-1, 2):
        options = {"max_new_tokens": 12, "stop_tokens": (4,)}
        [text] = texts(target, TabularDrafter(draft, Chain(1)), prompt, 1, **options)
        run = generate(target, prompt, TabularDrafter(draft, Widths(widths)), rule=rule, **options)
        emitted = [step.emitted[0] for step in run.trace.steps]
        assert text.tokens == run.tokens[0].tolist()
        assert text.starts(Widths(widths), rule).nonzero()[0].tolist() == np.cumsum([0, *emitted[:-1]]).tolist()
        assert acceptance_length([text], Static(parents), rule) == run.summary()["acceptance_length"]
        lengths += emitted
    assert max(lengths) > 1


@pytest.mark.parametrize(
    "parents, law, rule", [(CHAIN[:3], TOP, BlockVerification()), ([-1, 0, 0, 1], TOP, SiblingRejection())]
)
@pytest.mark.parametrize("kind", ["features", "blocks", "layers"])
def test_steps_of_drafters_in_the_target_begin_where_those_of_all_runs_do(kind, parents, law, rule):
    """Their laws depend on where a step began: on their own outputs since then, or on the place in a block."""
    target, one = block_target(), Sampling(1.0)
    torch.manual_seed(1)
    made = {
        "features": lambda tree: Eagle3Drafter(drawn(Eagle3Net(config(1), (0, 1, 2), 16, 4)), tree),
        "blocks": lambda tree: DSparkDrafter(dspark(), tree),
        "layers": lambda tree: LayerSkipDrafter(skip=[1], tree=tree),
    }
    drafter = made[kind](Static(parents, law))
    written = target_law(target, PROMPT, sampling=one, max_new_tokens=3, stop_tokens=STOP)
    found = defaultdict(float)
    for tokens, probability in written.items():
        text = read_along(target, drafter, torch.tensor([*PROMPT, *tokens]), 2, one)
        for place, chance in enumerate(text.starts(Static(parents, law), rule)):
            found[tokens[:place]] += float(probability) * chance
    run = begun(drafter, rule, one, target, 3)
    assert len(run) >= 5 and largest_difference(run, found) < NORMS


@pytest.mark.parametrize("longest", [1, 6])
def test_what_is_known_of_a_text_is_what_the_models_say(longest):
    sampling, prompt = Sampling(0.8, top_k=20), torch.tensor([3, 4, 3])
    target, draft = llama(0), llama(1)
    found = texts(
        target,
        ModelDrafter(draft),
        prompt,
        6,
        sampling=sampling,
        max_new_tokens=longest,
        stop_tokens=range(25),
    )
    assert len(found) == 6 and (longest == 1 or len({len(text.tokens) for text in found}) > 1)
    for text in found:
        tokens = torch.tensor(text.tokens)
        for model, law in ((target, text.target), (draft, sampling.probabilities(text.draft))):
            assert law.numpy() == pytest.approx(
                model_log_probs(model, sampling)(prompt, tokens).exp().numpy(), abs=EXACT
            )


def test_sampled_texts_differ():
    sampling, prompt = Sampling(1.0), torch.tensor(PROMPT)
    found = texts(
        TARGET, TabularDrafter(DRAFT, Chain(1)), prompt, 5, sampling=sampling, max_new_tokens=8, stop_tokens=()
    )
    assert len({tuple(text.tokens) for text in found}) == 5


@pytest.mark.parametrize(
    "rule, parents, law, cure",
    [
        (KSeq(), STAR, Law.IID, "SiblingRejection, BlockVerification, TraversalVerification"),
        (LenientRejection(0.5), CHAIN, Law.IID, "SiblingRejection, BlockVerification, TraversalVerification"),
        (SiblingRejection(), STAR, Law.WITHOUT_REPLACEMENT, "SAMPLED_THEN_TOP, IID or POINT"),
        (BlockVerification(), STAR, TOP, "TraversalVerification"),
    ],
)
def test_what_cannot_be_said_of_a_text_is_refused_with_the_cure(rule, parents, law, cure):
    [text] = texts(
        TARGET, TabularDrafter(DRAFT, Chain(1)), torch.tensor(PROMPT), 1, sampling=Sampling(1.0), max_new_tokens=2
    )
    with pytest.raises(ValueError, match=cure):
        text.starts(Static(parents, law), rule)


def test_laws_of_drafters_in_the_target_are_not_told_with_logits_processors():
    sampling = Sampling(processors=[RepetitionPenaltyLogitsProcessor(1.5)])
    known = [llama(0), torch.arange(3, 9), 4, sampling]
    with pytest.raises(NotForetold, match=r"Logits processors change the laws of LayerSkipDrafter.*run it instead"):
        read_along(known[0], LayerSkipDrafter(exit_layer=1), *known[1:])
    assert len(read_along(known[0], ModelDrafter(llama(1)), *known[1:]).tokens) == 2
