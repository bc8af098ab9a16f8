"""Proofs by enumeration: every coin of the real loop is followed both ways, and the laws are compared exactly.

>>> specdec.testing.assert_lossless(MyRule())            # any rule, on the standard battery
>>> law = specdec.testing.exact_law(target, prompt, drafter, max_new_tokens=3)  # any small target and drafter
>>> print(specdec.testing.audit(generate, log_probs))  # samples of real models instead; see `specdec.audit`
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.audit import Audit, audit, model_log_probs  # noqa: F401 - used from here
from specdec.coins import Coins, Purpose, RowCoins
from specdec.decoding import Decoding
from specdec.drafters import Context, Drafter, NgramDrafter
from specdec.drafters.drafter import Acceptance
from specdec.generate import generate
from specdec.rules import Rule, SiblingRejection
from specdec.sampling import Sampling
from specdec.target import Target
from specdec.tree import DraftTree, Law, TreeSpec
from specdec.trees import Chain, Dynamic, Frontier, TreePolicy, Widths
from specdec.trees.policy import drive

Text = tuple[int, ...]
_WAVE = 512  # rows enumerated in one batch


class ExactCoins(Coins):
    """Coins that follow every outcome: each row of the batch replays one script of choices and notes its siblings.

    A coin is a uniform number whose interval narrows with every question asked of it, so a coin that is used twice is
    followed as what it is, one number.
    """

    enumerates = True

    def __init__(self, scripts: list[list[int]], nodes: int):
        super().__init__(0, len(scripts), nodes)
        self.scripts = scripts
        self.probabilities = [Fraction(1)] * len(scripts)
        self.branches: list[list[int]] = []
        self.ended = [False] * len(scripts)  # rows whose text is finished: their coins decide nothing any more
        self._place = [0] * len(scripts)
        self._intervals: dict[tuple, tuple[Fraction, Fraction]] = {}

    def turn_to(self, step: int) -> None:
        self.step = step  # there is nothing to show

    def flip(self, row: int, purpose: Purpose, node: int, weights: Sequence[Fraction]) -> int:
        """The outcome of one coin, by inverse CDF of `weights` in index order."""
        key = (row, self.step, purpose, node)
        low, high = self._intervals.get(key, (Fraction(0), Fraction(1)))
        outcomes, edge, total = [], Fraction(0), sum(weights)
        for index, weight in enumerate(weights):
            if weight == 0:
                continue
            start, edge = edge, edge + (weight if total == 1 else weight / total)
            if start < high and low < edge:
                outcomes.append((index, max(start, low), min(edge, high)))
        if self.ended[row]:
            return outcomes[0][0]
        choice = self._choice(row, len(outcomes))
        if choice >= len(outcomes):
            raise AssertionError("The same coins led to other choices: draw with `coins` only, nothing else is random.")
        index, start, edge = outcomes[choice]
        self._intervals[key] = (start, edge)
        self.probabilities[row] *= (edge - start) / (high - low)
        return index

    def picks(self, nodes: range, weights: Tensor) -> Tensor:
        rows = weights.double().numpy(force=True)
        drawn = [
            [
                self.flip(b, Purpose.DRAFT, node, w) if any(w := _fractions(rows[b, j])) else 0
                for j, node in enumerate(nodes)
            ]
            for b in range(self.batch)
        ]
        return torch.tensor(drawn, device=weights.device).view(weights.shape[:2])

    def row(self, row: int) -> RowCoins:
        return _ExactRow(self, row)

    def _choice(self, row: int, count: int) -> int:
        if count == 1:
            return 0
        script, place = self.scripts[row], self._place[row]
        if place == len(script):
            self.branches += [[*script, other] for other in range(1, count)]
            self.scripts[row] = script = [*script, 0]
        self._place[row] += 1
        return script[place]


class _ExactRow(RowCoins):
    _coins: ExactCoins

    def accept(self, node: int, probability: Any) -> bool:
        p = min(Fraction(probability), Fraction(1))
        return self._coins.flip(self._row, Purpose.ACCEPT, node, [p, 1 - p]) == 0

    def pick(self, node: int, probabilities: Any, purpose: Purpose = Purpose.EMIT) -> int:
        return self._coins.flip(self._row, purpose, node, list(probabilities))

    def law(self, weights: np.ndarray) -> np.ndarray:
        return np.array(_exact(np.asarray(weights, dtype=np.float64).tobytes()), dtype=object)


@dataclass(frozen=True)
class ExactLaw:
    """The law of a generated text."""

    probabilities: dict[Text, Fraction]
    expected_tokens: float  # tokens emitted by the first step
    paths: int  # outcomes of all coins that were followed

    def total_variation(self, other: dict[Text, Fraction]) -> Fraction:
        """Half the summed absolute difference: 0 when the laws are the same, 1 when they exclude each other."""
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
        merge: start anew from each committed text, so that equal texts are followed once. False follows whole runs,
            which takes far longer and also sees state that leaks from step to step.
    """
    options = (rule or SiblingRejection(), sampling or Sampling(temperature=1.0))
    ended: dict[Text, Fraction] = defaultdict(Fraction)
    open_texts: dict[Text, Fraction] = {(): Fraction(1)}
    paths, expected = 0, Fraction(0)
    while open_texts:
        text = min(open_texts, key=len)
        mass, budget = open_texts.pop(text), max_new_tokens - len(text)
        outcomes = _enumerate(target, [*prompt, *text], drafter, *options, budget, stop_tokens, merge)
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
    # over several steps a row's drafts may be deeper for the sake of other rows
    wave = _WAVE if one_step and (drafter is None or drafter.spec(sampling).by_row) else 1
    while queue:
        scripts, queue = queue[:wave], queue[wave:]
        coins: list[ExactCoins] = []

        def build(batch: int, nodes: int, scripts=scripts, coins=coins) -> Coins:
            coins.append(ExactCoins(scripts, nodes))
            return coins[0]

        prompts = [torch.tensor(prompt)] * len(scripts)
        run = Decoding(
            target,
            prompts,
            drafter,
            rule=rule,
            sampling=sampling,
            max_new_tokens=budget,
            stop_tokens=stop_tokens,
            coins=build,
        )
        acceptance = run.step()
        while not (one_step or run.finished):
            coins[0].ended = acceptance.stopped
            acceptance = run.step()
        for emitted, stopped, probability in zip(run.emitted, acceptance.stopped, coins[0].probabilities, strict=True):
            yield tuple(emitted), stopped, probability
        queue += coins[0].branches


