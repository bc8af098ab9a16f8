"""What users call: `generate` and `stream`. The loop itself is `specdec.loop.Decoding`."""

from __future__ import annotations

import inspect
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Never

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.arguments import Prompts, as_request, refuse_unknown
from specdec.drafters.base import Drafter
from specdec.engines.base import Engine
from specdec.loop import Decoding
from specdec.models.target import Target
from specdec.rules import Rule, SiblingRejection
from specdec.runs import Runs
from specdec.sampling import Sampling
from specdec.trace import Trace


@dataclass(frozen=True)
class Generation:
    """What `generate` returns.

    Args:
        tokens: one 1-D int64 CPU tensor per prompt: the new tokens only.
        text: the same as text, when a tokenizer was given.
        trace: what happened, step by step.
        tokenizer: that was given.
        runs: with keep=True, the caches that a later turn may go on in (resume=...), and their memory.
    """

    tokens: list[Tensor]
    text: list[str] | None
    trace: Trace = field(repr=False)
    tokenizer: Any = field(default=None, repr=False)
    runs: Runs | None = field(default=None, repr=False)

    def summary(self) -> dict[str, Any]:
        """Metrics of the run; see `specdec.trace.Trace.summary`."""
        return self.trace.summary()

    def _repr_html_(self) -> str:
        """In a notebook, the text coloured by who wrote it: see `specdec.display.text`."""
        from specdec import display  # which shows generations

        return display.text(self)._repr_html_()


def generate(
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
    trace: Literal["summary", "ceiling", "laws"] = "summary",
    engine: Engine | Literal["eager", "graph", "compile"] = "eager",
    resume: Generation | None = None,
    keep: bool = False,
    **unknown: Never,
) -> Generation:
    """Continue the prompts; with a lossless rule, exactly as the target by itself would.

    >>> out = specdec.generate(target, "def fib(n):", ModelDrafter(draft), tokenizer=tokenizer)
    >>> out.text[0], out.summary()["acceptance_length"]

    Args:
        target: any supported causal LM from transformers, in eval mode. It is left as it was found.
        prompts: one prompt or a list of them: token ids (a 1-D tensor or array, or a list), of any lengths and without
            padding, or text (with `tokenizer`).
        drafter: who proposes; None decodes autoregressively in the same loop.
        rule: who decides what is kept.
        sampling: how tokens are chosen; greedy by default.
        max_new_tokens: most new tokens per prompt.
        stop_tokens: ids that end a text (and are its last token); None: the EOS ids of `sampling`'s generation config,
            or else the target's; (): none. Stop strings are those of the generation config.
        tokenizer: needed for text prompts and stop strings; gives `Generation.text`.
        seed: every random decision is a function of (seed of 64 bits, index of the prompt, step): equal prompts in two calls
            get equal samples unless the seeds differ, and it is 0 by default.
        trace: what to record; "summary" keeps counts and times of every step, "ceiling" also each visited node with
            the best that any rule could do there, for `ceiling_share`, and what a lossy rule does to the law, for
            `divergence`; "laws" the trees and both models' laws, for `specdec.trace.replay` (large: see
            `specdec.trace.laws`). Both take long: do not time such runs.
        engine: "eager" runs every step as it stands; "graph" captures it as CUDA graphs, "compile" compiles forward passes
            too (worth it on a CPU as well). Pass one `specdec.Graphs` to several calls to have it done once.
        resume: go on in the caches of an earlier generation, which was made with keep=True: each prompt is read from where it
            parts from the text of its row there, in a conversation what was said since. The text is the same. Of changes to a
            model in between, those that training, loading or a switch of adapters makes are noticed; not what is written
            through `weight.data`, which torch does not count (`weight.data = ...` is noticed), nor what hooks and other objects
            that are no modules change in themselves.
        keep: whether `resume=` may go on from this one: `Generation.runs` then holds its caches, and their memory.

    Raises:
        ValueError: bad input, an argument that belongs elsewhere (as `temperature` does), an unsupported model, a rule that
            is not lossless for the drafter's trees, or logits that are no distribution; the message names the cure.
    """
    refuse_unknown(unknown, OPTIONS)
    request = as_request(
        target, prompts, drafter, rule=rule, sampling=sampling, max_new_tokens=max_new_tokens, stop_tokens=stop_tokens,
        tokenizer=tokenizer, seed=seed, trace=trace, engine=engine, resume=resume, keep=keep,
    )  # fmt: skip
    with Decoding(request) as run:
        while not run.finished:
            run.step()
        run.check_texts()
        return _generation(run)


def stream(
    target: PreTrainedModel | Target, prompts: Prompts, drafter: Drafter | None = None, **options: Any
) -> Stream:
    """As `generate` (same arguments), yielding the tokens of every step as they are committed.

    >>> for step in specdec.stream(target, prompts, drafter):
    ...     print(step[0])

    Yields lists like `Generation.tokens`: the new tokens of each prompt, possibly none; joined together they are what
    `generate` returns. Between the yields the model is as it was found.
    """
    refuse_unknown({name: value for name, value in options.items() if name not in OPTIONS}, OPTIONS)
    return Stream(target, prompts, drafter, options)


class Stream(Iterator[list[Tensor]]):
    """A run that is made step by step, as it is iterated over; `stream` makes it."""

    def __init__(self, target: Any, prompts: Any, drafter: Any, options: dict[str, Any]):
        self._steps, self._run = _steps(target, prompts, drafter, options), None

    def __next__(self) -> list[Tensor]:
        if self._run is None:
            self._run = next(self._steps)
        run = next(self._steps)
        news = zip(run.emitted, run.trace.steps[-1].emitted, strict=True)
        return [torch.tensor(row[len(row) - count :], dtype=torch.int64) for row, count in news]

    def close(self) -> None:
        """Leave the text as it is, and let go of what the run owns."""
        self._steps.close()

    @property
    def generation(self) -> Generation:
        """What has been generated so far: once the stream has ended or was closed, a later turn may resume it."""
        if self._run is None:
            raise ValueError("the stream has not begun; ask for its first step: next(stream).")
        return _generation(self._run)


def _steps(target: Any, prompts: Any, drafter: Any, options: dict[str, Any]) -> Generator[Decoding]:
    """The run once it has begun, and after each step. It knows no `Stream`: one that is dropped lets go of all at once."""
    with Decoding(as_request(target, prompts, drafter, **options)) as run:
        yield run
        while not run.finished:
            run.step()
            yield run
        run.check_texts()


def _generation(run: Decoding) -> Generation:
    tokens = [torch.tensor(row, dtype=torch.int64) for row in run.emitted]
    tokenizer = run.request.tokenizer
    texts = None if tokenizer is None else [tokenizer.decode(row, skip_special_tokens=True) for row in run.emitted]
    return Generation(tokens, texts, run.trace, tokenizer, run.runs if run.request.keep else None)


OPTIONS = [name for name in inspect.signature(generate).parameters if name != "unknown"]
