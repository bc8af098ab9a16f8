"""transformers' own call, decoded here: `model.generate(**inputs, custom_generate=specdec.custom_generate(drafter))`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import EosTokenCriteria, GenerationConfig, MaxLengthCriteria, PreTrainedModel, StoppingCriteriaList
from transformers.generation.utils import GenerateDecoderOnlyOutput

from specdec.decoding import Decoding
from specdec.drafters.drafter import Drafter
from specdec.engine import Engine
from specdec.inputs import as_engine, as_target
from specdec.rules import SiblingRejection
from specdec.rules.rule import Rule
from specdec.sampling import Sampling, split
from specdec.trace import Trace

_READ = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "cache_position"}
_OTHER_CACHES = {"quantized", "offloaded", "offloaded_static", "offloaded_hybrid", "offloaded_hybrid_chunked"}
_OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


@dataclass
class SpeculativeOutput(GenerateDecoderOnlyOutput):
    """`sequences`, and the trace of the run: `out.trace.summary()`."""

    trace: Trace | None = None


def custom_generate(
    drafter: Drafter | None = None,
    *,
    rule: Rule = SiblingRejection(),
    seed: int | None = None,
    tokenizer: Any = None,
    engine: Engine | Literal["eager", "graph", "compile"] = "eager",
) -> Callable[..., Tensor | SpeculativeOutput]:
    """A decoding loop for `model.generate`, which returns what it returns; its other arguments mean what they mean there.

    >>> model.generate(**inputs, do_sample=True, custom_generate=specdec.custom_generate(ModelDrafter(draft)))

    Greedy search and sampling, with any logits processors and stopping criteria. Criteria are asked row by row, for every
    token of a step, and the text is cut where they say so. What is not supported is refused: beams, assistants, scores and
    other outputs of the model, caches to go on from. The cache is specdec's own, and not returned. Stop strings are given as
    `stopping_criteria=[StopStringCriteria(tokenizer, strings)]`, as transformers hands its tokenizer to its own loops only.

    Args:
        drafter, rule, tokenizer, engine: as in `specdec.generate`. An engine is kept from call to call.
        seed: of the sampled tokens; None draws one from torch's global generator at each call, so that
            `torch.manual_seed` repeats a run.
    """
    engine = as_engine(engine)

    def decode(
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: list[Any],
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Tensor | SpeculativeOutput:
        vocab = as_target(model).vocab  # what is wrong with a model comes before what its arguments are
        asked, config, batch = sys._getframe(1).f_locals, generation_config, len(input_ids)
        streamer = asked.get("streamer")  # which only its own loops are given, and two more that `_check` looks for
        _check(config, model_kwargs, asked, batch)
        mask = _mask(input_ids, **model_kwargs)
        stop_tokens, limit, others = _ends(stopping_criteria, batch)
        law, processors = split(config, logits_processor)
        rows, padding = ([ids[own] for ids, own in zip(input_ids, part, strict=True)] for part in (mask, ~mask))
        drawn = int(torch.randint(2**62, ())) if seed is None and config.do_sample else seed or 0
        run = Decoding(
            model, rows, drafter, rule=rule, sampling=_Prepared(*law.filters, processors, padding),
            max_new_tokens=max(limit - input_ids.shape[1], 1), tokenizer=tokenizer, seed=drawn, engine=engine,
            stop_tokens=[token for token in stop_tokens if 0 <= token < vocab],  # others, such as -1, end no text there
        )  # fmt: skip
        _finish(run, others, input_ids, streamer)
        sequences: Any = _sequences(input_ids, run.emitted, config.pad_token_id, stop_tokens)
        return SpeculativeOutput(sequences, trace=run.trace) if config.return_dict_in_generate else sequences

    return decode


@dataclass(frozen=True, eq=False)
class _Prepared(Sampling):
    """Sampling with the processors that transformers has made for the batch."""

    padding: list[Tensor] = field(default_factory=list)  # of each row, before its prompt

    def bind(self, model: Any, prompts: Any, max_new_tokens: int) -> tuple[Sampling, list[tuple[Any, ...]]]:
        batch = len(self.padding)
        rows = [
            tuple(partial(_of_row, row, batch, own, p) for p in self.processors) for row, own in enumerate(self.padding)
        ]
        return Sampling(*self.filters), rows


def _of_row(row: int, batch: int, padding: Tensor, processor: Any, text: Tensor, scores: Tensor) -> Tensor:
    """[1, vocab]: processors may count padding, and know the rows by their place, so this text stands in all of them."""
    whole = torch.cat([padding.to(text), text[0]])
    return processor(whole.repeat(batch, 1), scores.repeat(batch, 1))[row : row + 1]


def _check(config: GenerationConfig, model_kwargs: dict[str, Any], asked: dict[str, Any], batch: int) -> None:
    """Refuse what would be left out in silence."""
    if asked.get("assistant_model") is not None:
        raise ValueError("assistant_model: give it to specdec instead, custom_generate(ModelDrafter(assistant_model)).")
    if asked.get("synced_gpus"):
        raise ValueError(
            "synced_gpus: processes take as many steps here as their own texts need; gather the model's weights in each."
        )
    if config.cache_implementation in _OTHER_CACHES:
        raise ValueError(
            f"cache_implementation={config.cache_implementation!r}: specdec has a cache of its own, in full and on the "
            "model's device; leave it out."
        )
    if asked.get("streamer") is not None and batch > 1:
        raise ValueError(
            f"streamer with {batch} prompts: their texts do not grow in step; stream one prompt at a time."
        )
    outputs = [name for name in _OUTPUTS if config.return_dict_in_generate and getattr(config, name)]
    if outputs:
        raise ValueError(f"{outputs}: the loop does not keep them; leave them out, and run the model on `sequences`.")
    unread = _unread(model_kwargs)
    if unread:
        raise ValueError(
            f"{unread}: only input_ids and attention_mask are read; leave out what a text alone does not need."
        )
    cache = model_kwargs.get("past_key_values")
    if cache is not None and (getattr(cache, "_is_user_defined", False) or cache.get_seq_length()):
        raise ValueError(
            "past_key_values: specdec has a cache of its own and does not go on from another; leave it out."
        )


def _unread(model_kwargs: dict[str, Any]) -> list[str]:
    """What else the model is to read. Images and the like reach us encoded: in a dict by kind, empty for a text alone."""
    given = {name: value for name, value in model_kwargs.items() if value is not None and name not in _READ}
    encoded = given.pop("mm_encoder_outputs", {})
    return sorted([*given, *(f"{kind} inputs such as pixel_values" for kind in encoded)])


def _mask(
    input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None, **_: Any
) -> Tensor:
    """[batch, length] bool: the tokens that are no padding, all of which comes first."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids)
    if mask.shape != input_ids.shape or ((mask != 0) & (mask != 1)).any() or (mask.diff(dim=1) < 0).any():
        raise ValueError(
            "attention_mask must be 0 for padding on the left of each prompt and 1 after it; tokenize with "
            "padding_side='left'."
        )
    if position_ids is not None and (mask * (position_ids - mask.cumsum(1) + 1)).any():
        raise ValueError("position_ids are not 0, 1, 2, ... from the first token of each prompt on; leave them out.")
    return mask.bool()


