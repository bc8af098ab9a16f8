"""The gated delta rule over the nodes of a tree: linear attention whose values are corrected by what the state holds already.

A token (Yang et al., arXiv:2412.06464) decays the state, looks up its key in it, and adds the difference to its value:

    S := exp(g) S,    u = beta (v - S^T k),    S := S + k u^T,    y = S^T q.

Once the u of all nodes are known this is linear attention with u in the place of values. The state that node i looks up its key
in is that of its path without itself, as in `linear_attention`, so with the same G and S

    u_i = beta_i (v_i - exp(G_i) S^T k_i - sum_j exp(G_i - G_j) (k_i . k_j) u_j)          over the ancestors j of i.

Parents come before their children, so this is a unit lower triangular system whatever the tree: (I + M) u = b. If the tree
grows level by level, u of earlier nodes is known, and only the block of the new nodes is solved. A fold is that of linear
attention. Kimi Delta Attention is the same with a decay for each channel of the key.

What the recurrence needs of a node (k, u and g) is small beside a state: in Qwen3-Next-80B a layer keeps 16 x 128 + 32 x 128
+ 32 numbers a node, and its state has 32 x 128 x 128, 85 times as many: 1.2 % of a state. The convolution's input, of
2 x 16 x 128 + 32 x 128 numbers in the model's dtype, is kept too: a node takes 2.0 % of a state in bfloat16, 2.7 % in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specdec_kernels.reference.linear_attention import by_head, fold_linear_attention, path_decay, scores


def gated_delta(
    query: Tensor,  # [batch, node, key_head, dim]: of the last nodes of the tree, for which it is computed; scaled
    key: Tensor,  # [batch, all, key_head, dim]: of all nodes of the tree
    value: Tensor,  # [batch, node, head, value_dim]; head h reads and writes by the key head h // (heads per key head)
    decay: Tensor,  # [batch, all, head], or [batch, all, head, dim]: the logarithm, at most 0
    beta: Tensor,  # [batch, node, head]
    state: Tensor,  # [batch, head, dim, value_dim]: the state before the root
    ancestors: Tensor,  # [batch, all, all] bool: whether node j is node i or an ancestor of it; parents come first
    update: Tensor,  # [batch, all, head, value_dim]: u; that of the last nodes is written
    # what `fold_linear_attention` takes after the state: not in the memory of `update`
    fold: Sequence[Tensor] | None = None,
) -> Tensor:
    """What the last nodes read, [batch, node, head, value_dim] in the dtype of the state, in which all is computed.

    Fold accepted nodes by `fold_linear_attention` with `update` in the place of values: by itself, or before the nodes of the
    next step read the state (see `linear_attention`).
    """
    if fold is not None:
        fold_linear_attention(state, *fold)
    first = key.shape[1] - query.shape[1]
    query, key, value, decay, beta, known = by_head(state, query, key, value, decay, beta, update[:, :first])
    total = path_decay(decay, ancestors)
    asked, own = key[:, :, first:], total[:, :, first:].exp()
    # [batch, head, node, value_dim]: by one product, as states are large
    found, read = (torch.cat([asked * own, query * own], 2) @ state).chunk(2, 2)
    weight = scores(asked, key, total, ancestors)
    right = beta * (value - found - weight[..., :first] @ known)
    system = (beta * weight[..., first:]).tril(-1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    update[:, first:] = solved.transpose(1, 2)
    read = read + scores(query, key, total, ancestors) @ torch.cat([known, solved], 2)
    return read.transpose(1, 2)
