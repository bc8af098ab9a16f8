"""What users call: `generate` and `stream`. The loop itself is `specdec.loop.Decoding`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, Literal, Never

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.arguments import as_request
from specdec.drafters.base import Drafter
from specdec.engines.base import Engine
from specdec.job import Job
from specdec.models.target import Target
from specdec.prompts import Prompts
from specdec.request import Written
from specdec.rules import Rule, SiblingRejection
from specdec.runs import Runs
from specdec.sampling import Sampling
from specdec.trace import Trace


@dataclass(frozen=True)
class Generation:
    """What `generate` returns.

    Args:
        tokens: one 1-D int64 CPU tensor per text: the new tokens only. In the prompts' order, samples of one prompt together.
        text: the new tokens as text, if a tokenizer was given.
        trace: what happened in this call, step by step; what a journal had is not in it.
        tokenizer: the tokenizer that was given.
        runs: with keep=True, what a later turn may go on in (resume=...): it holds the caches and their memory.
        logprobs: with logprobs=True, one 1-D float32 CPU tensor per text: the log-probability of each new token under the
            target's law, after processors, temperature and filters; 0 where decoding is greedy. A rule that is not lossless
            emits tokens by a law of its own. These are the target's all the same: -inf for what it would not have emitted.
        raw_logprobs: the same under the softmax of the target's raw logits.
        skipped: with on_error="skip", why texts were not written, by their places in `tokens`.
    """

    tokens: list[Tensor]
    text: list[str] | None
    trace: Trace = field(repr=False)
    tokenizer: Any = field(default=None, repr=False)
    runs: Runs | None = field(default=None, repr=False)
    logprobs: list[Tensor] | None = field(default=None, repr=False)
    raw_logprobs: list[Tensor] | None = field(default=None, repr=False)
    skipped: Mapping[int, str] = field(default_factory=dict, repr=False)

    def summary(self, price_per_hour: float | None = None) -> dict[str, Any]:
        """Metrics of the run; see `specdec.trace.Trace.summary`."""
        return self.trace.summary(price_per_hour)

    def _repr_html_(self) -> str:
        """The text for a notebook, coloured by who wrote each token: see `specdec.display.text`."""
        from specdec import display  # here, as `display` imports this module's `Generation`

        return display.text(self)._repr_html_()


def generate(
    target: PreTrainedModel | Target,
    prompts: Prompts,
    drafter: Drafter | None = None,
    *,
    rule: Rule = SiblingRejection(),
    sampling: Sampling = Sampling(),
    max_new_tokens: int | Sequence[int] = 128,
    stop_tokens: Iterable[int] | int | None = None,
    tokenizer: Any = None,
    seed: int = 0,
    first_index: int = 0,
    num_samples: int = 1,
    batch_size: int | None = None,
    on_error: Literal["raise", "skip"] = "raise",
    journal: str | PathLike[str] | None = None,
    progress: bool = False,
    logprobs: bool = False,
    trace: Literal["summary", "ceiling", "laws"] = "summary",
    engine: Engine | Literal["eager", "graph", "compile"] = "eager",
    resume: Generation | None = None,
    keep: bool = False,
    **unknown: Never,
) -> Generation:
    """Continue the prompts. With a lossless rule, the text has exactly the law that the target has by itself.

    >>> out = specdec.generate(target, "def fib(n):", ModelDrafter(draft), tokenizer=tokenizer)
    >>> out.text[0], out.summary()["acceptance_length"]
    >>> out = specdec.generate(target, thousands, drafter, batch_size=32, num_samples=8)  # text 8 * i + j: sample j of prompt i
    >>> turn = specdec.generate(target, said, drafter, tokenizer=tokenizer, keep=True)  # a conversation, in its own caches
    >>> turn = specdec.generate(target, said + turn.text[0] + reply, drafter, tokenizer=tokenizer, resume=turn, keep=True)

    Args:
        target: any supported causal LM from transformers, in eval mode. It is left as it was found.
        prompts: one prompt or a list of them: token ids (a 1-D tensor or array, or a list), of any lengths and without
            padding, text (with `tokenizer`), or a list of chat messages (with a `tokenizer` that has a chat template).
        drafter: proposes tokens; None decodes autoregressively in the same loop.
        rule: decides which of them are kept.
        sampling: how tokens are chosen; greedy by default.
        max_new_tokens: most new tokens: one number, or one per prompt, for all of its samples.
        stop_tokens: ids that end a text, as its last token. None: the EOS ids of `sampling`'s generation config, or else the
            target's. (): none. Stop strings are set in the generation config.
        tokenizer: needed for text prompts and stop strings; gives `Generation.text`.
        seed: an integer of 64 bits. Every random decision is a function of (seed, index of the prompt, sample, the text's own
            step). So equal prompts in two calls get equal samples unless the seeds differ, and the turns of a conversation, or
            the epochs of a training, share coins: give each a seed of its own.
        first_index: index of the first prompt; errors name prompts by it. A job that is cut into several calls gives each the
            index at which its part begins: then no two prompts share their coins, and the texts are those of one call.
        num_samples: how many texts to write for each prompt. They follow each other in `Generation.tokens`. More samples do not
            change those that fewer gave.
        batch_size: how many texts are at work at once: when one has ended, the next prompt gets its row while the others go on.
            Beginnings that prompts share are read once, and memory is needed for that many texts only. None: all at once. Which
            texts are in the batch changes a text by rounding only. Not together with `keep` or `resume`.
        on_error: what to do about prompts that cannot be decoded, such as an empty one, one beyond the target's context, or a
            text without a tokenizer:
            "raise" an error, or "skip" them, so that their texts are empty and `Generation.skipped` says why.
        journal: a file that keeps every finished text, and on an interrupt what there is of the others: the same call goes on
            from there, to the same texts. A journal of other arguments is refused. `specdec.journal.read(path)` gives what is
            in it at any time: token ids, by place in `Generation.tokens`.
        progress: whether to show a bar.
        logprobs: whether to give `Generation.logprobs` and `raw_logprobs`, from logits that are there anyway.
        trace: what to record. "summary": counts and times of every step. "ceiling": also each visited node with the best that
            any rule could do there, for `ceiling_share`, and how far a lossy rule is off, for `divergence`. "laws": also the
            trees and both models' laws, for `specdec.trace.replay` (large: see `specdec.trace.laws`). "ceiling" and "laws" take
            long: do not time such runs.
        engine: "eager" runs every step as it stands; "graph" captures it as CUDA graphs, "compile" compiles forward passes
            too (worth it on a CPU as well). Pass one `specdec.Graphs` to several calls to capture and compile only once.
        resume: an earlier generation, made with keep=True, whose caches to go on in. Each prompt is read from where it differs
            from the text of its row there: in a conversation, only what was said since. Models with recurrent state read from
            the last place before that where a state was kept: the row's end or that of its prompt. The text is the same as
            without.
            If a model was changed in between by training, loading or a switch of adapters, this is noticed. Not noticed are
            writes into `weight.data`, which torch does not count (`weight.data = ...` is noticed), and changes inside of hooks
            and other objects that are no modules.
        keep: whether a later call may resume this one: `Generation.runs` then holds its caches, and their memory. Not together
            with `batch_size`.

    Raises:
        ValueError: bad input, an argument that belongs elsewhere (such as `temperature`), an unsupported model, a rule that
            is not lossless for the drafter's trees, or logits that give no law; the message names the cure.
    """
    request = as_request(
        target, prompts, drafter, rule=rule, sampling=sampling, max_new_tokens=max_new_tokens, stop_tokens=stop_tokens,
        tokenizer=tokenizer, seed=seed, first_index=first_index, num_samples=num_samples, batch_size=batch_size,
        on_error=on_error, logprobs=logprobs, trace=trace, engine=engine, resume=resume, keep=keep, **unknown,
    )  # fmt: skip
    job = Job(request, journal, progress)
    for _ in job.steps():
        pass
    return _generation(job)


def stream(
    target: PreTrainedModel | Target,
    prompts: Prompts,
    drafter: Drafter | None = None,
    *,
    journal: str | PathLike[str] | None = None,
    progress: bool = False,
    **options: Any,
) -> Stream:
    """As `generate`, with the same arguments, but yielding the tokens of every step as they are committed.

    >>> for step in specdec.stream(target, prompts, drafter):
    ...     print(step[0])
    >>> for index, tokens in specdec.stream(target, prompts, drafter, batch_size=32):
    ...     print(index, tokens)

    Each step yields a list like `Generation.tokens`: the new tokens of each text, possibly none. With `batch_size`, the stream
    yields (index, new tokens) of one text after another instead, as they come. All of them together give what `generate`
    returns. Between the yields the model is as it was found.
    """
    return Stream(Job(as_request(target, prompts, drafter, **options), journal, progress))


class Stream(Iterator[Any]):
    """A run that decodes step by step as it is iterated over; `stream` makes it."""

    def __init__(self, job: Job):
        self._job, self._steps, self._begun = job, job.steps(), False
        self._news: Iterator[tuple[int, np.ndarray]] = iter(())

    def __next__(self) -> Any:
        self._begun = True
        if self._job.request.slots is None:
            news = dict(next(self._steps))
            return [_tensor(news.get(index, ())) for index in range(self._job.request.count)]
        while (found := next(self._news, None)) is None:
            self._news = iter(next(self._steps))
        return found[0], _tensor(found[1])

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the run with the text so far, and release what it owns."""
        self._steps.close()

    @property
    def generation(self) -> Generation:
        """The text so far. Once the stream has ended or was closed, a later turn may resume it."""
        if not self._begun:
            raise ValueError("the stream has not begun; ask for its first step: next(stream).")
        return _generation(self._job)


def _tensor(tokens: Sequence[int] | np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(tokens, np.int64))


def _generation(job: Job) -> Generation:
    request = job.request
    texts = [job.written.get(index, Written()) for index in range(request.count)]
    tokens = [_tensor(text.tokens) for text in texts]
    decode = None if request.tokenizer is None else request.tokenizer.decode
    decoded = None if decode is None else [decode(row.tolist(), skip_special_tokens=True) for row in tokens]
    logprobs, raw = ([_column(text, k) for text in texts] if request.notes else None for k in (0, 1))
    return Generation(tokens, decoded, job.trace, request.tokenizer, job.runs, logprobs, raw, dict(request.skipped))


def _column(text: Written, note: int) -> Tensor:
    return text.noted[:, note] if text.notes else torch.empty(0)
