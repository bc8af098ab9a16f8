"""The loop: propose, score, decide, commit. Chains, greedy decoding and batches of one are not special cases."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from specdec.batch import Batch
from specdec.checks import check_kind, check_logits
from specdec.clock import Clock, finish
from specdec.drafters.paused import Paused
from specdec.models.target import Scores
from specdec.outcome import Outcome
from specdec.request import Request
from specdec.runs import Runs
from specdec.slots import Slots
from specdec.target_law import LogitsLaw
from specdec.trace.bill import Bill
from specdec.trace.recorder import Recorder
from specdec.trace.trace import Trace
from specdec.tree import DraftTree


class Decoding:
    """A run in progress.

    >>> with Decoding(as_request(target, prompts, drafter)) as run:
    ...     for outcome in run.steps():
    ...         print(outcome.emitted)
    """

    def __init__(self, request: Request):
        self.request, self._reasons = request, request.reasons()
        self.slots = Slots(request)
        finish(request.target.device)
        self.recorder = Recorder(request, time.perf_counter() - request.began)
        # Drafts that pause while they do not pay need no warning.
        paused = request.spec.by_clock or isinstance(request.drafter, Paused)
        self._bill = None if paused else Bill()

    @property
    def runs(self) -> Runs:
        """What the run owns now."""
        return self.slots.runs

    @property
    def batch(self) -> Batch:
        """The texts at work."""
        return self.slots.runs.batch

    def steps(self) -> Iterator[Outcome]:
        """Step by step to the end. Raise ValueError as soon as the target reads something else in place of a whole text."""
        while not self.finished:
            yield self.step()

    def step(self) -> Outcome:
        """One round for every row: propose, score, decide, commit. Before it, free rows are given to the texts that wait."""
        clock = Clock(self.request.target.device)
        self.slots.fill()
        clock.mark()
        perform = partial(self.batch.stages.perform, None)
        with torch.inference_mode():
            tree = perform(self._propose, self._reasons["propose"])
            clock.mark()
            scores = perform(self._score, self._reasons["score"], tree)
            clock.mark()
            outcome = perform(self._decide, self._reasons["decide"], tree, scores)
            clock.mark()
            perform(self._commit, self._reasons["commit"], outcome, scores)
            clock.mark()
        self._note(tree, outcome, clock)
        return outcome

    def _propose(self) -> DraftTree:
        """The drafter's trees, without nodes beyond the budgets."""
        tree = self.runs.drafter.propose(self.runs.coins)
        check_kind(f"what {type(self.runs.drafter).__name__} proposed", tree, DraftTree)
        tree.check(self.request.spec, len(self.batch), self.batch.max_depth, self.batch.vocab)
        if self.request.engine.static_shapes:
            tree = tree.padded(self.request.spec)
        return self.batch.within_budgets(tree)

    def _score(self, tree: DraftTree) -> Scores:
        """The target's logits, and states if the drafter asks for some."""
        vocab = self.batch.vocab
        scores = self.runs.target.score(tree.within(vocab))
        whose = f"{type(self.runs.target).__name__}.score"
        check_kind(f"what {whose} returned", scores, Scores)
        check_logits(whose, scores.logits, "[batch, node, vocab]", (*tree.tokens.shape, vocab))
        return scores

    def _decide(self, tree: DraftTree, scores: Scores) -> Outcome:
        """What the rule accepts, up to stop tokens and budgets. The texts and the target's cache grow by it."""
        batch, rule = self.batch, self.request.rule
        invalid, tree = tree.invalid(batch.root, batch.vocab), tree.within(batch.vocab)
        law = LogitsLaw(scores.logits, tree, batch, rule.top_down and not self.recorder.reads_laws)
        decisions = rule(tree, law, self.runs.coins)
        no_law = law.invalid()
        # before `append`, as logits processors read the texts
        self.recorder.note(tree, law, decisions, self.runs.coins, batch.left)
        if batch.processed:
            batch.processors = law.processors(decisions.last)
        outcome = Outcome.of(tree, decisions, self.runs.stop_tokens, batch.left, (no_law, invalid))
        if self.request.notes:
            known = *law.scores(decisions.path, decisions.accepted), outcome.tokens, batch.sampling
            outcome = replace(outcome, noted=torch.stack([note(*known) for note in self.request.notes], 2))
        batch.append(outcome)
        self.runs.target.commit(outcome)
        return outcome

    def _commit(self, outcome: Outcome, scores: Scores) -> None:
        """Pass the drafter the states of the nodes that were kept, and the outcome."""
        if scores.states is not None:
            path = outcome.path[:, :, None, None].expand(-1, -1, *scores.states.shape[2:])
            start = self.batch.lengths - outcome.keep - 1  # the root is the last token before the new ones
            self.runs.drafter.read(scores.states.gather(1, path), start, outcome.keep)
        self.runs.drafter.commit(outcome)

    def _note(self, tree: DraftTree, outcome: Outcome, clock: Clock) -> None:
        """Bring the outcome to the host: the only time that a step waits for the device."""
        for rows, message in zip(outcome.invalid, (_NO_LAW, _NO_DRAFT), strict=True):
            if rows:
                raise ValueError(message.format(texts=[self.held[row] for row in rows]))
        nodes = tree.tokens.shape[1]
        self.batch.note(outcome)
        self.runs.coins.advance()
        clock.mark()
        enter, draft, verify, decide, commit, end = clock.seconds()
        self.batch.seconds = draft + verify + decide + commit + end
        seconds = (enter, draft + commit, verify, decide + end)
        self.recorder.step(nodes, list(self.slots.held), outcome, seconds)
        if self.request.stopping is not None:
            self.request.stopping.ask(self)
        for text in self.slots.ending_texts():
            self.request.target.check_text(text)
        self.slots.note_step(outcome.notes)
        if self._bill is not None:
            self._bill.note(nodes, self.batch.gained, seconds[1], seconds[2] + seconds[3])

    def end(self, index: int, kept: int) -> None:
        """End a text after the first `kept` >= 1 of its new tokens, whichever steps they came from."""
        beyond = len(self.tokens(index)) - kept
        self.slots.end(index, kept)
        self.trace.cut(index, beyond)

    @property
    def finished(self) -> bool:
        """Whether every text has ended."""
        return self.slots.finished

    @property
    def held(self) -> list[int]:
        """For each row the index of the text in it, which may have ended; -1 while a prompt is being read."""
        return self.slots.held

    @property
    def running(self) -> list[bool]:
        """Whether the text in each row has tokens left to emit: not while its prompt is being read."""
        return [left > 0 for left in self.batch.host_left]

    def tokens(self, index: int) -> list[int]:
        """The new tokens of a text so far."""
        return self.slots.tokens(index).tolist()

    @property
    def emitted(self) -> list[list[int]]:
        """The new tokens of every text so far."""
        return [self.tokens(index) for index in range(self.request.count)]

    @property
    def trace(self) -> Trace:
        """The steps so far."""
        return self.recorder.trace

    def __enter__(self) -> Decoding:
        return self

    def __exit__(self, *_: object) -> None:
        """Hand back what the run owns; it cannot go on after that."""
        self.slots.close()


_NO_LAW = (
    "The target's logits are NaN, or all -inf, at a node that decides text(s) {texts}. Check the model's "
    "weights and dtype (float16 overflows where bfloat16 does not) and the logits processors."
)
_NO_DRAFT = (
    "The drafter proposed trees for text(s) {texts} that cannot have been drawn as they say: node 0 must be the root "
    "(batch.root), tokens must be below batch.vocab, and where laws are sampled, draft_probs must be there, finite, and "
    "positive at the drawn tokens; a TreeDrafter's logits must not be NaN, inf, or -inf for all tokens. NaN comes from the "
    "draft model's weights or dtype (float16 overflows where bfloat16 does not)."
)
