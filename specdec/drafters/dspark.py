"""DSpark: DFlash's block, corrected by the token before, and a confidence that tells where to stop (arXiv:2607.05147)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from specdec.checks import as_float
from specdec.drafters.block import ByDepth
from specdec.drafters.block_files import BlockFile
from specdec.drafters.dflash import DFlashDrafter, DFlashNet
from specdec.trees.base import TreePolicy


class MarkovHead(nn.Module):
    """What the token before adds to the logits: W2 W1[token], perhaps gated by the slot's state.

    Args:
        tokens: how many tokens may come before.
        vocab: how many tokens are drafted.
        rank: size of a row of W1.
        hidden: size of a slot's state; None for no gate.
    """

    def __init__(self, tokens: int, vocab: int, rank: int, hidden: int | None = None):
        super().__init__()
        self.markov_w1, self.markov_w2 = nn.Embedding(tokens, rank), nn.Linear(rank, vocab, bias=False)
        self.gate_proj = None if hidden is None else nn.Linear(hidden + rank, rank)

    def forward(self, states: Tensor, tokens: Tensor) -> Tensor:
        """[batch, n, vocab], for the states of slots [batch, n, hidden] and tokens [batch, n] int64."""
        x = self.markov_w1(tokens)
        if self.gate_proj is not None:
            x = x * torch.sigmoid(self.gate_proj(torch.cat([states, x], -1)))
        return self.markov_w2(x)


class ConfidenceHead(nn.Module):
    """The probability that a slot's token is accepted, from the slot's state and perhaps the token before."""

    def __init__(self, width: int):
        super().__init__()
        self.proj = nn.Linear(width, 1)

    def forward(self, features: Tensor) -> Tensor:
        """[batch, n], of [batch, n, width]."""
        return torch.sigmoid(self.proj(features))[..., 0]


class DSparkNet(DFlashNet):
    """The network.

    Args:
        tokens: how many tokens the target has.
        rank: size of the vectors of tokens in the Markov head; 0 for no head.
        gated: whether the slot's state gates them.
        confident: whether there is a confidence head.
        confident_of_tokens: whether that reads the token before, too.
        options: what a `DFlashNet` is made of.
    """

    def __init__(
        self,
        *,
        tokens: int,
        rank: int,
        gated: bool = False,
        confident: bool = False,
        confident_of_tokens: bool = True,
        **options: Any,
    ):
        super().__init__(**options)
        hidden, vocab = self.config.hidden_size, tokens if self.vocab is None else self.vocab
        self.confident, self.confident_of_tokens = confident, confident_of_tokens
        self.markov_head = MarkovHead(tokens, vocab, rank, hidden if gated else None) if rank else None
        self.confidence_head = ConfidenceHead(hidden + rank * confident_of_tokens) if confident else None

    def logits(self, found: ByDepth, tokens: Tensor) -> Tensor:
        if self.markov_head is None:
            return found.logits
        return found.logits + self.markov_head(found.states, tokens)

    def confidence(self, found: ByDepth, tokens: Tensor) -> Tensor:
        assert found.states is not None and self.confidence_head is not None
        if not self.confident_of_tokens:
            return self.confidence_head(found.states)
        assert self.markov_head is not None
        return self.confidence_head(torch.cat([found.states, self.markov_head.markov_w1(tokens)], -1))


class DSparkDrafter(DFlashDrafter):
    """Drafts with a DSpark network: a node's law depends on its depth and on its parent's token.

    Args:
        net: the network.
        tree: the tree policy, at most as deep as the block; by default a chain of as many tokens.
        confidence: nodes whose children the network expects to be accepted less probably than this have none. The text's
            law stays the target's: the expectation is computed from the block and the node's own token, before a child is
            drawn, so whether a child exists tells nothing about its token. None: never stop.
    """

    kind = DSparkNet
    net: DSparkNet
    method = "dspark"

    def __init__(self, net: DSparkNet, tree: TreePolicy | None = None, confidence: float | None = None):
        super().__init__(net, tree)
        if confidence is not None:
            confidence = as_float("confidence", confidence, "[0, 1]")
            if not net.confident:
                raise ValueError(f"confidence={confidence}: the network has no confidence head; leave it out.")
        self._confidence = confidence

    @property
    def confidence(self) -> float | None:
        return self._confidence

    @staticmethod
    def _net_for(file: BlockFile) -> DSparkNet:
        tensors, kind = file.tensors, file.keys.get("markov_head_type", "vanilla")
        if kind not in ("vanilla", "gated"):
            raise ValueError(f"a Markov head of type {kind} cannot be read; vanilla and gated ones can.")
        first, sure = (tensors.get(f"{name}.weight") for name in ("markov_head.markov_w1", "confidence_head.proj"))
        if first is not None and len(first) != file.vocab:
            raise ValueError(
                f"it knows {len(first)} tokens, the target {file.vocab}; use a draft made for this target."
            )
        rank = 0 if first is None else first.shape[1]
        of_tokens = sure is not None and sure.shape[1] > file.arguments["state_size"]
        heads = {
            "rank": rank,
            "gated": kind == "gated",
            "confident": sure is not None,
            "confident_of_tokens": of_tokens,
        }
        return DSparkNet(tokens=file.vocab, **heads, **file.arguments)

    def _head_keys(self) -> dict[str, Any]:
        markov = self.net.markov_head
        return {
            "markov_rank": 0 if markov is None else markov.markov_w1.embedding_dim,
            "markov_head_type": "vanilla" if markov is None or markov.gate_proj is None else "gated",
            "enable_confidence_head": self.net.confident,
            "confidence_head_with_markov": self.net.confident_of_tokens,
        }
