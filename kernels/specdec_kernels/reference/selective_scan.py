"""The selective scan (Mamba, arXiv:2312.00752) over the nodes of a tree.

A token decays each number of a channel's state at a rate of its own and adds to it: with dt and x of the channel,

    S[c, n] := exp(A[c, n] dt[c]) S[c, n] + dt[c] x[c] B[n],    y[c] = sum_n S[c, n] C[n].

With T_i the sum of dt along the path from the root to node i, and S the state of the text,

    S_i[c, n] = exp(A[c, n] T_i[c]) S[c, n] + sum_j exp(A[c, n] (T_i[c] - T_j[c])) dt_j[c] x_j[c] B_j[n],

the sum over i and its ancestors.

Decays differ by c and n, so pairs of nodes do not separate into matrices as in `linear_attention`: the sum would need an
exponential for every pair, channel and n. Nodes are gone through in order instead, each from its parent's state. These states
live only as long as the call: what is kept of a node is dt, dt x and B, about an eighth of a state of 16 numbers a channel.
"""

from __future__ import annotations

import torch
from torch import Tensor


def selective_scan(
    read: Tensor,  # C, [batch, node, state]: of the last nodes of the tree, for which it is computed
    write: Tensor,  # B, [batch, all, state]: of all nodes of the tree
    value: Tensor,  # dt x, [batch, all, channel]
    step: Tensor,  # dt, [batch, all, channel]
    rate: Tensor,  # A, [channel, state], at most 0
    state: Tensor,  # [batch, channel, state]: the state before the root
    parents: Tensor,  # [batch, all] int64: -1 for the root; parents come first
) -> Tensor:
    """What the last nodes read, [batch, node, channel] in the dtype of the state, in which all is computed."""
    read, write, value, step, rate = (part.to(state.dtype) for part in (read, write, value, step, rate))
    nodes, rows = write.shape[1], torch.arange(len(state), device=state.device)
    states = state.new_empty(len(state), nodes + 1, *state.shape[1:])
    states[:, 0] = state
    for node in range(nodes):
        before = states[rows, parents[:, node] + 1]
        added = value[:, node, :, None] * write[:, node, None]
        states[:, node + 1] = before * (step[:, node, :, None] * rate).exp() + added
    return torch.einsum("bics,bis->bic", states[:, nodes + 1 - read.shape[1] :], read)


def fold_selective_scan(
    state: Tensor,  # [batch, channel, state]: changed
    write: Tensor,  # B, [batch, all, state]
    value: Tensor,  # dt x, [batch, all, channel]
    step: Tensor,  # dt, [batch, all, channel]
    rate: Tensor,  # A, [channel, state]
    path: Tensor,  # [batch, n] int64: nodes from the root down
    count: Tensor,  # [batch] int64 <= n: how many nodes of the path are kept
) -> None:
    """Bring the state of each row to the end of the first count[b] nodes of its path; 0 leaves it exactly as it is."""
    rows, kept = torch.arange(len(path), device=path.device)[:, None], torch.arange(path.shape[1], device=path.device)
    kept = (kept < count[:, None])[..., None]
    write, value, step = (part[rows, path].to(state.dtype).masked_fill(~kept, 0) for part in (write, value, step))
    rate = rate.to(state.dtype)
    for node in range(path.shape[1]):
        state.mul_((step[:, node, :, None] * rate).exp()).add_(value[:, node, :, None] * write[:, node, None])