def _ends(criteria: StoppingCriteriaList, batch: int) -> tuple[tuple[int, ...], int, StoppingCriteriaList]:
    """Tokens that end a text, the length that does, and what else may."""
    tokens = [token for c in criteria if isinstance(c, EosTokenCriteria) for token in c.eos_token_id.tolist()]
    limit = min(c.max_length for c in criteria if isinstance(c, MaxLengthCriteria))
    others = StoppingCriteriaList(c for c in criteria if not isinstance(c, (EosTokenCriteria, MaxLengthCriteria)))
    if others and batch > 1 and not tokens:
        raise ValueError(
            f"stopping_criteria with {batch} prompts and no EOS: transformers pads no row that has ended then, but goes on "
            "with it; set eos_token_id, or pass one prompt at a time."
        )
    return tuple(tokens), limit, others


def _finish(run: Decoding, criteria: StoppingCriteriaList, input_ids: Tensor, streamer: Any) -> None:
    """Decode to the end, asking the criteria and serving the streamer after each step."""
    while not run.finished:
        run.step()
        if criteria:
            _cut(run, criteria, input_ids)
        if streamer is not None:
            for token in run.emitted[0][-run.trace.steps[-1].emitted[0] :]:
                streamer.put(torch.tensor([token]))
    if streamer is not None:
        streamer.end()


def _cut(run: Decoding, criteria: StoppingCriteriaList, input_ids: Tensor) -> None:
    """Ask about every token of the last step, and end the texts that are done."""
    for row, count in enumerate(run.trace.steps[-1].emitted):
        text = torch.cat([input_ids[row], torch.tensor(run.emitted[row], dtype=torch.int64).to(input_ids)])
        for kept in range(1, count + 1):
            until = text[: len(text) - count + kept].repeat(len(input_ids), 1)
            if criteria(until, None)[row]:  # type: ignore[arg-type] - its stub wants a LongTensor
                run.end(row, kept)
                break


def _sequences(
    input_ids: Tensor, emitted: list[list[int]], pad_token: int | None, stop_tokens: tuple[int, ...]
) -> Tensor:
    """[batch, prompt + longest text] int64: texts that are shorter end in padding, which is the first EOS if it is not set."""
    longest = max(map(len, emitted))
    filler = pad_token if pad_token is not None else next(iter(stop_tokens), 0)  # no row is shorter without stop tokens
    new = torch.tensor([row + [filler] * (longest - len(row)) for row in emitted])
    return torch.cat([input_ids, new.to(input_ids.device)], 1)
