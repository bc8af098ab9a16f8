"""Forward passes compiled by torch.compile, once per shape and process."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import fx
from torch._dynamo.exc import TorchDynamoException
from torch._inductor import config as inductor
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from tqdm import tqdm

_SHAPES = 256  # that may be compiled of one model; torch's own limit is 8
_MANY = 5  # tokens: about where the two ways to multiply them take the same time, measured on an AVX-512 Xeon
_aten = torch.ops.aten


class Compiled:
    """A function compiled anew for every shape; as it stands if torch.compile cannot do it as a whole.

    Args:
        run: the function.
        name: what is shown while it is compiled, which takes from seconds to a minute.
    """

    def __init__(self, run: Callable[..., Any], name: str):
        self._run, self._name = run, name
        self._call: Callable[..., Any] = torch.compile(run, fullgraph=True, dynamic=False)
        self._shapes: set[Hashable] = set()

    def __call__(self, shape: tuple[int, ...], *args: Any) -> Any:
        """shape: all that the compiled code depends on."""
        if shape in self._shapes:
            return self._call(*args)
        self._shapes.add(shape)
        what = f"compiling {self._name}, {' x '.join(map(str, shape))}"
        try:
            with (
                torch._dynamo.config.patch(recompile_limit=_SHAPES),
                inductor.patch(post_grad_custom_pre_pass=_WeightsFirst()),
                tqdm(total=1, desc=what, leave=False) as bar,
            ):
                result = self._call(*args)
                bar.update()
                return result
        except TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0]
            warnings.warn(f"engine: {self._name} cannot be compiled and runs as it stands: {reason}", stacklevel=2)
            self._call = self._run
            return self._run(*args)


class _WeightsFirst(CustomGraphPass):
    """x @ W.T as (W @ x.T).T on a CPU, from `_MANY` tokens on.

    MKL takes longer for x @ W.T with every token, up to about 16; for W @ x.T always as long, W being read as it lies.
    """

    def __call__(self, graph: fx.Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=_aten.mm.default):
            operands: Any = node.args
            x, weight = operands[0], _untransposed(operands[1])
            if weight is None or x.meta["val"].shape[0] < _MANY or x.meta["val"].device.type != "cpu":
                continue
            with graph.inserting_before(node):
                columns = _call(graph, _aten.permute.default, x, [1, 0])
                result = _call(graph, _aten.permute.default, _call(graph, _aten.mm.default, weight, columns), [1, 0])
            node.replace_all_uses_with(result)
            graph.erase_node(node)

    def uuid(self) -> bytes:
        return get_hash_for_files((__file__,))


def _untransposed(node: Any) -> fx.Node | None:
    """W if the node is W.T and W an input of the graph."""
    return node.args[0] if node.target is _aten.permute.default and node.args[0].op == "placeholder" else None


def _call(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    """The node of an operation, with a stand-in of its result as passes expect it."""
    node = graph.call_function(target, args)
    node.meta["val"] = target(*(arg.meta["val"] if isinstance(arg, fx.Node) else arg for arg in args))
    return node
