"""The loop: propose, score, decide, commit. Chains, greedy decoding and batches of one are not special cases."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.coins import Coins
from specdec.drafters.drafter import Acceptance, Context, Drafter
from specdec.drafters.nothing import NoDrafter
from specdec.inputs import Prompts, as_int, as_prompts, as_stop_tokens, as_target, check_kind
from specdec.rules import Decisions, Rule, SiblingRejection
from specdec.sampling import Sampling, TargetLaw
from specdec.target import Target
from specdec.theory import laws_on_path, visits
from specdec.trace import Step, Trace
from specdec.tree import DraftTree, Law


@dataclass(frozen=True)
class Generation:
    """What `generate` returns."""

    tokens: list[Tensor]  # one 1-D int64 CPU tensor per prompt: the new tokens only
    text: list[str] | None  # the same as text, when a tokenizer was given
    trace: Trace = field(repr=False)

    def summary(self) -> dict[str, Any]:
        """Metrics of the run; see `specdec.trace.Trace.summary`."""
        return self.trace.summary()


def generate(
    target: PreTrainedModel | Target,
    prompts: Prompts,
    drafter: Drafter | None = None,
    *,
    rule: Rule = SiblingRejection(),
    sampling: Sampling = Sampling(),
    max_new_tokens: int = 128,
    stop_tokens: Sequence[int] | None = None,
    tokenizer: Any = None,
    seed: int = 0,
    trace: Literal["summary", "ceiling"] = "summary",
) -> Generation:
    """Continue the prompts; with a lossless rule, exactly as the target by itself would.

    >>> out = specdec.generate(target, "def fib(n):", ModelDrafter(draft), tokenizer=tokenizer)
    >>> out.text[0], out.summary()["acceptance_length"]

    Args:
        target: any supported causal LM from transformers, in eval mode. It is left as it was found.
        prompts: a 1-D int64 tensor of token ids, a list of them (of any lengths), or text (with `tokenizer`).
        drafter: who proposes; None decodes autoregressively in the same loop.
        rule: who decides what is kept.
        sampling: how tokens are chosen; greedy by default.
        max_new_tokens: most new tokens per prompt.
        stop_tokens: ids that end a text (and are its last token); None: the EOS ids of `sampling`'s generation config,
            or else the target's; (): none.
        tokenizer: needed for text prompts; gives `Generation.text`.
        seed: every random decision is a function of (seed, index of the prompt, step).
        trace: what to record; "summary" keeps counts and times of every step, "ceiling" also each visited node with
            the best that any rule could do there, for `ceiling_share`, and what a lossy rule does to the law, for
            `divergence`. That takes long: do not time such runs.

    Raises:
        ValueError: bad input, an unsupported model, a rule that is not lossless for the drafter's trees, or logits
            that are no distribution; the message names the cure.
    """
    run = Decoding(target, prompts, drafter, rule, sampling, max_new_tokens, stop_tokens, tokenizer, seed, trace)
    while not run.finished:
        run.step()
    return run.generation()


def stream(
    target: PreTrainedModel | Target, prompts: Prompts, drafter: Drafter | None = None, **options: Any
) -> Iterator[list[Tensor]]:
    """As `generate` (same arguments), yielding the tokens of every step as they are committed.

    Yields lists like `Generation.tokens`: the new tokens of each prompt, possibly none; joined together they are what
    `generate` returns. Between the yields the model is as it was found.
    """
    defaults = {"rule": SiblingRejection(), "sampling": Sampling(), "max_new_tokens": 128, "stop_tokens": None}
    run = Decoding(
        target, prompts, drafter, **{**defaults, "tokenizer": None, "seed": 0, "trace": "summary", **options}
    )
    while not run.finished:
        yield [torch.tensor(row, dtype=torch.int64) for row in run.step().emitted]


class Decoding:
    """A run in progress: its state, and the step."""

    def __init__(
        self,
        target: PreTrainedModel | Target,
        prompts: Prompts,
        drafter: Drafter | None,
        rule: Rule,
        sampling: Sampling,
        max_new_tokens: int,
        stop_tokens: Sequence[int] | None,
        tokenizer: Any,
        seed: int,
        trace: str,
        coins: Callable[[int, int], Coins] | None = None,  # (batch, nodes) -> Coins, in place of those of the seed
    ):
        began = time.perf_counter()
        if trace not in ("summary", "ceiling"):
            raise ValueError(f"trace={trace!r}: must be 'summary' or 'ceiling'.")
        self.ceiling = trace == "ceiling"
        self.target, self.drafter, self.rule = as_target(target), NoDrafter() if drafter is None else drafter, rule
        for name, part, kind in (
            ("drafter", self.drafter, Drafter), ("rule", rule, Rule), ("sampling", sampling, Sampling)
        ):  # fmt: skip
            check_kind(name, part, kind)
        max_new_tokens, seed = as_int("max_new_tokens", max_new_tokens), as_int("seed", seed)
        self.tokenizer = tokenizer
        rows = as_prompts(prompts, tokenizer, self.target, max_new_tokens)
        sampling, processors = sampling.bind(self.target.model, rows, max_new_tokens)
        self.spec = self.drafter.spec(sampling)
        rule.check(self.spec)
        device = self.target.device
        config = sampling.generation_config
        eos = self.target.stop_tokens if config is None else config.eos_token_id
        stop = as_stop_tokens(stop_tokens, eos, self.target.vocab)
        self.stop_tokens = torch.tensor(stop, dtype=torch.int64, device=device)
        self.coins = (coins or (lambda batch, nodes: Coins(seed, batch, nodes, device)))(len(rows), self.spec.nodes)
        self.context = _context(rows, max_new_tokens, self.spec.nodes, self.target, sampling, processors, tokenizer)
        self.emitted: list[list[int]] = [[] for _ in rows]
        self.budget = torch.full((len(rows),), max_new_tokens, device=device)  # [batch] int64: 0 for rows that ended
        self.least, self.finished = max_new_tokens, False  # least: smallest budget of the rows still running
        for part in (self.target, self.drafter):
            object.__setattr__(part, "run", self.context)
        with torch.inference_mode(), self._patched():
            self.target.start(self.context, self.context.tokens.shape[1], self.drafter.uses_hidden)
            self.drafter.start(self.target, self.context)
        self.trace = Trace(prefill_seconds=time.perf_counter() - began)

    def step(self) -> Acceptance:
        """One round for every row: propose, score, decide, commit."""
        for part in (self.target, self.drafter):
            if part.run is not self.context:
                raise RuntimeError(_INTERRUPTED.format(part=part))
        clock = [time.perf_counter()]
        with torch.inference_mode(), self._patched():
            tree = self._propose()
            clock.append(time.perf_counter())
            logits = self.target.score(tree, self.context)
            clock.append(time.perf_counter())
            if logits.shape != (*tree.tokens.shape, self.target.vocab):
                due = [*tree.tokens.shape, self.target.vocab]
                raise ValueError(
                    f"{self.target}.score returned {list(logits.shape)}, not [batch, node, vocab] = {due}."
                )
            law = TargetLaw(logits, tree, self.context)
            decisions = self.rule(tree, law, self.coins)
            laws = laws_on_path(law, decisions) if self.ceiling else None  # now: processors read the text so far
            acceptance, tried = self._accept(tree, law, decisions)
            self.target.commit(acceptance)
            decided = time.perf_counter()
            self.drafter.commit(acceptance)
            clock.append(time.perf_counter())
        self.coins.step += 1
        draft = clock[1] - clock[0] + clock[3] - decided
        emitted = [len(row) for row in acceptance.emitted]
        seconds = draft, clock[2] - clock[1], decided - clock[2]
        visited = None if laws is None else visits(tree, laws, acceptance, tried, self.coins, self.rule)
        step = Step(tree.tokens.shape[1], emitted, acceptance.accepted, tried, *seconds, visited)
        self.trace.steps.append(step)
        return acceptance

    def generation(self) -> Generation:
        """Everything emitted so far."""
        tokens = [torch.tensor(row, dtype=torch.int64) for row in self.emitted]
        decode = self.tokenizer.decode if self.tokenizer is not None else None
        return Generation(
            tokens, decode and [decode(row, skip_special_tokens=True) for row in self.emitted], self.trace
        )

    def _patched(self) -> ExitStack:
        stack = ExitStack()
        stack.enter_context(self.target.patched())
        stack.enter_context(self.drafter.patched())
        return stack

    def _propose(self) -> DraftTree:
        """The drafter's trees without what is deeper than a row's own budget: its text must not depend on other rows'."""
        context = self.context
        tree = self.drafter.propose(context, self.coins)
        tree.check(self.spec, len(context.lengths), context.max_depth, context.vocab)
        if self.least > tree.topology.depth:
            return tree
        beyond = tree.topology.depths > context.row_depths[:, None].clamp(min=0)
        return replace(tree, laws=torch.where(beyond, Law.PADDING, tree.laws))

    def _accept(self, tree: DraftTree, law: TargetLaw, decisions: Decisions) -> tuple[Acceptance, list[int]]:
        """Cut the decisions at stop tokens and budgets and append what is left to the text: the step's only host copy."""
        context, path, accepted = self.context, decisions.path, decisions.accepted[:, None]
        root, place = context.root, torch.arange(path.shape[1], device=path.device)
        new = (
            tree.tokens.gather(1, path).roll(-1, 1).scatter(1, accepted, decisions.token[:, None])
        )  # [batch, depth + 1]
        ends = torch.isin(new, self.stop_tokens) & (place <= accepted)
        first_end = torch.where(ends, place, path.shape[1]).amin(1)
        running = self.budget > 0
        count = torch.minimum(torch.minimum(decisions.accepted, first_end) + 1, self.budget)  # [batch]: 0 where ended
        self.budget = torch.where(first_end < count, 0, self.budget - count)
        context.tokens.scatter_(1, context.lengths[:, None] + place, new)
        context.lengths += count
        columns = [
            count,
            decisions.accepted,
            _has_children(tree, path.gather(1, accepted)),
            self.budget,
            law.invalid() & running,
            tree.invalid(root) & running,
        ]
        *news, counts, taken, more, left, no_law, no_draft = torch.cat([new, torch.stack(columns, 1)], 1).T.tolist()
        if any(no_law):
            raise ValueError(_NO_LAW.format(rows=[b for b, bad in enumerate(no_law) if bad]))
        if any(no_draft):
            raise ValueError(_NO_DRAFT.format(rows=[b for b, bad in enumerate(no_draft) if bad]))
        emitted = [list(row[:n]) for row, n in zip(zip(*news, strict=True), counts, strict=True)]
        for text, tokens in zip(self.emitted, emitted, strict=True):
            text.extend(tokens)
        context.host_lengths = [length + n for length, n in zip(context.host_lengths, counts, strict=True)]
        context.max_depth, context.row_depths = min(self.spec.depth, max(left) - 1), self.budget - 1
        self.least = min((n for n in left if n), default=0)
        self.finished = not any(left)
        kept = [min(a, n) for a, n in zip(taken, counts, strict=True)]
        tried = [min(a + m, n) for a, m, n in zip(taken, more, counts, strict=True)]
        return Acceptance(path, count, emitted, kept, [not n for n in left]), tried


