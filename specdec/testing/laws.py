"""The exact law of a generated text, by following every coin of the real loop, and the law of the target by itself."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from transformers import PreTrainedModel

from specdec.arguments import as_request, as_stop_tokens
from specdec.checks import as_int, as_ints, check_flag, check_kind
from specdec.coins import Coins
from specdec.drafters import Drafter
from specdec.loop import Decoding
from specdec.models.target import Target
from specdec.processors import Processors
from specdec.rules import Rule, SiblingRejection
from specdec.sampling import Sampling
from specdec.testing.coins import ExactCoins, Script, fractions
from specdec.testing.tables import TabularTarget, Text

_WAVE = 512  # rows enumerated in one batch


@dataclass(frozen=True)
class ExactLaw:
    """The law of a generated text.

    Args:
        probabilities: the probability of each text.
        expected_tokens: the expected number of tokens that the first step emits.
        paths: how many outcomes of all coins were followed.
    """

    probabilities: dict[Text, Fraction]
    expected_tokens: float
    paths: int

    def total_variation(self, other: dict[Text, Fraction]) -> Fraction:
        """Half the sum of absolute differences: 0 if the laws are equal, 1 if no text is possible under both."""
        texts = self.probabilities.keys() | other.keys()
        return (
            sum((abs(self.probabilities.get(t, Fraction(0)) - other.get(t, Fraction(0))) for t in texts), Fraction(0))
            / 2
        )


def exact_law(
    target: PreTrainedModel | Target,
    prompt: Sequence[int],
    drafter: Drafter | None = None,
    *,
    rule: Rule | None = None,
    sampling: Sampling | None = None,
    max_new_tokens: int = 3,
    stop_tokens: Sequence[int] = (),
    merge: bool = True,
) -> ExactLaw:
    """The exact law of what the real loop generates, by following every coin.

    Args:
        target, drafter, rule, sampling, max_new_tokens, stop_tokens: as for `generate`; small vocabularies only.
        prompt: token ids.
        merge: begin a new run from each committed text, so that equal texts are followed once. False follows whole runs,
            which takes far longer, and also finds state that leaks from step to step.
    """
    rule = SiblingRejection() if rule is None else rule
    sampling = Sampling(temperature=1.0) if sampling is None else sampling
    for name, part, kind in (("drafter", drafter, (Drafter, type(None))), ("sampling", sampling, Sampling)):
        check_kind(name, part, kind)
    prompt, max_new_tokens = as_ints("prompt", prompt), as_int("max_new_tokens", max_new_tokens, 1)
    check_flag("merge", merge)
    ended: dict[Text, Fraction] = defaultdict(Fraction)
    open_texts: dict[Text, Fraction] = {(): Fraction(1)}
    paths, expected = 0, Fraction(0)
    while open_texts:
        text = min(open_texts, key=len)
        mass, budget = open_texts.pop(text), max_new_tokens - len(text)
        outcomes = _enumerate(target, [*prompt, *text], drafter, rule, sampling, budget, stop_tokens, merge)
        for emitted, stopped, probability in outcomes:
            paths += 1
            expected += probability * len(emitted) * (not text)
            into = ended if stopped else open_texts
            into[text + emitted] = into.get(text + emitted, Fraction(0)) + mass * probability
    return ExactLaw(dict(ended), float(expected), paths)


def _enumerate(
    target, prompt, drafter, rule, sampling, budget, stop_tokens, one_step
) -> Iterable[tuple[Text, bool, Fraction]]:
    """(tokens, ended, probability) of every outcome of one step, or of the whole run."""
    queue: list[list[int]] = [[]]
    # Over several steps, a row's drafts may be deeper because other rows have larger budgets.
    wave = _WAVE if one_step and (drafter is None or drafter.spec(sampling).by_row) else 1
    while queue:
        scripts, queue = [Script(choices) for choices in queue[:wave]], queue[wave:]
        coins: list[ExactCoins] = []

        def build(batch: int, nodes: int, scripts=scripts, coins=coins) -> Coins:
            coins.append(ExactCoins(scripts, nodes))
            return coins[0]

        prompts = [torch.tensor(prompt)] * len(scripts)
        settings = {"rule": rule, "sampling": sampling, "max_new_tokens": budget, "stop_tokens": stop_tokens}
        with Decoding(replace(as_request(target, prompts, drafter, **settings), coins=build)) as run:
            run.step()
            while not (one_step or run.finished):
                coins[0].ended = [not going for going in run.running]
                run.step()
        for emitted, going, script in zip(run.emitted, run.running, scripts, strict=True):
            yield tuple(emitted), not going, script.probability
            queue += script.branches


def exact_law_in_slots(
    target: PreTrainedModel | Target,
    prompts: Sequence[Sequence[int]],
    drafter: Drafter | None = None,
    *,
    batch_size: int,
    rule: Rule | None = None,
    sampling: Sampling | None = None,
    max_new_tokens: int | Sequence[int] = 2,
    stop_tokens: Sequence[int] = (),
) -> dict[tuple[Text, ...], Fraction]:
    """The exact law of the texts of all prompts together, where texts enter rows that others have left.

    Whole runs are followed, so that all that leaks from text to text is found. Texts do not depend on each other, so it is the
    product of the laws of `target_law`.

    Args:
        target, drafter, rule, sampling, max_new_tokens, stop_tokens: as for `exact_law`; budgets may be one per prompt.
        prompts: token ids.
        batch_size: how many texts are at work at once.
    """
    settings = {"rule": SiblingRejection() if rule is None else rule, "max_new_tokens": max_new_tokens}
    settings |= {"sampling": Sampling(temperature=1.0) if sampling is None else sampling, "stop_tokens": stop_tokens}
    texts = [torch.tensor(as_ints(f"prompts[{i}]", prompt)) for i, prompt in enumerate(prompts)]
    law: dict[tuple[Text, ...], Fraction] = defaultdict(Fraction)
    queue: list[list[int]] = [[]]
    while queue:
        script = Script(queue.pop())

        def build(rows: int, nodes: int, script=script) -> Coins:
            return ExactCoins([script] * rows, nodes)

        with Decoding(
            replace(as_request(target, texts, drafter, batch_size=batch_size, **settings), coins=build)
        ) as run:
            while not run.finished:
                coins = run.runs.coins
                assert isinstance(coins, ExactCoins)
                coins.ended = [not going for going in run.running]
                run.step()
        law[tuple(map(tuple, run.emitted))] += script.probability
        queue += script.branches
    return dict(law)


def target_law(
    target: PreTrainedModel | TabularTarget,
    prompt: Sequence[int],
    *,
    sampling: Sampling | None = None,
    max_new_tokens: int = 3,
    stop_tokens: Sequence[int] = (),
) -> dict[Text, Fraction]:
    """The law of the target by itself: the product of its laws after every prefix, without the loop."""
    sampling = Sampling(temperature=1.0) if sampling is None else sampling
    check_kind("target", target, (PreTrainedModel, TabularTarget), "pass a transformers model or a TabularTarget")
    check_kind("sampling", sampling, Sampling)
    vocab = target.config.get_text_config().vocab_size if isinstance(target, PreTrainedModel) else target.vocab
    prompt, max_new_tokens = as_ints("prompt", prompt, 0), as_int("max_new_tokens", max_new_tokens, 1)
    stop_tokens = as_stop_tokens(stop_tokens, None, vocab)
    ended: dict[Text, Fraction] = defaultdict(Fraction)
    # from a text to its probability, and the processors before they are called for it
    open_texts: dict[Text, tuple[Fraction, Processors]] = {(): (Fraction(1), Processors(sampling.processors))}
    while open_texts:
        text, (mass, processors) = open_texts.popitem()
        tokens = torch.tensor([*prompt, *text])
        if isinstance(target, PreTrainedModel):
            with torch.inference_mode():
                scores = target(input_ids=tokens[None], use_cache=False).logits[:, -1]
        else:
            scores = target.logits(tuple(tokens.tolist()))[None]
        scores, processors = processors(tokens, scores)
        weights = fractions(sampling.probabilities(scores)[0].double().numpy())
        total = sum(weights)
        for token, weight in enumerate(weights):
            if weight:
                longer = (*text, token)
                done = token in stop_tokens or len(longer) == max_new_tokens
                share = mass * weight / total
                if done:
                    ended[longer] = share
                else:
                    open_texts[longer] = share, processors
    return dict(ended)
