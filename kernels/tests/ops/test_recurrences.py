"""Nodes of random trees, in closed form, against the recurrence run token by token along each path."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from specdec_kernels.reference.convolution import convolution, fold_convolution, windows
from specdec_kernels.reference.gated_delta import gated_delta
from specdec_kernels.reference.linear_attention import fold_linear_attention, linear_attention
from specdec_kernels.reference.selective_scan import fold_selective_scan, selective_scan

BATCH, NODES, KEY_HEADS, HEADS, DIM, VALUE_DIM, STATE = 3, 9, 2, 4, 5, 6, 3
ROUNDING = 1e-12  # float64


def _trees(generator) -> tuple[Tensor, Tensor, list[list[list[int]]]]:
    """parents [batch, node], ancestors [batch, node, node] and, by row and node, the path to it."""
    parents = torch.full((BATCH, NODES), -1)
    for node in range(1, NODES):
        parents[:, node] = torch.randint(0, node, (BATCH,), generator=generator)
    paths = [[[0]] for _ in range(BATCH)]
    ancestors = torch.zeros(BATCH, NODES, NODES, dtype=torch.bool)
    for row in range(BATCH):
        for node in range(NODES):
            if node:
                paths[row].append([*paths[row][parents[row, node]], node])
            ancestors[row, node, paths[row][node]] = True
    return parents, ancestors, paths


def _kept(paths: list[list[list[int]]]) -> tuple[Tensor, Tensor]:
    """The path to the last node of each row but the first, which keeps none; entries after it repeat nodes."""
    count = torch.tensor([0, *(len(nodes[-1]) for nodes in paths[1:])])
    path = torch.ones(len(paths), NODES, dtype=torch.int64)
    for row, nodes in enumerate(paths):
        path[row, : len(nodes[-1])] = torch.tensor(nodes[-1])
    return path, count


def _levels(call) -> Tensor:
    """What all nodes read, computed in one call, and in three that grow the tree: they must agree."""
    whole = call(0, NODES)
    grown = torch.cat([call(0, 1), call(1, 4), call(4, NODES)], 1)
    torch.testing.assert_close(grown, whole, rtol=0, atol=ROUNDING)
    return whole


@pytest.mark.parametrize("by_channel", [False, True], ids=["decay_by_head", "decay_by_channel"])
@pytest.mark.parametrize("delta", [False, True], ids=["linear_attention", "gated_delta"])
def test_nodes_read_what_their_paths_read_token_by_token(delta, by_channel):
    generator = torch.Generator().manual_seed(delta + 2 * by_channel)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    _, ancestors, paths = _trees(generator)
    query, key = random(BATCH, NODES, KEY_HEADS, DIM), random(BATCH, NODES, KEY_HEADS, DIM) * 0.5
    value, beta = random(BATCH, NODES, HEADS, VALUE_DIM), random(BATCH, NODES, HEADS).sigmoid()
    decay = -random(BATCH, NODES, HEADS, *[DIM] * by_channel).exp()
    state, update = random(BATCH, HEADS, DIM, VALUE_DIM), torch.full_like(value, torch.nan)

    def call(start: int, end: int, state: Tensor = state, fold: Sequence[Tensor] | None = None) -> Tensor:
        tree = key[:, :end], decay[:, :end], state, ancestors[:, :end, :end]
        if not delta:
            return linear_attention(query[:, start:end], tree[0], value[:, :end], *tree[1:], fold)
        parts = query[:, start:end], tree[0], value[:, start:end], tree[1], beta[:, start:end], *tree[2:]
        return gated_delta(*parts, update[:, :end], fold)

    found = _levels(call)
    path, count = _kept(paths)
    fold = key, update.clone() if delta else value, decay, path, count
    ends = state.clone()
    fold_linear_attention(ends, *fold)
    assert torch.equal(ends[0], state[0]), "a row that keeps nothing"
    after = call(0, NODES, ends), call(0, NODES, state.clone(), fold)
    assert torch.equal(*after), "a fold that goes with the next read"

    wide_query, wide_key = (part.repeat_interleave(HEADS // KEY_HEADS, 2) for part in (query, key))
    for row, node in [(row, node) for row in range(BATCH) for node in range(NODES)]:
        now = state[row]
        for j in paths[row][node]:
            now = now * decay[row, j].exp().view(HEADS, -1, 1)
            gap = value[row, j] - torch.einsum("hkv,hk->hv", now, wide_key[row, j])
            added = beta[row, j, :, None] * gap if delta else value[row, j]
            now = now + wide_key[row, j][..., None] * added[:, None]
        read = torch.einsum("hkv,hk->hv", now, wide_query[row, node])
        torch.testing.assert_close(found[row, node], read, rtol=0, atol=ROUNDING)
        if row and node == NODES - 1:
            torch.testing.assert_close(ends[row], now, rtol=0, atol=ROUNDING)


def test_the_selective_scan_of_a_tree_is_that_of_its_paths():
    generator = torch.Generator().manual_seed(5)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    parents, _, paths = _trees(generator)
    read, write = random(BATCH, NODES, STATE), random(BATCH, NODES, STATE)
    step, rate, state = random(BATCH, NODES, DIM).exp(), -random(DIM, STATE).exp(), random(BATCH, DIM, STATE)
    value = step * random(BATCH, NODES, DIM)

    def call(start: int, end: int) -> Tensor:
        parts = write[:, :end], value[:, :end], step[:, :end]
        return selective_scan(read[:, start:end], *parts, rate, state, parents[:, :end])

    found = _levels(call)
    path, count = _kept(paths)
    ends = state.clone()
    fold_selective_scan(ends, write, value, step, rate, path, count)
    assert torch.equal(ends[0], state[0]), "a row that keeps nothing"
    for row, node in [(row, node) for row in range(BATCH) for node in range(NODES)]:
        now = state[row]
        for j in paths[row][node]:
            now = now * (step[row, j, :, None] * rate).exp() + value[row, j, :, None] * write[row, j]
        torch.testing.assert_close(found[row, node], now @ read[row, node], rtol=0, atol=ROUNDING)
        if row and node == NODES - 1:
            torch.testing.assert_close(ends[row], now, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("size", [2, 3, 4, 7])
def test_a_convolution_sees_the_last_inputs_of_each_path(size):
    generator = torch.Generator().manual_seed(size)
    parents, _, paths = _trees(generator)
    inputs = torch.randn(BATCH, size - 1 + NODES, DIM, generator=generator, dtype=torch.float64)
    weight = torch.randn(DIM, size, generator=generator, dtype=torch.float64)
    bias = torch.randn(DIM, generator=generator, dtype=torch.float64)
    found = convolution(inputs, weight, bias, windows(parents, size))
    path, count = _kept(paths)
    ends = inputs.clone()
    fold_convolution(ends, size, path, count)
    assert torch.equal(ends[:, size - 1 :], inputs[:, size - 1 :])
    assert torch.equal(ends[0], inputs[0]), "a row that keeps nothing"
    for row in range(BATCH):
        for node in range(NODES):
            line = [*range(size - 1), *(size - 1 + j for j in paths[row][node])][-size:]
            due = (inputs[row, line] * weight.T).sum(0) + bias
            torch.testing.assert_close(found[row, node], due, rtol=0, atol=ROUNDING)
        if row:
            assert torch.equal(ends[row, : size - 1], inputs[row, line[1:]])
