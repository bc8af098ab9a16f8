"""A small model drafts for a large one (Leviathan et al., arXiv:2211.17192), along any tree policy."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.batch import Batch
from specdec.checks import wrong_kind
from specdec.drafters.base import DraftRun
from specdec.drafters.tree_drafter import TreeDrafter, TreeDraftRun
from specdec.drafters.vocabulary import TranslatedModel
from specdec.models.cached_model import CachedModel
from specdec.models.causal_lm import CausalLM
from specdec.models.target import TargetRun
from specdec.outcome import Outcome
from specdec.trees.base import Frontier, TreePolicy

# After a step that it drafted for, the draft has at most two tokens to read: an accepted leaf and the root.
_AFTER_OWN_DRAFT = 2
_MANY = 16  # most that it reads in a step where shapes must recur; of more, the first are read as prompts are


class ModelDrafter(TreeDrafter):
    """Drafts with a Hugging Face causal LM.

    Args:
        model: the draft model, any that could be a target.
        tree: the tree policy; a chain of 4 by default.
        tokenizer: the draft's own tokenizer, which is compared with that of generate(tokenizer=...). Needed if it differs from
            the target's (the draft then drafts the tokens that both have, see `specdec.drafters.vocabulary`), and if the
            vocabularies differ in size, to check that one is the other plus padding.
    """

    capturable_scores = True

    def __init__(self, model: PreTrainedModel, tree: TreePolicy | None = None, tokenizer: Any = None):
        super().__init__(tree)
        if tokenizer is not None and not hasattr(tokenizer, "get_vocab"):
            cure = "pass the draft's own, such as AutoTokenizer.from_pretrained(name)"
            raise wrong_kind("tokenizer", tokenizer, cure)
        self.model, self.tokenizer = model, tokenizer
        self.lm, self.models = CausalLM(model), (model,)

    def __repr__(self) -> str:
        return f"ModelDrafter({type(self.model).__name__}, {self.tree})"

    def start(self, target: TargetRun, batch: Batch, last: DraftRun | None = None) -> DraftRun:
        lm = self._in_tokens_of(batch.vocab, batch.tokenizer)
        if lm.context_length is not None and batch.max_length > lm.context_length:
            raise ValueError(
                f"The draft model reads at most {lm.context_length} tokens{lm.context_reason}, but a text may grow to "
                f"{batch.max_length}; lower max_new_tokens, shorten the prompt or use a draft model with a longer context."
            )
        nodes = self.spec(batch.sampling).nodes
        known = last.cached if isinstance(last, ModelDraftRun) else None
        cached = lm.start(
            len(batch), batch.capacity + nodes, max(nodes, _AFTER_OWN_DRAFT), last=known, marks=batch.keep
        )
        return ModelDraftRun(self, batch, cached, last).begun(last)

    def _in_tokens_of(self, vocab: int, target_tokenizer: Any) -> CausalLM:
        """The draft model as one that reads and predicts the target's tokens."""
        ours = self.lm.vocab
        if self.tokenizer is not None and target_tokenizer is not None:
            if self.tokenizer.get_vocab() != target_tokenizer.get_vocab():
                return TranslatedModel(self.model, vocab, target_tokenizer, self.tokenizer)
        elif ours != vocab:
            raise ValueError(
                f"The draft's vocabulary has {ours} tokens, the target's {vocab}. Pass ModelDrafter(tokenizer=...) and "
                "generate(tokenizer=...): they tell whether the vocabularies differ by padding only or, if the tokenizers "
                "differ, which tokens both have."
            )
        return self.lm


class ModelDraftRun(TreeDraftRun):
    """A draft model at work, in a cache of its own."""

    def __init__(self, drafter: ModelDrafter, batch: Batch, cached: CachedModel, last: DraftRun | None):
        super().__init__(drafter, batch, last, cached)
        self.cached = cached

    @property
    def bytes(self) -> int:
        return self.cached.cache.bytes

    def enter(self, rows: list[int]) -> None:
        self.cached.enter(self.batch, rows)

    def reaches(self, row: int, wanted: int) -> int:
        return self.cached.cache.reaches(row, self.batch.host_lengths[row] - 1, wanted)

    def commit(self, outcome: Outcome) -> None:
        super().commit(outcome)
        order = self.asked.gather(1, outcome.path)
        position = torch.arange(order.shape[1], device=order.device)
        kept = (order >= 0) & (position < outcome.keep[:, None])  # an accepted leaf was drawn but never read
        self.cached.cache.keep(order.clamp(min=0), kept.sum(1))
        self.asked.fill_(-1)  # a step without a call of `propose` has nothing to keep

    def prepare(self, frontier: Frontier) -> Hashable:
        batch, room = self.batch, self.cached.cache.room
        if frontier.topology.depth:
            return None
        # At least 1: the root, perhaps an accepted leaf before it, and tokens of steps in which it did not draft.
        unread = _AFTER_OWN_DRAFT if batch.static else int((batch.lengths - self.cached.cache.lengths).max())
        fixed = self.cached.compiles or batch.stages.captures
        if fixed:
            # Two sizes, as each is compiled or captured.
            room = min(_MANY, room)
            unread = _AFTER_OWN_DRAFT if unread <= _AFTER_OWN_DRAFT else max(unread, room)
        if unread > room:
            self.cached.read(batch.tokens, {row: length - 1 for row, length in enumerate(batch.host_lengths)})
            unread = _AFTER_OWN_DRAFT if fixed else 1
        self._unread = unread
        return unread

    def score(self, frontier: Frontier) -> Tensor:
        if frontier.topology.depth == 0:
            logits = self._read_root()
        else:
            logits = self.cached.forward(frontier.tokens, frontier.topology, self.batch.longest - 1)
        extra = self.batch.vocab - logits.shape[-1]
        return torch.nn.functional.pad(logits, (0, extra), value=-torch.inf) if extra else logits

    def _read_root(self) -> Tensor:
        """Read all unread tokens up to the root, and return the logits [batch, 1, vocab] after the root."""
        batch, cache, unread = self.batch, self.cached.cache, self._unread
        tokens = self.cached.pending(batch.tokens, unread)
        # In rows with fewer unread tokens, those after the root are of no account.
        logits = self.cached.forward(tokens, batch.chain(unread), batch.longest - 1)
        before = batch.lengths - 1 - cache.lengths
        cache.advance(before)
        return logits.gather(1, before[:, None, None].expand(-1, 1, logits.shape[2]))
