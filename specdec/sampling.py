"""Sampling: the settings that turn logits into the law that tokens are drawn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from specdec.checks import as_float, as_int, as_tuple, check_kind, put
from specdec.huggingface.generation_config import split, transformers_processors
from specdec.processors import Processors, check_copies
from specdec_kernels.reference.law import probabilities

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BLOCK = 2**19  # elements: 2 MB of float32
_COLDEST, _HOTTEST = 1e-6, 1e38  # temperatures beyond would overflow float32


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen from the target's logits: processors, temperature, top-k, top-p, min-p, in this order.

    >>> Sampling()  # greedy
    >>> Sampling(temperature=0.7, top_p=0.9)
    >>> Sampling.from_generation_config(GenerationConfig(do_sample=True, repetition_penalty=1.2))

    Args:
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_k: keep the k largest logits (ties with the k-th stay, as in transformers).
        top_p: keep the smallest set of largest probabilities with mass >= top_p. Ties with the smallest one kept stay
            too; transformers keeps some of them, depending on its sort.
        min_p: keep tokens at least this fraction as probable as the most probable one.
        processors: transformers `LogitsProcessor`s, called with the text up to each node that a rule visits. One that keeps
            state (a grammar, a counter) follows each text on a copy, and yours stays as it is. One that cannot be copied
            is called itself, and refused if it would have to follow several texts. All texts share state in global
            variables and on classes: keep it in the processor. Rules that decide from the root down take one copy per
            row, others one per visited node: give what is large and never changes (an automaton) a `__deepcopy__` that
            returns itself.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    processors: tuple[Any, ...] = ()
    # Ignored in ==: the other fields state the law.
    generation_config: GenerationConfig | None = field(default=None, kw_only=True, repr=False, compare=False)

    def __post_init__(self) -> None:
        if callable(self.processors):
            raise ValueError(f"processors is one {type(self.processors).__name__}; pass a sequence of them.")
        cure = f"it must be finite and at least {_COLDEST}, or 0 for greedy decoding"
        every = "use None to keep every token"
        put(
            self,
            temperature=as_float("temperature", self.temperature, f"[0, {_HOTTEST:g}]", cure),
            top_k=None if self.top_k is None else as_int("top_k", self.top_k, 1, cure=every),
            top_p=None if self.top_p is None else as_float("top_p", self.top_p, "(0, 1]", every),
            min_p=None if self.min_p is None else as_float("min_p", self.min_p, "[0, 1]", every),
            processors=as_tuple("processors", self.processors, "logits processors", "pass a sequence of them"),
        )
        if 0 < self.temperature < _COLDEST:
            raise ValueError(f"temperature={self.temperature}: {cure}.")
        for name in ("top_k", "top_p", "min_p"):
            if self.temperature == 0 and (value := getattr(self, name)) is not None:
                raise ValueError(
                    f"{name}={value} at temperature=0, which is greedy and leaves nothing to choose from; pass "
                    f"temperature=1.0 to sample, or leave {name} out."
                )
        if self.generation_config is not None:
            check_kind(
                "generation_config", self.generation_config, GenerationConfig, "pass a transformers GenerationConfig"
            )
        for i, processor in enumerate(self.processors):
            if isinstance(processor, type):
                name = processor.__name__
                raise ValueError(f"processors[{i}] is the class {name}; pass an instance, {name}(...).")
            if not callable(processor):
                raise ValueError(f"processors[{i}] is {processor!r}; pass transformers LogitsProcessors.")

    @classmethod
    def from_generation_config(cls, config: GenerationConfig, **overrides: Any) -> Sampling:
        """The law of `model.generate(generation_config=config, **overrides)`.

        The processors are the ones that transformers itself builds from the config, the target's defaults and the
        prompt, so they are built per row when generation starts.
        """
        check_kind("config", config, GenerationConfig, "pass a transformers GenerationConfig")
        if unknown := [name for name in overrides if not hasattr(config, name)]:
            close = get_close_matches(unknown[0], vars(config), n=1)
            cure = f"did you mean {close[0]!r}?" if close else "leave it out."
            raise ValueError(f"{unknown[0]}={overrides[unknown[0]]!r}: GenerationConfig has no such field; {cure}")
        return cls(generation_config=type(config).from_dict({**config.to_dict(), **overrides}) if overrides else config)

    def bind(
        self, model: PreTrainedModel | None, prompts: Sequence[Tensor], budgets: Sequence[int], tokenizer: Any = None
    ) -> tuple[Sampling, Sequence[Processors]]:
        """This sampling with every field resolved, `generation_config` included, and each row's processors.

        Args:
            budgets: most new tokens of each prompt.
        """
        if self.generation_config is None:
            check_copies(self.processors, len(prompts))
            return self, [Processors(self.processors)] * len(prompts)
        if model is None:
            raise ValueError("Sampling.from_generation_config needs a transformers target; give the fields by hand.")
        bound, rows = self, []
        for prompt, budget in zip(prompts, budgets, strict=True):
            config, built = transformers_processors(model, prompt, self.generation_config, budget, tokenizer)
            if config.max_time is not None:
                raise ValueError(
                    f"max_time={config.max_time}: there is no time limit here; leave `stream` when it is reached."
                )
            fields, processors = split(config, built)
            bound = replace(Sampling(generation_config=config), **fields)
            rows.append(Processors(processors))
        return bound, rows

    def probabilities(self, logits: Tensor) -> Tensor:
        """[..., vocab], at least float32: the law that `logits` [..., vocab] give, without processors."""
        rows = logits.reshape(-1, logits.shape[-1])
        # Blocks that fit into a CPU's caches are several times faster than passes over everything.
        block = max(_BLOCK // rows.shape[1], 1) if rows.device.type == "cpu" else len(rows)
        return torch.cat([probabilities(part, *self.filters) for part in rows.split(block)]).view(logits.shape)

    def scores(self, logits: Tensor) -> Tensor:
        """[..., vocab], at least float32: `logits` [..., vocab] / temperature, and -inf where a filter leaves a token out.

        Their softmax is `probabilities`, and transformers' warpers give the same. At temperature 0: the logits themselves.
        """
        scores = logits if logits.dtype == torch.float64 else logits.float()
        if self.temperature == 0:
            return scores
        # Top-k alone keeps the same tokens at every temperature, and at a high one none of their probabilities rounds to 0.
        by_mass = (self.top_p or 1) < 1 or self.min_p
        law = (self if by_mass else replace(self, temperature=_HOTTEST)).probabilities(scores)
        return (scores / self.temperature).masked_fill(law == 0, -torch.inf)

    @property
    def filters(self) -> tuple[float, int | None, float | None, float | None]:
        """Temperature, top-k, top-p and min-p, as `specdec_kernels` takes them."""
        return self.temperature, self.top_k, self.top_p, self.min_p