def target_law(
    target: PreTrainedModel | TabularTarget,
    prompt: Sequence[int],
    *,
    sampling: Sampling | None = None,
    max_new_tokens: int = 3,
    stop_tokens: Sequence[int] = (),
) -> dict[Text, Fraction]:
    """The law that the target has by itself: the product of its laws after every prefix, without the loop."""
    sampling = sampling or Sampling(temperature=1.0)
    ended: dict[Text, Fraction] = defaultdict(Fraction)
    open_texts: dict[Text, Fraction] = {(): Fraction(1)}
    while open_texts:
        text, mass = open_texts.popitem()
        tokens = torch.tensor([*prompt, *text])
        if isinstance(target, PreTrainedModel):
            with torch.inference_mode():
                scores = target(input_ids=tokens[None], use_cache=False).logits[:, -1]
        else:
            scores = target.logits(tuple(tokens.tolist()))[None]
        for processor in sampling.processors:
            scores = processor(tokens[None], scores.clone())
        weights = _fractions(sampling.probabilities(scores)[0].double().numpy())
        total = sum(weights)
        for token, weight in enumerate(weights):
            if weight:
                longer = (*text, token)
                done = token in stop_tokens or len(longer) == max_new_tokens
                (ended if done else open_texts)[longer] = mass * weight / total
    return dict(ended)


class Table:
    """A random law for every text: context-dependent logits [vocab] float64, a function of (seed, text)."""

    def __init__(self, vocab: int, seed: int = 0):
        self.vocab, self.seed = vocab, seed
        self._known: dict[Text, Tensor] = {}

    def logits(self, text: Text) -> Tensor:
        """[vocab] float64 logits after `text`."""
        if text not in self._known:
            self._known[text] = torch.from_numpy(np.random.default_rng([self.seed, *text]).normal(0, 1.5, self.vocab))
        return self._known[text]


class TabularTarget(Table, Target):
    """A target that is a table."""

    context_length = None
    device = torch.device("cpu")

    def start(self, context: Context, capacity: int, hidden: bool) -> None: ...

    def score(self, tree: DraftTree, context: Context) -> Tensor:
        texts = _paths(context.texts, tree.tokens, tree.topology.ancestors)
        return torch.stack([torch.stack([self.logits(text) for text in row]) for row in texts])

    def commit(self, acceptance: Acceptance) -> None: ...


