"""A small model drafts for a large one (Leviathan et al., arXiv:2211.17192), along any tree policy."""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.checks import wrong_kind
from specdec.drafters.base import Acceptance, Context
from specdec.drafters.tree_drafter import TreeDrafter
from specdec.drafters.vocabulary import TranslatedModel
from specdec.models.target import CachedModel, Target
from specdec.tree import chain
from specdec.trees.base import Frontier, TreePolicy

_AFTER_OWN_DRAFT = 2  # tokens it may not have read of a text that went on as it drafted: an accepted leaf, and the root


class ModelDrafter(TreeDrafter):
    """Drafts with a Hugging Face causal LM.

    Args:
        model: the draft model, any that could be a target.
        tree: the tree policy; a chain of 4 by default.
        tokenizer: the draft's own tokenizer, compared with that of generate(tokenizer=...). Needed when it is not the
            target's (the draft then drafts the tokens that both have, see `specdec.drafters.vocabulary`), and when the
            vocabularies differ in size, to check that one is the other plus padding.
    """

    capturable_scores = True

    def __init__(self, model: PreTrainedModel, tree: TreePolicy | None = None, tokenizer: Any = None):
        super().__init__(tree)
        if tokenizer is not None and not hasattr(tokenizer, "get_vocab"):
            cure = "pass the draft's own, such as AutoTokenizer.from_pretrained(name)"
            raise wrong_kind("tokenizer", tokenizer, cure)
        self.model, self.tokenizer = model, tokenizer
        self._cached = self._alone = CachedModel(model)

    def __repr__(self) -> str:
        return f"ModelDrafter({type(self.model).__name__}, {self.tree})"

    def patched(self) -> AbstractContextManager[None]:
        return self._cached.patch

    def start(self, target: Target, context: Context) -> None:
        self._cached = self._in_tokens_of(target.vocab, context.tokenizer)
        limit, capacity = self._cached.context_length, context.tokens.shape[1]
        if limit is not None and context.max_length > limit:
            raise ValueError(
                f"The draft model reads at most {limit} tokens{self._cached.context_reason}, but a text may grow to "
                f"{context.max_length}; lower max_new_tokens, shorten the prompt or use a draft model with a longer context."
            )
        nodes = self.spec(context.sampling).nodes
        self.remember(torch.full_like(context.lengths, -1)[:, None], nodes)
        self._cached.begin(context, capacity + nodes)
        if context.engine.compiled:
            self._cached.compile()

    def commit(self, acceptance: Acceptance) -> None:
        super().commit(acceptance)
        assert self.asked is not None  # since `start`
        order = self.asked.gather(1, acceptance.path)
        position = torch.arange(order.shape[1], device=order.device)
        kept = (order >= 0) & (position < acceptance.keep[:, None])  # an accepted leaf was drawn but never read
        self._cached.cache.keep(order.clamp(min=0), kept.sum(1))
        self.asked.fill_(-1)  # in steps in which it is not asked for a draft there is nothing new to keep

    def prepare(self, frontier: Frontier, context: Context) -> Hashable:
        cached, longest = self._cached, context.longest
        if frontier.topology.depth:
            cached.longest = longest - 1
            return longest
        # >= 1: the root, an accepted leaf before it, and what was emitted while it did not draft
        unread = _AFTER_OWN_DRAFT if context.fixed else int((context.lengths - cached.cache.lengths).max())
        if context.engine.fixed:
            unread = min(1 << (unread - 1).bit_length(), longest)  # few shapes: each is compiled
        self._unread, cached.longest = unread, max(longest - unread, 0)
        return longest, unread

    def _read_root(self, context: Context) -> Tensor:
        """Commit what the draft has not read yet up to the root; [batch, 1, vocab] logits after the root."""
        cache, lengths = self._cached.cache, context.lengths
        # shorter rows re-read their last tokens, so that all read `_unread`
        cache.lengths.copy_((lengths - self._unread).clamp(min=0))
        tokens = self._cached.pending(context.tokens, self._unread)
        logits = self._cached.forward(tokens, chain(len(tokens), self._unread, tokens.device))
        last = lengths - 1 - cache.lengths
        cache.lengths.copy_(lengths - 1)
        return logits.gather(1, last[:, None, None].expand(-1, 1, logits.shape[2]))

    def score(self, frontier: Frontier, context: Context) -> Tensor:
        if frontier.topology.depth == 0:
            logits = self._read_root(context)
        else:
            logits = self._cached.forward(frontier.tokens, frontier.topology)
        extra = context.vocab - logits.shape[-1]
        return torch.nn.functional.pad(logits, (0, extra), value=-torch.inf) if extra else logits

    def _in_tokens_of(self, vocab: int, target_tokenizer: Any) -> CachedModel:
        """The draft model as one that reads and predicts the target's tokens."""
        ours = self._alone.vocab
        if self.tokenizer is not None and target_tokenizer is not None:
            if self.tokenizer.get_vocab() != target_tokenizer.get_vocab():
                last = self._cached
                if isinstance(last, TranslatedModel) and last.translates == (vocab, target_tokenizer):
                    return last
                return TranslatedModel(self.model, vocab, target_tokenizer, self.tokenizer)
        elif ours != vocab:
            raise ValueError(
                f"The draft's vocabulary has {ours} tokens, the target's {vocab}. Pass ModelDrafter(tokenizer=...) and "
                "generate(tokenizer=...): they tell whether the vocabularies differ by padding only or, if the tokenizers "
                "differ, which tokens both have."
            )
        return self._alone
