"""The op: registered as torch asks, compiled whole, refusing what it does not compute; both forms are one function."""

from typing import Any

import pytest
import torch
from attention_cases import Case, draw
from torch._subclasses.fake_tensor import FakeTensorMode

from specdec_kernels import tree_attention
from specdec_kernels.reference import tree_attention as reference

torch.set_num_threads(1)

# float64: both forms of the specification and the compiled op differ by rounding alone
SAME = 1e-12

CASES = [
    Case(5, 20, batch=3),
    Case(40, 9, 3, 3, softcap=2.0, dtype=torch.float64),
    Case(4, 30, sinks=True, window=6, earlier=3, dtype=torch.float64),
]


def on_cuda(arguments):
    """The same as fake tensors on a CUDA device; inside a FakeTensorMode."""
    return {
        name: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda") if torch.is_tensor(x) else x
        for name, x in arguments.items()
    }


def tensors(case=CASES[0], **changes):
    return {**draw(case, seed=0), **changes}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_op_is_what_it_is_registered_as(case):
    torch.library.opcheck(tree_attention, (), tensors(case))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_dense_bias_says_the_same(case):
    arguments: dict[str, Any] = {n: x.nan_to_num() if torch.is_tensor(x) else x for n, x in tensors(case).items()}
    first, lengths, ancestors = (arguments.pop(name) for name in ("first", "lengths", "ancestors"))
    arguments |= {n: x.double() for n, x in arguments.items() if torch.is_tensor(x)}
    seen = reference.visible(first, lengths, ancestors, arguments["key"].shape[2])[:, None]
    bias = torch.zeros(seen.shape, dtype=torch.float64).masked_fill_(~seen, -torch.inf)
    out, _ = reference.tree_attention(**arguments, first=first, lengths=lengths, ancestors=ancestors)
    assert (reference.biased_attention(**arguments, bias=bias) - out).abs().max() < SAME


def test_parts_of_the_slots_merge_by_their_log_sum_exps():
    arguments = tensors(CASES[1])
    whole, lse = tree_attention(**arguments)
    prefix = tree_attention(**{**arguments, "ancestors": torch.zeros_like(arguments["ancestors"])})
    tree = tree_attention(**{**arguments, "first": arguments["lengths"][:, None].expand_as(arguments["first"])})
    parts, weights = torch.stack([prefix[0], tree[0]]), torch.stack([prefix[1], tree[1]])
    merged = (parts * (weights - lse).exp()[..., None]).sum(0)
    assert (merged - whole).abs().max() < SAME and (weights.logsumexp(0) - lse).abs().max() < SAME


def test_bits_are_packed_as_they_are_read():
    ancestors = torch.rand(2, 7, 70) < 0.5
    words, none = reference.pack(ancestors), torch.zeros(2, dtype=torch.int32)
    assert words.dtype == torch.int32 and words.shape == (2, 7, 3)
    seen = reference.visible(torch.zeros(2, 7, dtype=torch.int32), none, words, 100)
    assert torch.equal(seen[..., :70], ancestors) and not seen[..., 70:].any()


def test_it_compiles_into_one_graph_for_a_gpu_that_is_not_there():
    graphs = []

    def count(graph, inputs):
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    @torch.compile(fullgraph=True, dynamic=False, backend=count)
    def layer(query, **arguments):
        return tree_attention(query * 2, **arguments)[0] * 2

    real = tensors()
    with FakeTensorMode():
        arguments = on_cuda(real)
        for _ in range(2):
            assert layer(**arguments).device.type == "cuda"
    assert len(graphs) == 1 and torch.ops.specdec.tree_attention.default in graphs[0]


def test_compiled_it_is_the_same_on_cpu():
    compiled = torch.compile(tree_attention, fullgraph=True, dynamic=False, backend="aot_eager")
    for found, right in zip(compiled(**tensors(CASES[2])), tree_attention(**tensors(CASES[2])), strict=True):
        assert (found - right).abs().max() < SAME


def scattered(x):
    return x.transpose(1, 3).contiguous().transpose(1, 3)


BATCH = CASES[0]
REFUSED = {
    "heads of 264": (
        Case(2, 9, head_dim=264),
        {},
        "heads of 264 and 264 torch.float32 are not .* up to 256: use the ref",
    ),
    "float64": (CASES[1], {}, "torch.float64 are not float16, bfloat16 or float32"),
    "a tree of 257": (Case(257, 9, 1, 1), {}, "257 nodes with words for 288 are more than 256: use biased_attention"),
    "uneven groups": (Case(2, 9, 3, 2), {}, "3 heads cannot share 2 KV heads evenly: repeat"),
    "scattered heads": (BATCH, {"query": scattered}, "query has stride 20 in its last axis, not 1: call .contiguous"),
    "long words": (BATCH, {"ancestors": torch.Tensor.long}, "ancestors is torch.int64, not torch.int32: cast"),
    "mixed dtypes": (BATCH, {"value": torch.Tensor.half}, "value is torch.float16, not torch.float32: cast"),
    "one length too few": (BATCH, {"lengths": lambda n: n[1:]}, r"lengths is \[2\], not \[3\]"),
    "flat keys": (BATCH, {"key": lambda k: k.flatten(2)}, r"key is \[3, 2, 2048\], not \[3, 2, 2048, 64\]"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_does_not_compute_is_refused_with_the_cure(name):
    case, changes, message = REFUSED[name]
    arguments = tensors(case)
    arguments.update({name: change(arguments[name]) for name, change in changes.items()})
    with FakeTensorMode(), pytest.raises(ValueError, match=message):
        tree_attention(**on_cuda(arguments))


def test_tensors_on_other_devices_are_refused():
    arguments = tensors()
    with FakeTensorMode(), pytest.raises(ValueError, match="lengths is on cpu, not on cuda:0: move"):
        tree_attention(**{**on_cuda(arguments), "lengths": torch.empty(3, dtype=torch.int32)})
