"""Decoding from transformers' own call: `model.generate(**inputs, custom_generate=specdec.custom_generate(drafter))`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Never

import torch
from torch import Tensor
from transformers import EosTokenCriteria, GenerationConfig, MaxLengthCriteria, PreTrainedModel, StoppingCriteriaList
from transformers.generation.utils import GenerateDecoderOnlyOutput

from specdec.arguments import as_engine, as_request, as_target, check_tokenizer
from specdec.checks import as_seed, check_kind
from specdec.drafters.base import Drafter
from specdec.engines.base import Engine
from specdec.huggingface.batch_processors import BatchProcessors
from specdec.huggingface.call import LoopWithTokenizer, arguments_of_generate
from specdec.huggingface.generation_config import split
from specdec.huggingface.stopping import Criteria
from specdec.loop import Decoding
from specdec.models.cache import CACHE_NAMES
from specdec.models.prepared_inputs import holds_text
from specdec.notes import Note, raw_logits, warped_scores
from specdec.processors import Processors, check_copies
from specdec.rules import SiblingRejection
from specdec.rules.base import Rule
from specdec.sampling import Sampling
from specdec.trace.trace import Trace

_READ = {"attention_mask", "position_ids", *CACHE_NAMES, "use_cache", "logits_to_keep", "cache_position"}
_OTHER_CACHES = {"quantized", "offloaded", "offloaded_static", "offloaded_hybrid", "offloaded_hybrid_chunked"}
_REFUSED_OUTPUTS = ("attentions", "hidden_states")
# By the field of the output: what the run notes for it.
_OUTPUTS: dict[str, Note] = {"scores": warped_scores, "logits": raw_logits}


@dataclass
class SpeculativeOutput(GenerateDecoderOnlyOutput):
    """The `sequences`, the `trace` of the run (`out.trace.summary()`), and `scores` and `logits` if asked for.

    Those two are as in transformers: [batch, vocab] float32 for each new token, on the prompts' device; `scores` keep what
    `Sampling` keeps at ties. Where a row's text has ended before, they are 0 for the token that fills the row and -inf for all
    others, so that transition scores are 0 there.
    """

    trace: Trace | None = None


def custom_generate(
    drafter: Drafter | None = None,
    *misplaced: Never,
    rule: Rule = SiblingRejection(),
    seed: int | None = None,
    tokenizer: Any = None,
    engine: Engine | Literal["eager", "graph", "compile"] = "eager",
    **unknown: Never,
) -> Callable[..., Tensor | SpeculativeOutput]:
    """A decoding loop for `model.generate`, whose other arguments and results stay what they are.

    >>> model.generate(**inputs, do_sample=True, custom_generate=specdec.custom_generate(ModelDrafter(draft)))

    Greedy search and sampling, with any logits processors and stopping criteria:

    - Stopping criteria are called with the whole batch, once for every length, and texts are cut where they say so.
    - Each row has copies of the logits processors, and yours stay as they are (see `Sampling`). They are called once for every
      token of the row's text and of the drafts that the rule visits, and see the other rows with likely continuations.
    - A streamer's `end` is called after an error too.
    - `output_scores` and `output_logits` are kept from the steps, without another forward pass; see `SpeculativeOutput` for
      rows whose text has ended.
    - You may wrap the loop in a function of yours; for stop strings, use `functools.wraps`.

    Refused are beams, assistants, attentions and hidden states, and caches to go on from. The cache is specdec's own, and not
    returned.

    Args:
        drafter, rule, tokenizer, engine: as in `specdec.generate`. An engine is kept from call to call.
        seed: decides the sampled tokens; None draws one from torch's global generator at each call, so that
            `torch.manual_seed` repeats a run.
    """
    _refuse(drafter, misplaced, unknown)
    check_kind("drafter", drafter, (Drafter, type(None)))
    check_kind("rule", rule, Rule)
    check_tokenizer(tokenizer)
    engine, given = as_engine(engine), tokenizer
    seed = None if seed is None else as_seed(seed)

    def decode(
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: list[Any],
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        tokenizer: Any = None,
        **model_kwargs: Any,
    ) -> Tensor | SpeculativeOutput:
        call = arguments_of_generate()
        with _ended(call.get("streamer")) as streamer:
            target = as_target(model)  # an unsupported model is reported before unsupported arguments
            config, batch = generation_config, len(input_ids)
            _check(config, model_kwargs, call, batch)
            mask = _mask(input_ids, **model_kwargs)
            stop_tokens, limit, others = _ends(stopping_criteria, config.max_length)
            filler = config.pad_token_id if config.pad_token_id is not None else next(iter(stop_tokens), 0)
            fields, processors = split(config, logits_processor)
            rows = [ids[own] for ids, own in zip(input_ids, mask, strict=True)]
            drawn = int(torch.randint(2**62, ())) if seed is None and config.do_sample else seed or 0
            shown = {"prompts": input_ids, "ends": stop_tokens, "filler": filler}
            outputs = _wanted(config, _OUTPUTS)
            pads = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
            request = as_request(
                target, rows, drafter, rule=rule, sampling=_Prepared(**fields, processors=processors, **shown),
                max_new_tokens=max(limit - input_ids.shape[1], 1), tokenizer=tokenizer or given, seed=drawn, engine=engine,
                stop_tokens=[token for token in stop_tokens if 0 <= token < target.vocab],  # others, as -1, end no text there
            )  # fmt: skip
            stopping = Criteria(others, input_ids, filler, pads) if others else None
            request = replace(request, stopping=stopping, notes=tuple(_OUTPUTS[name] for name in outputs))
            with Decoding(request) as run:
                _finish(run, streamer)
                emitted = run.emitted
        sequences: Any = _sequences(input_ids, emitted, filler)
        if not config.return_dict_in_generate:
            return sequences
        noted = [run.slots.written[row].noted for row in range(len(rows))]
        found: Any = dict(zip(outputs, _by_token(noted, filler, input_ids.device), strict=True)) if outputs else {}
        return SpeculativeOutput(sequences, **found, trace=run.trace)

    return LoopWithTokenizer(decode)


def _refuse(drafter: Any, misplaced: Sequence[Any], unknown: Iterable[str]) -> None:
    """Raise ValueError for arguments that belong elsewhere, and say where."""
    if isinstance(drafter, PreTrainedModel) and misplaced:  # model.generate has called it as a loop
        raise ValueError(
            "custom_generate itself was passed, which is no decoding loop but makes one; call it: "
            "model.generate(..., custom_generate=specdec.custom_generate(drafter))."
        )
    for value in misplaced:
        raise ValueError(
            f"custom_generate takes one unnamed argument, the drafter, and was given a {type(value).__name__} too; name it, as "
            "in custom_generate(drafter, rule=...)."
        )
    for name in unknown:
        there = "do_sample=True, temperature=..." if name == "sampling" else f"{name}=..."
        raise ValueError(
            f"custom_generate has no argument {name!r}: it takes drafter, rule, seed, tokenizer and engine. What "
            f"model.generate knows, pass there: model.generate(..., {there}, custom_generate=...)."
        )


@contextmanager
def _ended(streamer: Any) -> Iterator[Any]:
    """The streamer, whose `end` is called even after an error: else its reader would wait for ever."""
    try:
        yield streamer
    finally:
        if streamer is not None:
            streamer.end()


@dataclass(frozen=True, eq=False)
class _Prepared(Sampling):
    """Sampling with the processors that transformers has made for the batch."""

    prompts: Tensor = field(default_factory=lambda: torch.empty(0, 0))  # [batch, length] int64, with their padding
    ends: Sequence[int] = ()  # tokens that end a text
    filler: int = 0  # the token that fills a row after its text has ended

    def bind(
        self, model: Any, prompts: Any, budgets: Any, tokenizer: Any = None
    ) -> tuple[Sampling, Sequence[Processors]]:
        check_copies(self.processors, len(prompts))
        ends = torch.tensor(self.ends, dtype=torch.int64)
        rows = [
            BatchProcessors(self.processors, row, len(prompt), self.prompts, ends, self.filler)
            for row, prompt in enumerate(prompts)
        ]
        return Sampling(*self.filters), rows


def _check(config: GenerationConfig, model_kwargs: dict[str, Any], call: dict[str, Any], batch: int) -> None:
    """Raise ValueError for arguments that would otherwise be ignored in silence."""
    if call.get("assistant_model") is not None:
        raise ValueError("assistant_model: give it to specdec instead, custom_generate(ModelDrafter(assistant_model)).")
    if call.get("synced_gpus"):
        raise ValueError(
            "synced_gpus: processes take as many steps here as their own texts need; gather the model's weights in each."
        )
    if config.cache_implementation in _OTHER_CACHES:
        raise ValueError(
            f"cache_implementation={config.cache_implementation!r}: specdec has a cache of its own, in full and on the "
            "model's device; leave it out."
        )
    if call.get("streamer") is not None and batch > 1:
        raise ValueError(
            f"streamer with {batch} prompts: their texts do not grow equally fast; stream one prompt at a time."
        )
    refused = _wanted(config, _REFUSED_OUTPUTS)
    if refused:
        names = [f"output_{name}" for name in refused]
        raise ValueError(f"{names}: the loop does not keep them; leave them out, and run the model on `sequences`.")
    unread = _unread(model_kwargs)
    if unread:
        raise ValueError(
            f"{unread}: only input_ids and attention_mask are read; leave out what a text alone does not need."
        )
    for name in CACHE_NAMES:
        cache = model_kwargs.get(name)
        if cache is not None and (getattr(cache, "_is_user_defined", False) or holds_text(cache)):
            raise ValueError(f"{name}: specdec has a cache of its own and does not go on from another; leave it out.")


def _wanted(config: GenerationConfig, fields: Iterable[str]) -> list[str]:
    """Those fields of the output that the config asks for."""
    return [name for name in fields if config.return_dict_in_generate and getattr(config, f"output_{name}")]


def _unread(model_kwargs: dict[str, Any]) -> list[str]:
    """Names of further inputs of the model. Images and the like are passed encoded, in a dict that is empty for text alone."""
    given = {name: value for name, value in model_kwargs.items() if value is not None and name not in _READ}
    encoded = given.pop("mm_encoder_outputs", {})
    return sorted([*given, *(f"{kind} inputs such as pixel_values" for kind in encoded)])


def _mask(
    input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None, **_: Any
) -> Tensor:
    """[batch, length] bool: the tokens that are no padding. All padding must come first."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids)
    if mask.shape != input_ids.shape or ((mask != 0) & (mask != 1)).any() or (mask.diff(dim=1) < 0).any():
        raise ValueError(
            "attention_mask must be 0 for padding on the left of each prompt and 1 after it; tokenize with "
            "padding_side='left'."
        )
    if position_ids is not None and (mask * (position_ids - mask.cumsum(1) + 1)).any():
        raise ValueError("position_ids are not 0, 1, 2, ... from the first token of each prompt on; leave them out.")
    return mask.bool()


