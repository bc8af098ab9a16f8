"""The ops of verification and compaction: what torch is promised about them, and what specdec calls on CUDA devices."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from random_trees import random_trees
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import specdec_kernels
from specdec import DraftTree, Sampling, Topology
from specdec.rules import SiblingRejection
from specdec.target_law import LogitsLaw
from specdec.testing.fast_paths import GivenCoins


def cases() -> dict[str, tuple]:
    tree, logits = random_trees(2, 7, 0)
    drafted = tree.tokens, tree.topology.children, tree.laws, tree.draft_probs
    coins = torch.rand(2, 2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    stack, rows = torch.randn(2, 2, 9, 2, 4), torch.tensor([2, 3])
    return {
        "law": (logits[0], 0.7, 3, 0.9, 0.1),
        "verify": (logits, *drafted, *coins, tree.topology.depth, 1.0),
        "compact": (stack, torch.tensor([[0, 2, 3], [0, 1, 5]]), rows, rows),
    }


@pytest.mark.parametrize("name", cases())
def test_ops_keep_their_promises_to_torch(name):
    torch.library.opcheck(getattr(torch.ops.specdec, name).default, cases()[name])


@pytest.mark.parametrize("name", cases())
def test_ops_compile_into_one_graph_for_devices_that_are_not_there(name):
    op, devices = getattr(specdec_kernels, name), []

    def backend(graph, example_inputs):
        devices.append({x.device.type for x in example_inputs if isinstance(x, torch.Tensor)})
        return graph.forward

    torch.compiler.reset()
    with FakeTensorMode():
        on_cuda = [torch.empty_like(x, device="cuda") if isinstance(x, torch.Tensor) else x for x in cases()[name]]
        out = torch.compile(op, fullgraph=True, backend=backend)(*on_cuda)
    assert devices == [{"cuda"}]
    for fake, real in zip(tree_leaves(out), tree_leaves(op(*cases()[name])), strict=True):
        assert real is None or (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


class Called(TorchDispatchMode):
    """Notes the ops of specdec that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "specdec":
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_on_cuda_devices_sibling_rejection_is_one_op():
    with FakeTensorMode(), Called() as seen:
        tokens, children = (torch.zeros(2, 4, *more, dtype=torch.int64, device="cuda") for more in ((), (2,)))
        topology = Topology(tokens, 2, 2)
        vars(topology)["children"] = children  # computing it takes indexing, which fake CUDA tensors refuse
        tree = DraftTree(tokens, topology, tokens.to(torch.uint8), torch.zeros(2, 1, 7, device="cuda"))
        context: Any = SimpleNamespace(sampling=Sampling(1.0), processors=[()] * 2, processed=False)
        coins = torch.zeros(2, 4, dtype=torch.float64, device="cuda")
        law = LogitsLaw(torch.zeros(2, 4, 7, device="cuda"), tree, context)
        made = SiblingRejection().decide_batch(tree, law, GivenCoins(coins, coins))
        assert [made.path.shape, made.accepted.shape, made.token.shape] == [(2, 3), (2,), (2,)]
    assert seen.names == ["verify.default"]


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels that are launched, none of which runs, and of torch's ops."""
    from triton.runtime.jit import JITFunction

    names = []
    monkeypatch.setattr(JITFunction, "run", lambda kernel, *args, **options: names.append(kernel.fn.__name__))

    class Noted(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if not func.__name__.startswith(("new_empty", "empty", "view", "_unsafe_view", "select", "slice")):
                names.append(func.__name__)
            return func(*args, **(kwargs or {}))

    with Noted():
        yield names


FILTERED = (0.7, 50, 0.9, None)
POINTS = ["_begin_kernel", "_reject_kernel", "_emit_kernel"]


@pytest.mark.parametrize(
    ("filters", "draws", "due"),
    [
        ((0.0, None, None, None), 0, POINTS),
        ((0.0, *FILTERED[1:]), 16, POINTS),  # what is most probable is, whatever was drawn and filtered
        ((0.7, None, None, None), 0, POINTS),
        (FILTERED, 0, ["_begin_kernel", "_filter_kernel", "_reject_kernel", "_emit_kernel"]),
        ((0.7, None, None, None), 1, POINTS),
        ((0.7, None, None, None), 4, ["_begin_kernel", *["_reject_kernel"] * 4, "_emit_kernel"]),
        (FILTERED, 4, ["_begin_kernel", "_filter_kernel", *["_reject_kernel"] * 4, "_emit_kernel"]),
        ((0.7, None, None, None), 16, ["_begin_kernel", *["_reject_kernel"] * 16, "_emit_kernel"]),
    ],
)
def test_a_verification_is_so_many_launches(filters, draws, due, launches):
    from specdec_kernels.triton.verify import verify

    logits, tokens = torch.empty(2, 64, 128256, device="meta"), torch.empty(2, 64, dtype=torch.int64, device="meta")
    children, laws = tokens.new_empty(2, 64, draws or 4), tokens.new_empty(2, 64, dtype=torch.uint8)
    coins = (logits.new_empty(2, 64, dtype=torch.float64) for _ in range(2))
    weights = logits.new_empty(2, 63 // draws + 1, 128256) if draws else None
    arguments: Any = (logits, tokens, children, laws, weights, *coins, 3, *filters, 1.0)
    verify(*arguments)
    assert launches == due


@pytest.mark.parametrize("filters", [(0.0, None, None, None), FILTERED], ids=str)
def test_laws_are_two_launches(filters, launches):
    from specdec_kernels.triton.law import law

    law(torch.empty(64, 128256, device="meta"), *filters)
    assert launches == ["_tile_kernel", "_filter_kernel" if filters == FILTERED else "_merge_kernel"]