class TabularDrafter(Drafter):
    """A drafter that is a table, growing any tree."""

    def __init__(self, table: Table, tree: TreePolicy):
        self.table, self.tree = table, tree

    def spec(self, sampling: Sampling) -> TreeSpec:
        return self.tree.spec(sampling)

    def propose(self, context: Context, coins: Coins) -> DraftTree:
        asked: list[Tensor] = []

        def score(frontier: Frontier) -> Tensor:
            asked.append(frontier.tokens)
            texts = _paths(context.texts, torch.cat(asked, 1), frontier.topology.ancestors)
            count = frontier.tokens.shape[1]
            return torch.stack([torch.stack([self.table.logits(text) for text in row[-count:]]) for row in texts])

        return drive(self.tree.grow(context, coins), score).tree

    def commit(self, acceptance: Acceptance) -> None:
        self.tree.commit(acceptance)


def assert_lossless(
    rule: Rule, *, drafters: Sequence[Drafter] | None = None, vocab: int = 3, max_new_tokens: int = 3
) -> None:
    """Raise AssertionError unless `rule` is exact on every combination of the standard battery that it admits.

    The battery: chains, IID, without-replacement, sampled-then-top and dynamic trees and n-grams, at temperatures 0.7
    and 1 and with top-k and top-p, with and without a stop token. `drafters` replaces those of the battery.
    """
    name, admitted, refusal, prompt = type(rule).__name__, 0, None, (0, 1, 0)
    assert rule.lossless, (
        f"{name} does not claim to be lossless (`lossless` is False), so there is nothing to assert: "
        "exact_law(...).total_variation(target_law(...)) measures how far it is off."
    )
    for seed, sampling, drafter in _battery(vocab, drafters):
        try:
            rule.check(drafter.spec(sampling))
        except ValueError as error:
            refusal = error
            continue
        admitted += 1
        depth = 0 if drafters else drafter.spec(sampling).depth
        options: dict[str, Any] = {
            "sampling": sampling,
            "max_new_tokens": max(max_new_tokens, depth + 1),
            "stop_tokens": (vocab - 1,),
        }
        target = TabularTarget(vocab, seed)
        law = exact_law(target, prompt, drafter, rule=rule, **options)
        distance = law.total_variation(target_law(target, prompt, **options))
        what = f"{type(drafter).__name__}({getattr(drafter, 'tree', '')}) under {sampling}"
        assert distance == 0, f"{name} is not lossless: total variation {float(distance):.3g} with {what}"
    assert admitted, f"{name} refuses every drafter of the battery: {refusal}"


def _battery(vocab: int, drafters: Sequence[Drafter] | None) -> Iterable[tuple[int, Sampling, Drafter]]:
    """(seed of the target, sampling, drafter)."""
    sampled = (Law.IID, Law.WITHOUT_REPLACEMENT, Law.SAMPLED_THEN_TOP)
    wide = [Chain(2), *(Widths((2, 1), law) for law in sampled)]
    deep = [Chain(3), *(Widths((1, 2), law) for law in sampled)]  # siblings below a node that may not be reached
    # Seeds are chosen: a wrong residual inside a block shows only where the target's law, times a chance of acceptance
    # below 1, still exceeds the draft's somewhere. On many tables (target 0, draft 1 among them) it nowhere does.
    for seed, sampling, trees in (
        (8, Sampling(0.7), deep),
        (2, Sampling(1.0), wide),
        (2, Sampling(1.0, top_k=2), wide + deep),
        (2, Sampling(1.0, top_p=0.8), wide + deep),
    ):
        table = Table(vocab, seed + 1)
        standard = [*(TabularDrafter(table, tree) for tree in [*trees, Dynamic(5, 2, 2)]), NgramDrafter(2)]
        for drafter in drafters or standard:
            yield seed, sampling, drafter


def _fractions(weights: np.ndarray) -> list[Fraction]:
    return [Fraction(float(w)) for w in weights]


@lru_cache(maxsize=2**14)
def _exact(weights: bytes) -> tuple[Fraction, ...]:
    """Float64 weights normalised; kept, because all rows of a wave ask for the laws after the same few texts."""
    exact = _fractions(np.frombuffer(weights))
    total = sum(exact)
    return tuple(weight / total for weight in exact)


