"""Linear attention with decay, over the nodes of a tree and a state that holds the text before them. SSD (Mamba-2) is this.

A token decays the state and adds an outer product to it: S := exp(g) S + k v^T, and reads y = S^T q. So the state at node i
of a tree is that of the text, decayed by all nodes on the path, and what each node j on the path has added, decayed by those
after j. With G_i the sum of g along the path from the root to i, and S the state of the text,

    y_i = exp(G_i) S^T q_i + sum_j exp(G_i - G_j) (q_i . k_j) v_j          over j = i and the ancestors of i.

No node needs a state of its own: what it adds (k, v, g) is enough. Exponents are never positive, as decays are not.

SSD (Dao and Gu, arXiv:2405.21060) has this form with q = C, k = B, v = dt x and g = A dt. Decays may also be one per channel of
the key, as in Kimi Delta Attention (arXiv:2510.26692): S := exp(g)[:, None] S + k v^T. Trees by these masks: STree (Wu et al.,
arXiv:2505.14969).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def linear_attention(
    query: Tensor,  # [batch, node, key_head, dim]: of the last nodes of the tree, for which it is computed
    key: Tensor,  # [batch, all, key_head, dim]: of all nodes of the tree
    value: Tensor,  # [batch, all, head, value_dim]; head h reads and writes by the key head h // (heads per key head)
    decay: Tensor,  # [batch, all, head], or [batch, all, head, dim]: the logarithm, at most 0
    state: Tensor,  # [batch, head, dim, value_dim]: the state before the root, as if the text ended there
    ancestors: Tensor,  # [batch, all, all] bool: whether node j is node i or an ancestor of it; parents come first
    fold: Sequence[Tensor] | None = None,  # what `fold_linear_attention` takes after the state
) -> Tensor:
    """What the last nodes read, [batch, node, head, value_dim] in the dtype of the state, in which all is computed.

    With `fold`, that is done to the state first. A kernel then reads and writes a state once in a step: the nodes accepted in
    the last step enter it where those of this step read it.
    """
    if fold is not None:
        fold_linear_attention(state, *fold)
    query, key, value, decay = by_head(state, query, key, value, decay)
    total = path_decay(decay, ancestors)
    read = (query * total[:, :, -query.shape[2] :].exp()) @ state
    return (read + scores(query, key, total, ancestors) @ value).transpose(1, 2)


def fold_linear_attention(
    state: Tensor,  # [batch, head, dim, value_dim], contiguous: changed
    key: Tensor,  # [batch, all, key_head, dim]
    value: Tensor,  # [batch, all, head, value_dim]
    decay: Tensor,  # [batch, all, head], or [batch, all, head, dim]
    path: Tensor,  # [batch, n] int64: nodes from the root down
    count: Tensor,  # [batch] int64 <= n: how many nodes of the path are kept
) -> None:
    """Bring the state of each row to the end of the first count[b] nodes of its path; 0 leaves it exactly as it is."""
    rows, kept = torch.arange(len(path), device=path.device)[:, None], torch.arange(path.shape[1], device=path.device)
    kept = (kept < count[:, None])[:, None, :, None]  # [batch, 1, n, 1]
    key, value, decay = by_head(state, key[rows, path], value[rows, path], decay[rows, path])
    decay = decay.masked_fill(~kept, 0)
    later = decay.flip(2).cumsum(2).flip(2) - decay  # [batch, head, n, 1 or dim]: of the nodes after each
    key, value = (key * later.exp()).masked_fill(~kept, 0), value.masked_fill(~kept, 0)
    state.mul_(decay.sum(2).exp()[..., None])
    state.view(-1, *state.shape[2:]).baddbmm_(key.transpose(2, 3).flatten(0, 1), value.flatten(0, 1))


def by_head(state: Tensor, *parts: Tensor) -> list[Tensor]:
    """Each of [batch, node, head or key_head, ...] as [batch, head, node, ...] in the dtype of the state, decays with a dim."""
    heads = state.shape[1]
    parts = tuple(part[..., None] if part.dim() == 3 else part for part in parts)
    return [part.repeat_interleave(heads // part.shape[2], 2).transpose(1, 2).to(state.dtype) for part in parts]


def path_decay(decay: Tensor, ancestors: Tensor) -> Tensor:
    """G, [batch, head, all, 1 or dim], from g of the same shape."""
    return ancestors[:, None].to(decay.dtype) @ decay


def scores(query: Tensor, key: Tensor, total: Tensor, ancestors: Tensor) -> Tensor:
    """exp(G_i - G_j) (q_i . k_j), [batch, head, node, all]; 0 where j is not on the path to i. Arguments are by head."""
    count = query.shape[2]
    seen = ancestors[:, None, -count:]  # [batch, 1, node, all]
    if total.shape[3] == 1:
        gap = total[:, :, -count:] - total.transpose(2, 3)
        return (query @ key.transpose(2, 3)) * gap.masked_fill(~seen, -torch.inf).exp()
    # Node by node: all gaps at once would take as much memory as `count` times all keys.
    found = []
    for node in range(count):
        gap = total[:, :, node - count, None] - total  # [batch, head, all, dim]
        weight = gap.masked_fill(~seen[:, :, node, :, None], -torch.inf).exp()
        found.append((weight * key) @ query[:, :, node, :, None])
    return torch.cat(found, 3).transpose(2, 3)
