"""A draft model with another tokenizer than the target's: it drafts the tokens that both vocabularies have.

Token-level intersection (Timor et al., arXiv:2502.05202, algorithm 4): the draft's law is restricted to the shared tokens and
renormalised. Tokens are drawn from that law, and it is the one recorded, so rules see an ordinary draft and stay lossless. The
tokens that the draft reads affect only how good its drafts are.

Deviations: tokens are the same if their bytes are, not if the two tokenizers spell them alike ("Ġthe", "▁the"); the tokens for
the beginning and the end of a text are the same too. The draft reads one token for each of the target's, as any draft does.
For a token that it does not have, it reads the last of its own tokens for the same text.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.models.causal_lm import CausalLM

_LEAST = 0.05  # least share of the target's tokens: with fewer, a draft rarely has the token that comes next
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
# how byte-level BPE spells bytes
_BYTE_OF = {chr(b): b for b in _PRINTABLE} | {chr(256 + i): b for i, b in enumerate(_OTHERS)}


class TranslatedModel(CausalLM):
    """A draft model that reads and predicts the tokens of a target with another tokenizer.

    Args:
        model: the draft model.
        vocab: size of the target's vocabulary.
        target_tokenizer, draft_tokenizer: tokenizers of transformers.
    """

    def __init__(self, model: PreTrainedModel, vocab: int, target_tokenizer: Any, draft_tokenizer: Any):
        super().__init__(model)
        self.reads = vocab, target_tokenizer
        sizes = vocab, self.vocab, len(target_tokenizer), len(draft_tokenizer)
        ids, shared = _translation(target_tokenizer, draft_tokenizer, sizes)
        self._ids, self._unshared = ids.to(self.device), ~shared.to(self.device)

    def translate(self, tokens: Tensor) -> Tensor:
        return self._ids[tokens]

    def translate_back(self, logits: Tensor) -> Tensor:
        return logits[..., self._ids].masked_fill(self._unshared, -torch.inf)


@lru_cache(maxsize=4)
def _translation(
    target_tokenizer: Any, draft_tokenizer: Any, sizes: tuple[int, int, int, int]
) -> tuple[Tensor, Tensor]:
    """For each id of the target [vocab]: the draft's id (int64), and whether it is the same token (bool).

    Args:
        target_tokenizer, draft_tokenizer: tokenizers of transformers.
        sizes: of the target's and the draft's vocabulary, as models and as tokenizers. Those of tokenizers are part of the
            key of the cache, as tokens may be added.
    """
    theirs, ours = _texts(target_tokenizer, sizes[0]), _texts(draft_tokenizer, sizes[1])
    by_text = {text: token for token, text in sorted(ours.items())}
    same = {token: by_text[text] for token, text in theirs.items() if text in by_text}
    for role in ("bos_token_id", "eos_token_id"):
        pair = getattr(target_tokenizer, role, None), getattr(draft_tokenizer, role, None)
        if pair[0] in theirs and pair[1] in ours:
            same[pair[0]] = pair[1]
    if len(same) < _LEAST * len(theirs):
        raise ValueError(
            f"The draft's tokenizer has {len(same)} of the target's {len(theirs)} tokens ({len(same) / len(theirs):.1%}); "
            f"at least {_LEAST:.0%} are needed to draft with. Use a draft model whose vocabulary is closer to the target's."
        )
    other = [token for token in theirs if token not in same]
    texts = [theirs[token].decode(errors="replace") for token in other]
    spelt = draft_tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    known = {**same, **{token: ids[-1] for token, ids in zip(other, spelt, strict=True) if ids}}
    tokens = range(sizes[0])
    return torch.tensor([known.get(t, 0) for t in tokens]), torch.tensor([t in same for t in tokens])


def _texts(tokenizer: Any, vocab: int) -> dict[int, bytes]:
    """The bytes that each token adds to a text, for ids below `vocab`."""
    words = tokenizer.get_vocab()
    sentencepiece, byte_level = "▁" in words, "Ġ" in words

    def text(word: str) -> bytes:
        if sentencepiece:
            byte = re.fullmatch("<0x([0-9A-F]{2})>", word)
            return bytes([int(byte[1], 16)]) if byte else word.replace("▁", " ").encode()
        if byte_level and all(character in _BYTE_OF for character in word):
            return bytes(_BYTE_OF[character] for character in word)
        return word.encode()

    return {token: text(word) for word, token in words.items() if token < vocab}
