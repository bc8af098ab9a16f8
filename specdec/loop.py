"""The loop: propose, score, decide, follow. Chains, greedy decoding and batches of one are not special cases."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, StopStringCriteria

from specdec.arguments import (
    Prompts,
    as_engine,
    as_prompts,
    as_stop_tokens,
    as_target,
    check_clock,
    check_tokenizer,
)
from specdec.checks import as_int, as_seed, check_kind, check_logits, put
from specdec.clock import Clock, finish
from specdec.coins import Coins
from specdec.drafters.base import Acceptance, Context, Drafter, Report
from specdec.drafters.no_drafter import NoDrafter
from specdec.engines.base import Engine
from specdec.laws import Law
from specdec.models.fingerprint import fingerprint
from specdec.models.probe import autocast_dtype
from specdec.models.target import Scores, Target
from specdec.rules import Decisions, Rule, SiblingRejection
from specdec.sampling import Sampling
from specdec.target_law import LogitsLaw, TargetLaw
from specdec.theory import visits
from specdec.trace.laws import Record
from specdec.trace.trace import LEVELS, Step, Trace
from specdec.tree import DraftTree
from specdec.trees.base import TreePolicy


class Decoding:
    """A run in progress: its state, and the step."""

    def __init__(
        self,
        target: PreTrainedModel | Target,
        prompts: Prompts,
        drafter: Drafter | None = None,
        *,
        rule: Rule = SiblingRejection(),
        sampling: Sampling = Sampling(),
        max_new_tokens: int = 128,
        stop_tokens: Iterable[int] | int | None = None,
        tokenizer: Any = None,
        seed: int = 0,
        trace: str = "summary",
        engine: Engine | str = "eager",
        resume: bool = False,
        coins: Callable[[int, int], Coins] | None = None,  # (batch, nodes) -> Coins, in place of those of the seed
    ):
        began = time.perf_counter()
        if trace not in LEVELS:
            raise ValueError(f"trace={trace!r}: must be one of {', '.join(map(repr, LEVELS))}.")
        self.engine, self.level = as_engine(engine), trace
        self.drafter, self.rule, self.tokenizer = NoDrafter() if drafter is None else drafter, rule, tokenizer
        for name, part, kind in (
            ("drafter", self.drafter, Drafter), ("rule", rule, Rule), ("sampling", sampling, Sampling)
        ):  # fmt: skip
            check_kind(name, part, kind)
        check_kind("resume", resume, bool, "pass True or False")
        check_tokenizer(tokenizer)
        max_new_tokens, self.seed = as_int("max_new_tokens", max_new_tokens, 1), as_seed(seed)
        found = as_target(target, resume)
        given = found if found.kept else found.model
        rows = as_prompts(prompts, tokenizer, found, max_new_tokens)
        sampling, processors = sampling.bind(found.model, rows, max_new_tokens, tokenizer)
        self.spec = self.drafter.spec(sampling)
        rule.check(self.spec)
        check_clock(self.spec, found.model)
        config = sampling.generation_config
        eos, strings = (found.stop_tokens, None) if config is None else (config.eos_token_id, config.stop_strings)
        self._stop_strings = StopStringCriteria(tokenizer, strings) if strings else None
        stop = as_stop_tokens(stop_tokens, eos, found.vocab)
        batch, nodes = len(rows), self.spec.nodes
        longest = max(map(len, rows)) + max_new_tokens
        # slots per row; paths are as long as `depth` says, even where so many nodes are not allowed
        capacity = self.engine.rounded(longest) + max(nodes, self.spec.depth + 1)

        def buffers() -> tuple[Target, Context, Coins, Tensor]:
            context = Context.empty(batch, capacity, found.vocab, found.device)
            flips = coins(batch, nodes) if coins else Coins(self.seed, batch, nodes, found.device)
            return found, context, flips, torch.tensor(stop, dtype=torch.int64, device=found.device)

        parts = (given, drafter, *_made_of(found, self.drafter, rule)) if self.engine.fixed else ()
        signature = (*parts, sampling, self.spec, stop, batch, capacity)
        if any(part.run is not self.engine.run for part in (given, drafter) if isinstance(part, Target | Drafter)):
            self.engine.forget()
        self.target, self.context, self.coins, self.stop_tokens = self.engine.begin(found.device, signature, buffers)
        fixed = self.engine.fixed and self.drafter.capturable
        self.context.begin(rows, longest, sampling, processors, stop, tokenizer, self.engine, fixed, resume)
        self.context.row_depths.fill_(max_new_tokens - 1)
        self.coins.reseed(self.seed)
        self._prompts, self._kept = self.context.host_lengths, [max_new_tokens] * batch
        self._look_ahead([max_new_tokens] * batch)
        self._why_on_host = None if self.drafter.capturable else f"{self.drafter} drafts on the host"
        self._ticket = object()
        self._parts = [self.target, self.drafter, *([self.engine] if self.engine.fixed else [])]
        for part in self._parts:
            put(part, run=self._ticket)
        with torch.inference_mode(), self._patched():
            self.target.start(self.context, capacity, self.drafter.uses_hidden)
            self.drafter.start(self.target, self.context)
        finish(self.target.device)
        self.trace = Trace(prefill_seconds=time.perf_counter() - began)

    def step(self) -> Acceptance:
        """One round for every row: propose, score, decide, follow."""
        for part in self._parts:
            if part.run is not self._ticket:
                raise RuntimeError(_INTERRUPTED.format(part=part))
        run, clock = partial(self.engine.perform, self.context.longest), Clock(self.target.device)
        with torch.inference_mode():
            with self._patched():
                tree = run(self._propose, self._why_on_host)
                clock.mark()
                scores = run(self._score, None if self.target.capturable else f"{self.target} is not capturable", tree)
                clock.mark()
            # unpatched: logits processors may run a model themselves, which is to be as its owner left it
            acceptance = run(self._decide, self._why_not_captured(), tree, scores)
            clock.mark()
            with self._patched():
                run(self._follow, self._why_on_host, acceptance)
            clock.mark()
        self._record(acceptance.report)
        self.coins.turn_to(self.coins.step + 1)
        clock.mark()
        draft, verify, decide, follow, end = clock.seconds()
        report, rows = acceptance.report, [len(row) for row in acceptance.emitted]
        visited = visits(self._noted, report.accepted, report.tried, self.rule) if self.level == "ceiling" else None
        record = self._noted if self.level == "laws" else None
        seconds = draft + follow, verify, decide + end
        step = Step(tree.tokens.shape[1], rows, report.accepted, report.tried, *seconds, visited, record)
        self.trace.steps.append(step)
        if self._stop_strings is not None:
            self._end_at(self._stop_strings)
        return acceptance

    def check_texts(self) -> None:
        """Raise ValueError if the target reads something else in place of a text that has ended: asked of whole texts."""
        for text, prompt, new in zip(self.context.texts, self._prompts, self.emitted, strict=True):
            self.target.check_text(text[: prompt + len(new)])

    def end(self, row: int, kept: int) -> None:
        """End the text of this row with the first `kept` >= 1 of its new tokens, whichever steps gave them."""
        beyond = len(self.emitted[row]) - kept
        self._kept[row] = kept
        for step in reversed(self.trace.steps):
            gone = min(step.emitted[row], beyond)
            if gone <= 0:
                break
            step.cut(row, step.emitted[row] - gone)
            beyond -= gone
        self.context.row_depths[row] = -1
        self._look_ahead((self.context.row_depths + 1).tolist())

    def _end_at(self, strings: StopStringCriteria) -> None:
        """End the rows in whose last tokens a stop string is complete."""
        for row, count in enumerate(self.trace.steps[-1].emitted):
            text = torch.tensor([self.context.texts[row]])
            for beyond in reversed(range(count)):
                if strings(text[:, : text.shape[1] - beyond], None):  # type: ignore[arg-type] - its stub wants LongTensor
                    self.end(row, len(self.emitted[row]) - beyond)
                    break

    @property
    def running(self) -> list[bool]:
        """Rows that have not ended."""
        return [n > 0 for n in self._left]

    @property
    def emitted(self) -> list[list[int]]:
        """Each row's new tokens so far."""
        texts = zip(self.context.texts, self._prompts, self._kept, strict=True)
        return [text[start:][:kept] for text, start, kept in texts]

    def _patched(self) -> ExitStack:
        stack = ExitStack()
        stack.enter_context(self.target.patched())
        stack.enter_context(self.drafter.patched())
        return stack

    def _propose(self) -> DraftTree:
        """The drafter's trees without what is deeper than a row's own budget: its text must not depend on other rows'."""
        context = self.context
        tree = self.drafter.propose(context, self.coins)
        check_kind(f"what {type(self.drafter).__name__} proposed", tree, DraftTree)
        tree.check(self.spec, len(context.lengths), context.max_depth, context.vocab)
        if self.engine.fixed:
            tree = tree.padded(self.spec)
        if self._least > tree.topology.depth:
            return tree
        beyond = tree.topology.depths > context.row_depths[:, None].clamp(min=0)
        return replace(tree, laws=torch.where(beyond, Law.PADDING, tree.laws))

    def _score(self, tree: DraftTree) -> Scores:
        """The target's logits, and states if the drafter uses them."""
        logits = self.target.score(tree.within(self.target.vocab), self.context)
        shape = (*tree.tokens.shape, self.target.vocab)
        check_logits(f"{type(self.target).__name__}.score", logits, "[batch, node, vocab]", shape)
        return Scores(logits, self.target.hidden)

    def _decide(self, tree: DraftTree, scores: Scores) -> Acceptance:
        """What is accepted, and appended to the text."""
        logits, self.target.hidden = scores  # a graph replay writes into these tensors: restore them
        invalid, tree = tree.invalid(self.context.root, self.context.vocab), tree.within(self.context.vocab)
        top_down = self.rule.top_down and self.level == "summary"  # a trace looks at every law
        law = LogitsLaw(logits, tree, self.context, top_down)
        decisions = self.rule(tree, law, self.coins)
        no_law = law.invalid()
        if self.level != "summary":
            self._noted = self._note(law, tree, decisions)  # now: processors read the text so far
        if self.context.processed:
            self.context.processors = law.processors(decisions.last)
        acceptance = self._accept(tree, decisions, no_law, invalid)
        self.target.commit(acceptance)
        return acceptance

    def _note(self, law: TargetLaw, tree: DraftTree, decisions: Decisions) -> Record:
        run = {"seed": self.seed, "step": self.coins.step, "spec": self.spec, "stop_tokens": self.stop_tokens}
        return Record.of(tree, law, decisions, **run, budget=self.context.row_depths + 1)

    def _follow(self, acceptance: Acceptance) -> None:
        self.drafter.commit(acceptance)

    def _why_not_captured(self) -> str | None:
        """What in `_decide` is for the host."""
        if self.level != "summary":
            return f"trace={self.level!r} looks at every law"
        if self.context.processed:
            return "logits processors depend on the text"
        return None if self.rule.capturable else f"{type(self.rule).__name__} decides on the host"

    def _accept(self, tree: DraftTree, decisions: Decisions, *invalid: Tensor) -> Acceptance:
        """Cut the decisions at stop tokens and budgets and append what is left to the text."""
        context, budget = self.context, self.context.row_depths + 1
        cut = decisions.cut(tree, self.stop_tokens, budget)
        place = torch.arange(cut.tokens.shape[1], device=cut.tokens.device)
        context.tokens.scatter_(1, context.lengths[:, None] + place, cut.tokens)
        context.lengths += cut.count
        context.row_depths.copy_(cut.left - 1)
        columns = (cut.count, cut.accepted, cut.tried, cut.left, *invalid)
        report = Report(torch.cat([cut.tokens, *(column[:, None] for column in columns)], 1))
        return Acceptance(decisions.path, cut.count, report)

    def _record(self, report: Report) -> None:
        """Read what the step gave: the only time that it waits for the device."""
        for rows, message in zip(report.invalid, (_NO_LAW, _NO_DRAFT), strict=True):
            if rows:
                raise ValueError(message.format(rows=rows))
        for text, tokens in zip(self.context.texts, report.emitted, strict=True):
            text.extend(tokens)
        self._look_ahead(report.left)

    def _look_ahead(self, left: list[int]) -> None:
        """Adapt to the `left` tokens that each row may still emit."""
        fixed, deepest = self.context.fixed, self.spec.depth
        self._left, self.finished = left, not any(left)
        self._least = 0 if fixed else min((n for n in left if n), default=0)  # smallest budget of the running rows
        self.context.max_depth = deepest if fixed else min(deepest, max(left) - 1)
        self.context.host_row_depths = [max(n - 1, 0) for n in left]