def _paths(prefixes: list[list[int]], tokens: Tensor, ancestors: Tensor) -> list[list[Text]]:
    """The text up to each node of each row; prefixes end in the root."""
    rows = []
    for prefix, row, reach in zip(prefixes, tokens.tolist(), ancestors.tolist(), strict=True):
        rows.append(
            [(*prefix, *(t for t, on_path in zip(row[1:], line[1:], strict=True) if on_path)) for line in reach]
        )
    return rows


def assert_drafter(
    drafter: Drafter,
    target: PreTrainedModel | TabularTarget,
    prompts: Sequence[Sequence[int]],
    *,
    samplings: Sequence[Sampling] = (Sampling(1.0), Sampling(0.7, top_k=2)),
    max_new_tokens: int = 3,
    horizon: int = 12,
    tolerance: float = 1e-12,
) -> None:
    """Raise AssertionError unless `drafter` keeps its contract with `target`.

    The text's law is the target's, every coin followed: laws are recorded truthfully, and growth does not anticipate. The
    greedy text is the target's. A row's text does not depend on the other rows. After any acceptance, and in a second
    run, drafts are those of a fresh start from the same text.

    Args:
        drafter: what is examined.
        target: with a vocabulary of two to four tokens, and in float64 if it is a model.
        prompts: at least two, of different lengths; the first is enumerated.
        samplings: under which the law is enumerated.
        max_new_tokens: how far it is enumerated.
        horizon: new tokens of the greedy and the batched runs.
        tolerance: largest total variation; what float64 logits of one text differ between shapes of a batch.
    """
    texts = [torch.tensor(prompt) for prompt in prompts]
    for sampling in samplings:
        options: dict[str, Any] = {"sampling": sampling, "max_new_tokens": max_new_tokens}
        law = exact_law(target, prompts[0], drafter, **options)
        distance = float(law.total_variation(target_law(target, prompts[0], **options)))
        assert distance <= tolerance, f"{drafter} changes the law of the text by {distance:.3g} under {sampling}."
        options = {"sampling": sampling, "max_new_tokens": horizon, "stop_tokens": ()}
        alone = generate(target, texts[0], drafter, **options).tokens[0]
        together = generate(target, texts, drafter, **options).tokens[0]
        assert torch.equal(alone, together), (
            f"{drafter}: the text of a row depends on the other rows, under {sampling}."
        )
    _assert_greedy(drafter, target, texts, horizon)


def _assert_greedy(drafter: Drafter, target: PreTrainedModel | Target, texts: list[Tensor], horizon: int) -> None:
    """Greedy, no coin is drawn: the same text must lead to the same draft, whatever came before."""
    for text in texts:
        listening = _Listening(drafter)
        options: dict[str, Any] = {"max_new_tokens": horizon, "stop_tokens": ()}
        found = generate(target, text, listening, **options).tokens[0]
        expected = generate(target, text, **options).tokens[0]
        assert torch.equal(found, expected), f"{drafter}: the greedy text {found.tolist()} is not {expected.tolist()}."
        for so_far, tokens in listening.drafts:
            fresh, left = _Listening(drafter), len(text) + horizon - len(so_far)
            generate(target, torch.tensor(so_far), fresh, max_new_tokens=left, stop_tokens=())
            assert fresh.drafts[0][1] == tokens, (
                f"{drafter} drafts {tokens} after {so_far}, and {fresh.drafts[0][1]} afresh."
            )


class _Listening(Drafter):
    """Another drafter, and what it drafted for the first row: (text so far, tokens)."""

    def __init__(self, drafter: Drafter):
        self.drafter, self.uses_hidden = drafter, drafter.uses_hidden
        self.drafts: list[tuple[list[int], list[int]]] = []
        self.start, self.commit, self.patched = drafter.start, drafter.commit, drafter.patched

    def spec(self, sampling: Sampling) -> TreeSpec:
        return self.drafter.spec(sampling)

    def propose(self, context: Context, coins: Coins) -> DraftTree:
        tree = self.drafter.propose(context, coins)
        kept = tree.laws[0] != Law.PADDING
        self.drafts.append((list(context.texts[0]), tree.tokens[0, kept].tolist()))
        return tree
