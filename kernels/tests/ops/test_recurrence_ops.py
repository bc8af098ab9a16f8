"""The ops of recurrences: what torch is promised about them, what they refuse, and what there are kernels for."""

from typing import Any

import pytest
import torch
from recurrence_cases import Case, draw
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

import specdec_kernels
from specdec_kernels.recurrences import supports


def _arguments(op: str) -> dict[str, Any]:
    arguments = draw(op.removeprefix("fold_"), Case(5, earlier=2, kept=3), 0)
    if op == "fold_linear_attention":
        names = ("key", "value", "decay", "path", "count")
        return {"state": arguments["state"], **dict(zip(names, arguments["fold"], strict=True))}
    return arguments


OPS = ("linear_attention", "gated_delta", "fold_linear_attention")


@pytest.mark.parametrize("fold", [3, None])
@pytest.mark.parametrize("op", OPS[:2])
def test_reading_keeps_its_promises_to_torch(op, fold):
    arguments = draw(op, Case(5, earlier=2, kept=fold), 0)
    torch.library.opcheck(getattr(torch.ops.specdec, op).default, (), arguments)


def test_folding_keeps_its_promises_to_torch():
    torch.library.opcheck(torch.ops.specdec.fold_linear_attention.default, (), _arguments("fold_linear_attention"))


@pytest.mark.parametrize("op", OPS)
def test_ops_compile_into_one_graph_for_devices_that_are_not_there(op):
    devices = []

    def backend(graph, example_inputs):
        devices.append({x.device.type for x in example_inputs if isinstance(x, torch.Tensor)})
        return graph.forward

    torch.compiler.reset()
    arguments, call = _arguments(op), getattr(specdec_kernels, op)
    real = call(**arguments)
    with FakeTensorMode():
        on_cuda = tree_map(lambda x: torch.empty(x.shape, dtype=x.dtype, device="cuda"), arguments)
        out: Any = torch.compile(call, fullgraph=True, backend=backend)(**on_cuda)
    assert devices == [{"cuda"}]
    assert real is None or (out.shape, out.dtype, out.stride()) == (real.shape, real.dtype, real.stride())


REFUSALS = {
    "a state without heads": ("linear_attention", "state", lambda x: x[:, 0], "state is .3, 24, 40., not .batch, head"),
    "keys of fewer channels": ("linear_attention", "key", lambda x: x[..., 1:], r"key is .*23\], not .*24\]"),
    "too few values": ("linear_attention", "value", lambda x: x[:, 1:], r"value is .3, 6, 2, 40., not .3, 7, 2, 40."),
    "the values of all nodes": ("gated_delta", "value", lambda x: torch.cat([x, x], 1), "value is .3, 10, 2, 40., not .3, 5,"),
    "heads that share unevenly": ("gated_delta", "key", lambda x: x.repeat(1, 1, 3, 1), "2 heads cannot share 3 key heads"),
    "ancestors of a smaller tree": ("gated_delta", "ancestors", lambda x: x[:, 1:, 1:], "ancestors is .3, 6, 6., not .3, 7,"),
    "counts of fewer rows": ("fold_linear_attention", "count", lambda x: x[1:], "count is .2., not .3."),
    "decays elsewhere": ("fold_linear_attention", "decay", lambda x: x.to("meta"), "decay is on meta, not on cpu: move it"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_what_does_not_fit_is_refused(name):
    op, part, change, message = REFUSALS[name]
    arguments = _arguments(op)
    with pytest.raises(ValueError, match=f"{op}: .*{message}"):
        getattr(specdec_kernels, op)(**{**arguments, part: change(arguments[part])})


def test_kernels_are_for_float32_states_decays_by_head_and_64_nodes():
    state, decay = torch.zeros(1, 2, 3, 4), torch.zeros(1, 64, 2)
    fold = [torch.zeros(1, 1)] * 3 + [torch.zeros(1, 65)] * 2
    assert supports(state, decay, 64) and not supports(state, decay, 65)
    assert not supports(state, decay, 64, fold)
    assert not supports(state.double(), decay, 1) and not supports(state, decay[..., None], 1)
