"""On a GPU, products with matrices stored in integers are those of the reference, repeatably, inside CUDA graphs too."""

from typing import Any

import pytest
import torch
from verification_cases import fresh_seed

import specdec_kernels
from specdec_kernels.reference import stored_linear as reference

NEAR = 1e-5  # of a result, norm over norm: sums of float32 in another order


def drawn(name, tokens, out, inputs) -> tuple[torch.Tensor, Any]:
    torch.manual_seed(fresh_seed())
    x, weight = torch.randn(tokens, inputs, device="cuda"), torch.randn(out, inputs, device="cuda")
    return x, getattr(reference, f"pack_{name}")(weight)


def far(name, found, x, stored):
    due = getattr(reference, f"linear_{name}")(x, *stored, found.shape[-1])
    return float((found - due).norm() / due.norm())


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("tokens", [1, 5, 16, 17, 64, 200])
@pytest.mark.parametrize("out, inputs", [(16, 32), (33, 70), (1536, 576), (14336, 4096)])
def test_products_are_right_and_repeatable(name, tokens, out, inputs):
    x, stored = drawn(name, tokens, out, inputs)
    op = getattr(specdec_kernels, f"linear_{name}")
    found = op(x.view(1, tokens, inputs), *stored, out)
    assert found.shape == (1, tokens, out) and far(name, found[0], x, stored) < NEAR
    assert torch.equal(found, op(x[None], *stored, out))


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_graph_reads_its_inputs_anew(name):
    x, stored = drawn(name, 5, 576, 576)
    op = getattr(specdec_kernels, f"linear_{name}")
    op(x, *stored, 576)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = op(x, *stored, 576)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert far(name, found, x, stored) < NEAR
