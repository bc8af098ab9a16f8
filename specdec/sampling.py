"""Sampling: from logits to the law that tokens are drawn from.

The target's law after a node is a function of the logits there and, with processors, of the whole text up to there. It
is evaluated when a rule asks for it and not before: most nodes of a tree are never visited.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.configuration_utils import GenerationMode

import specdec_kernels
from specdec.checks import as_float, as_int, as_tuple, check_kind, put
from specdec.coins import RowCoins
from specdec.huggingface.call import LoopWithTokenizer
from specdec.processors import Processors, check_copies
from specdec.tree import DraftTree
from specdec_kernels.reference.law import probabilities
from specdec_kernels.reference.verify import walk

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from specdec.drafters.base import Context

_BLOCK = 2**19  # elements: 2 MB of float32
_COLDEST = 1e-6  # lower temperatures would overflow float32
# transformers' warpers, and the fields that say the same, in the order in which they are applied
_WARPERS = (
    ("TemperatureLogitsWarper", "temperature"),
    ("TopKLogitsWarper", "top_k"),
    ("TopPLogitsWarper", "top_p"),
    ("MinPLogitsWarper", "min_p"),
)


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
        processors: transformers `LogitsProcessor`s, called with the text up to each node that a rule visits. Those that keep
            state (a grammar, a counter) follow every text on copies of their own: yours stay as they are, except one that
            cannot be copied, which goes along with the text, and for which several texts at once are refused. State in
            global variables and on classes is not seen, and shared by all texts: keep it in the processor. Rules that
            decide from the root down take one copy per row, others one per visited node: for these give what is large
            and never changes (an automaton) a `__deepcopy__` that returns itself.
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
            temperature=as_float("temperature", self.temperature, "[0, 1e38]", cure),
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
        self, model: PreTrainedModel | None, prompts: Sequence[Tensor], max_new_tokens: int, tokenizer: Any = None
    ) -> tuple[Sampling, Sequence[Processors]]:
        """This sampling with every field resolved, `generation_config` included, and each row's processors."""
        if self.generation_config is None:
            check_copies(self.processors, len(prompts))
            return self, [Processors(self.processors)] * len(prompts)
        if model is None:
            raise ValueError("Sampling.from_generation_config needs a transformers target; give the fields by hand.")
        bound, rows = self, []
        for prompt in prompts:
            config, built = _transformers_processors(model, prompt, self.generation_config, max_new_tokens, tokenizer)
            if config.max_time is not None:
                raise ValueError(
                    f"max_time={config.max_time}: there is no time limit here; leave `stream` when it is reached."
                )
            bound, processors = split(config, built)
            rows.append(Processors(processors))
        return bound, rows

    def probabilities(self, logits: Tensor) -> Tensor:
        """The law [..., vocab] that `logits` [..., vocab] give, processors aside; at least float32."""
        rows = logits.reshape(-1, logits.shape[-1])
        # on a CPU in blocks that its caches hold: several times faster than one pass after the other over everything
        block = max(_BLOCK // rows.shape[1], 1) if rows.device.type == "cpu" else len(rows)
        return torch.cat([probabilities(part, *self.filters) for part in rows.split(block)]).view(logits.shape)

    @property
    def filters(self) -> tuple[float, int | None, float | None, float | None]:
        """What `specdec_kernels` is told: temperature, top-k, top-p, min-p."""
        return self.temperature, self.top_k, self.top_p, self.min_p


class TargetLaw:
    """The target's law after the nodes of a batch of trees, evaluated where it is asked for.

    Args:
        logits: [batch, node, vocab] the target's raw logits.
        tree: the trees they belong to.
        context: text so far, sampling and processors.
        top_down: whether nothing but nodes of the accepted path will be asked for, so that processors go along it.
    """

    def __init__(self, logits: Tensor, tree: DraftTree, context: Context, top_down: bool = False):
        self._logits, self._tree, self._context, self._top_down = logits, tree, context, top_down
        self._rows, self.vocab = torch.arange(len(logits), device=logits.device), logits.shape[-1]
        self._no_law = torch.zeros_like(self._rows)  # [batch] int64: visited nodes without a law
        # (row, node) -> [vocab] scores, and the processors after the call for the text up to there
        self._known: dict[tuple[int, int], Tensor] = {}
        self._after: dict[tuple[int, int], Processors] = {}

    def at(self, nodes: Tensor, rows: Tensor | None = None) -> Tensor:
        """[len(nodes), vocab]: the laws at one node [batch] int64 of each row, or at any `nodes` of these `rows`."""
        rows = self._rows if rows is None else rows
        scores = self._logits[rows, nodes]
        if len(nodes) and self._context.processed:
            visited = zip(rows.tolist(), nodes.tolist(), strict=True)
            scores = torch.stack([self._processed(b, node) for b, node in visited])
        self._check(scores, rows)
        return self._context.sampling.probabilities(scores)

    def verify(self, tree: DraftTree, accept: Tensor, emit: Tensor, lenience: float) -> tuple[Tensor, Tensor, Tensor]:
        """Sibling rejection against this law: (path, accepted, token) of `specdec_kernels.reference.verify`.

        Args:
            tree: the trees.
            accept, emit: [batch, node] coins.
            lenience: the fraction of a child's law that the target's is compared with.
        """
        drafted = tree.tokens, tree.topology.children, tree.laws, tree.draft_probs, accept, emit, tree.topology.depth
        if self._logits.device.type not in specdec_kernels.DEVICES or self._context.processed:
            return walk(self.at, *drafted, lenience)
        kernel, filters = specdec_kernels.verify, self._context.sampling.filters
        path, accepted, token, invalid = kernel(self._logits, *drafted, *filters, lenience)
        self._no_law += invalid
        return path, accepted, token

    def row(self, row: int, coins: RowCoins) -> RowLaw:
        """The scalar face of one row."""
        return RowLaw(self, row, coins)

    def scores(self, row: int, node: int) -> Tensor:
        """[1, vocab]: processed logits at one node."""
        scores = self._processed(row, node) if self._context.processors[row] else self._logits[row, node]
        self._check(scores[None], self._rows[row : row + 1])
        return scores

    def probabilities(self, row: int, node: int) -> np.ndarray:
        """[vocab]: the law at one node of one row."""
        return self._context.sampling.probabilities(self.scores(row, node)).double().numpy(force=True)

    def processors(self, last: Tensor) -> list[Processors]:
        """Each row's after the text up to its node `last` [batch] int64: those that the next step begins with."""
        for row, node in enumerate(last.tolist()):
            self._processed(row, node)  # whatever the rule asked for
        return [self._processors(row, node) for row, node in enumerate(last.tolist())]

    def invalid(self) -> Tensor:
        """[batch] bool: rows in which a visited law was no law (NaN, or every token at -inf)."""
        return self._no_law > 0

    def _check(self, scores: Tensor, rows: Tensor) -> None:
        """Note the rows in which the largest of the scores is NaN or -inf: that is no law."""
        self._no_law.index_add_(0, rows, (~scores.amax(-1).isfinite()).long())

    def _processed(self, row: int, node: int) -> Tensor:
        """[vocab]: logits at one node as the row's processors leave them, which are asked once."""
        if (row, node) not in self._known:
            logits, text = self._logits[row, node], self._text(row, node)
            scores = (logits if logits.dtype == torch.float64 else logits.float())[None]
            if text is not None:
                before = self._processors(row, int(self._tree.topology.parents[row, node]))
                scores, self._after[row, node] = before(text, scores, last=self._top_down)
            self._known[row, node] = scores[0]
        return self._known[row, node]

    def _processors(self, row: int, node: int) -> Processors:
        """As they are after the last call along the path to a node; -1 is above the root."""
        while node >= 0 and (row, node) not in self._after:
            node = int(self._tree.topology.parents[row, node])
        return self._after.get((row, node), self._context.processors[row])

    def _text(self, row: int, node: int) -> Tensor | None:
        """The text up to a node; None if it is never emitted, as processors may refuse to go on from such a text."""
        if self._context.row_depths[row] < 0:  # it has ended
            return None
        path = self._tree.topology.ancestors[row, node].nonzero()[:, 0].tolist()
        drafted = self._tree.tokens[row, path[1:]]
        for above, token in zip(path, drafted.tolist(), strict=False):
            if token in self._context.stop_tokens or self._processed(row, above)[token] == -torch.inf:
                return None
        return torch.cat([self._context.tokens[row, : self._context.host_lengths[row]], drafted])


class RowLaw:
    """One row of the target's law, for specifications."""

    def __init__(self, law: TargetLaw, row: int, coins: RowCoins):
        self._law, self._row, self._coins, self.vocab = law, row, coins, law.vocab

    def probs(self, node: int) -> np.ndarray:
        """[vocab]: the target's law after the path to `node`, in the arithmetic of the coins."""
        return self._coins.law(self._law.probabilities(self._row, node))


def _transformers_processors(
    model: PreTrainedModel, prompt: Tensor, config: GenerationConfig, max_new_tokens: int, tokenizer: Any
):
    """(prepared config, processors) as `model.generate` would use them, by its public hook for custom decoding loops."""
    caught: list[Any] = []

    def catch(model, input_ids, logits_processor, stopping_criteria, generation_config, tokenizer=None, **kwargs):
        caught.append((generation_config, logits_processor))
        return input_ids

    run: Any = model.generate
    config = copy.deepcopy(config)
    config.max_new_tokens, config.max_length = max_new_tokens, None
    loop = LoopWithTokenizer(catch)
    run(prompt[None].to(model.device), generation_config=config, tokenizer=tokenizer, custom_generate=loop)
    return caught[0]


def split(config: GenerationConfig, built: Sequence[Any]) -> tuple[Sampling, tuple[Any, ...]]:
    """Native fields for the four common warpers where they come last, and everything before them as processors."""
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(
            f"The generation config asks for {mode.value.replace('_', ' ')} (num_beams={config.num_beams}): only "
            "greedy search and sampling can be drafted for; set num_beams=1, and nothing that belongs to another mode."
        )
    kept, native, place = list(built), {"temperature": 1.0 if config.do_sample else 0.0}, len(_WARPERS)
    while config.do_sample and kept and 0 <= _place(kept[-1]) < place:  # ours are applied last, and in this order
        place, warper = _place(kept[-1]), kept.pop()
        native[_WARPERS[place][1]] = getattr(warper, _WARPERS[place][1])
    return replace(Sampling(generation_config=config), **native), tuple(kept)


def _place(processor: Any) -> int:
    """Among the warpers that a field of `Sampling` can stand for; -1 if this is none."""
    plain = getattr(processor, "filter_value", -math.inf) == -math.inf
    plain = plain and getattr(processor, "min_tokens_to_keep", 1) == 1
    names = [name for name, _ in _WARPERS]
    return names.index(type(processor).__name__) if plain and type(processor).__name__ in names else -1