_NO_LAW = (
    "The target's logits are NaN, or all -inf, at a node that decides the text of prompt(s) {rows}. Check the model's "
    "weights and dtype (float16 overflows where bfloat16 does not) and the logits processors."
)
_NO_DRAFT = (
    "The drafter proposed trees for prompt(s) {rows} that cannot have been drawn as they say: node 0 must be the root "
    "(context.root), and where laws are sampled, draft_probs must be there, finite, and positive at the drawn tokens. NaN "
    "in it comes from the draft model's weights or dtype (float16 overflows where bfloat16 does not)."
)
_INTERRUPTED = "{part} has begun another text since this one's last step; give each interleaved stream its own."


def _has_children(tree: DraftTree, node: Tensor) -> Tensor:
    """[batch] int64: 1 where the row drafted children of `node` [batch, 1]."""
    return ((tree.topology.parents == node) & (tree.laws != Law.PADDING)).any(1).long()


def _context(rows, max_new_tokens, nodes, target, sampling, processors, tokenizer) -> Context:
    lengths = [len(row) for row in rows]
    longest = max(lengths) + max_new_tokens
    tokens = torch.zeros((len(rows), longest + nodes), dtype=torch.int64)
    for b, row in enumerate(rows):
        tokens[b, : len(row)] = row
    return Context(
        tokens=tokens.to(target.device),
        lengths=torch.tensor(lengths, device=target.device),
        host_lengths=lengths,
        max_length=longest,
        max_depth=max_new_tokens - 1,
        row_depths=torch.full((len(rows),), max_new_tokens - 1, device=target.device),
        sampling=sampling,
        processors=processors,
        vocab=target.vocab,
        tokenizer=tokenizer,
    )
