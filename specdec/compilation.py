"""Forward passes compiled by torch.compile, once per shape and process."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, fx, nn
from torch._dynamo.exc import TorchDynamoException
from torch._inductor import config as inductor
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from tqdm import tqdm

from specdec_kernels import linear

_SHAPES = 256  # that may be compiled of one model; torch's own limit is 8
_FEW = range(4, 25)  # tokens, and
_LARGE = 1 << 17  # weights, for which our product takes less time than MKL's: measured on an AVX-512 Xeon
_not_compiled: WeakSet[nn.Module] = WeakSet()


class Compiled:
    """A function compiled anew for every shape; as it stands if torch.compile cannot do it as a whole.

    Args:
        run: the function.
        model: what it runs, named while it is compiled, which takes from seconds to a minute. What cannot be compiled once
            is not tried again.
    """

    def __init__(self, run: Callable[..., Any], model: nn.Module):
        self._run, self._model, self._name = run, model, type(model).__name__
        self._call: Callable[..., Any] = run
        if model not in _not_compiled:
            self._call = torch.compile(run, fullgraph=True, dynamic=False)
        self._shapes: set[Hashable] = set()

    def __call__(self, shape: tuple[int, ...], *args: Any) -> Any:
        """shape: all that the compiled code depends on."""
        if is_in_torch_dispatch_mode(include_infra_modes=False):  # watched by `HostReads`: torch.compile refuses that
            return self._run(*args)
        if shape in self._shapes:
            return self._call(*args)
        self._shapes.add(shape)
        what = f"compiling {self._name}, {' x '.join(map(str, shape))}"
        try:
            with (
                torch._dynamo.config.patch(recompile_limit=_SHAPES),
                inductor.patch(post_grad_custom_pre_pass=_ReadOnce()),
                tqdm(total=1, desc=what, leave=False) as bar,
            ):
                result = self._call(*args)
                bar.update()
                return result
        except TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0]
            warnings.warn(f"engine: {self._name} cannot be compiled and runs as it stands: {reason}", stacklevel=2)
            _not_compiled.add(self._model)
            self._call = self._run
            return self._run(*args)


class _ReadOnce(CustomGraphPass):
    """x @ W.T of a few tokens and a large W by `specdec_kernels.linear` on a CPU.

    MKL takes as long as memory takes to give W for up to three tokens, and twice as long for four.
    """

    def __call__(self, graph: fx.Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default):
            operands: Any = node.args
            x, weight = operands[0], _untransposed(operands[1])
            if weight is None or not _pays(x.meta["val"], weight.meta["val"]):
                continue
            with graph.inserting_before(node):
                result = graph.call_function(linear._opoverload, (x, weight))
            result.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(result)
            graph.erase_node(node)

    def uuid(self) -> bytes:
        return get_hash_for_files((__file__,))


def _pays(x: Tensor, weight: Tensor) -> bool:
    suits = x.device.type == "cpu" and x.dtype == torch.float32 and weight.is_contiguous()
    return suits and x.shape[0] in _FEW and weight.numel() >= _LARGE


def _untransposed(node: Any) -> fx.Node | None:
    """W if the node is W.T and W an input of the graph."""
    return node.args[0] if node.target is torch.ops.aten.permute.default and node.args[0].op == "placeholder" else None