def _with_inner(drafter: Drafter) -> list[Drafter]:
    """It and the drafters that it is made of."""
    inner = [part for part in vars(drafter).values() if isinstance(part, Drafter)]
    return [drafter, *(each for part in inner for each in _with_inner(part))]


def _made_of(target: Target, drafter: Drafter, rule: Rule) -> tuple[Any, ...]:
    """What captured stages depend on, as it is now: models, and what computes beside them."""
    drafters = _with_inner(drafter)
    held = [target.model, *(part for each in drafters for part in vars(each).values())]
    models = fingerprint(*(model for model in held if isinstance(model, nn.Module)), numbers=False)
    trees = [part for part in held if isinstance(part, TreePolicy)]
    return drafters, trees, type(rule), {**vars(rule)}, models, autocast_dtype(target.device)


OPTIONS = [name for name in inspect.signature(Decoding).parameters if name != "coins"]  # what `generate` takes
_NO_LAW = (
    "The target's logits are NaN, or all -inf, at a node that decides the text of prompt(s) {rows}. Check the model's "
    "weights and dtype (float16 overflows where bfloat16 does not) and the logits processors."
)
_NO_DRAFT = (
    "The drafter proposed trees for prompt(s) {rows} that cannot have been drawn as they say: node 0 must be the root "
    "(context.root), tokens must be below context.vocab, and where laws are sampled, draft_probs must be there, finite, and "
    "positive at the drawn tokens; a TreeDrafter's logits must not be NaN, inf, or -inf for all tokens. NaN comes from the "
    "draft model's weights or dtype (float16 overflows where bfloat16 does not)."
)
_INTERRUPTED = "{part} has begun another text since this one's last step; give each interleaved stream its own."
