"""Short causal convolutions over the nodes of a tree: each node sees its own input and those before it on its path.

A convolution over k tokens needs the last k - 1 inputs of the text, and the input of every node. Which of them a node sees is a
matter of the tree alone, and is worked out once for all layers (`windows`).
"""

from __future__ import annotations

import torch
from torch import Tensor


def windows(parents: Tensor, size: int) -> Tensor:
    """Where the inputs are that each node sees, the oldest first, in [last size - 1 inputs of the text | inputs of the nodes].

    Args:
        parents: [batch, all] int64: -1 for the root; parents come first.
        size: how many inputs a node sees, its own included.

    Returns:
        [batch, all, size] int64.
    """
    past = size - 1
    before = torch.where(parents < 0, past - 1, parents + past)
    text = torch.arange(-1, past - 1, device=parents.device).clamp(min=0).expand(len(parents), -1)
    before = torch.cat([text, before], 1)  # [batch, past + all]: the place before each place
    places = [torch.arange(past, before.shape[1], device=parents.device).expand_as(parents)]
    for _ in range(past):
        places.append(before.gather(1, places[-1]))
    return torch.stack(places[::-1], 2)


def convolution(
    inputs: Tensor,  # [batch, size - 1 + all, channel]: the last of the text, then those of all nodes
    weight: Tensor,  # [channel, size]
    bias: Tensor | None,  # [channel]
    places: Tensor,  # [batch, node, size] int64: `windows` of the nodes for which it is computed
) -> Tensor:
    """[batch, node, channel], in the dtype of the weight."""
    rows = torch.arange(len(inputs), device=inputs.device)[:, None, None]
    out = torch.einsum("bikc,ck->bic", inputs[rows, places].to(weight.dtype), weight)
    return out if bias is None else out + bias


def fold_convolution(
    inputs: Tensor,  # [batch, size - 1 + all, channel]: the last of the text, which are changed, then those of all nodes
    size: int,  # how many inputs a node sees, its own included
    path: Tensor,  # [batch, n] int64: nodes from the root down
    count: Tensor,  # [batch] int64 <= n: how many nodes of the path are kept
) -> None:
    """Let the last inputs of the text be those at the end of the first count[b] nodes of the path."""
    past = size - 1
    text = torch.arange(past, device=path.device).expand(len(path), -1)
    rows, line = torch.arange(len(path), device=path.device)[:, None], torch.cat([text, path + past], 1)
    inputs[:, :past] = inputs[rows, line.gather(1, count[:, None] + text)]