def _ends(criteria: StoppingCriteriaList, longest: int) -> tuple[tuple[int, ...], int, StoppingCriteriaList]:
    """Tokens that end a text, the length at which it ends (by default `longest`), and all other criteria.

    Subclasses of transformers' criteria count as others: what they do is known only by calling them.
    """
    tokens = [token for c in criteria if type(c) is EosTokenCriteria for token in c.eos_token_id.tolist()]
    limit = min((c.max_length for c in criteria if type(c) is MaxLengthCriteria), default=longest)
    others = (c for c in criteria if type(c) not in (EosTokenCriteria, MaxLengthCriteria))
    return tuple(tokens), limit, StoppingCriteriaList(others)


def _finish(run: Decoding, streamer: Any) -> None:
    """Decode to the end, serving the streamer after each step."""
    told = 0
    for _ in run.steps():
        if streamer is not None:
            for token in run.emitted[0][told:]:
                streamer.put(torch.tensor([token]))
            told = len(run.emitted[0])


def _sequences(input_ids: Tensor, emitted: list[list[int]], filler: int) -> Tensor:
    """[batch, prompt + longest text] int64: prompts and texts; shorter texts are filled up with `filler`."""
    longest = max(map(len, emitted))
    new = torch.tensor([row + [filler] * (longest - len(row)) for row in emitted])
    return torch.cat([input_ids, new.to(input_ids.device)], 1)


def _by_token(notes: list[Tensor], filler: int, device: torch.device) -> list[tuple[Tensor, ...]]:
    """For each note, its [batch, vocab] at every new token.

    Args:
        notes: [new tokens, note, vocab] of each row.
        filler: the token that alone is possible where a row's text has ended.
    """
    longest, possible = max(map(len, notes)), torch.arange(notes[0].shape[2]) == filler
    ended = torch.where(possible, 0.0, -torch.inf).expand(longest, *notes[0].shape[1:])
    rows = torch.stack([torch.cat([row, ended[len(row) :]]) for row in notes], 2).to(device)
    return [note.unbind() for note in rows.unbind(1)]
