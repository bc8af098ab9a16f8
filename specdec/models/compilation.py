"""Forward passes compiled by torch.compile, once per shape and process."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Hashable
from typing import Any
from weakref import WeakSet

import torch
from torch import fx, nn
from torch._dynamo.exc import TorchDynamoException
from torch._inductor import config as inductor
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from tqdm import tqdm

from specdec_kernels.attention import NODES, refusals
from specdec_kernels.linear import pays

_SHAPES = 256  # most shapes compiled of one model; torch's own limit is 8
_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_not_compiled: WeakSet[nn.Module] = WeakSet()


class Compiled:
    """A function that is compiled for every shape; it runs uncompiled if torch.compile cannot compile all of it.

    Args:
        run: the function.
        model: the model that it runs. A progress bar names it while it is compiled, which takes seconds to a minute. A model
            that cannot be compiled is not tried again.
    """

    def __init__(self, run: Callable[..., Any], model: nn.Module):
        self._run, self._model, self._name = run, model, type(model).__name__
        self._call: Callable[..., Any] = run
        if model not in _not_compiled:
            self._call = torch.compile(run, fullgraph=True, dynamic=False)
        self._shapes: set[Hashable] = set()

    def __call__(self, shape: tuple[int, ...], *args: Any) -> Any:
        """Call the function. `shape` is all that the compiled code depends on."""
        if is_in_torch_dispatch_mode(include_infra_modes=False):  # `HostReads` watches, and torch.compile refuses that
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
    """On a CPU, read large matrices, keys and values from memory once for several tokens.

    MKL computes x @ W.T for up to three tokens in the time that W takes to be read, and needs twice that for four. Torch's
    attention reads keys and values again for every head that shares them.
    """

    def __call__(self, graph: fx.Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default):
            _replace_product(graph, node)
        for node in graph.find_nodes(op="call_function", target=_ATTENTION):
            _replace_attention(graph, node)

    def uuid(self) -> bytes:
        return get_hash_for_files((__file__, inspect.getfile(refusals)))


def _replace_product(graph: fx.Graph, node: fx.Node) -> None:
    """Replace a product by `specdec_kernels.linear` where that pays."""
    operands: Any = node.args
    x, weight = operands[0], _untransposed(operands[1])
    if weight is None or not pays(len(x.meta["val"]), x.meta["val"], weight.meta["val"]):
        return
    with graph.inserting_before(node):
        result = graph.call_function(torch.ops.specdec.linear.default, (x, weight))
    result.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def _replace_attention(graph: fx.Graph, node: fx.Node) -> None:
    """Replace attention by `specdec_kernels.attention` where that pays and only its first output is used."""
    arguments: Any = dict(zip((a.name for a in _ATTENTION._schema.arguments), node.args, strict=False)) | node.kwargs
    bias, results = arguments.get("attn_mask"), [*node.users]
    if bias is None or arguments.get("dropout_p") or arguments.get("is_causal") or any(r.args[1] != 0 for r in results):
        return
    operands = arguments["query"], arguments["key"], arguments["value"], bias
    query, key, *others = (operand.meta["val"] for operand in operands)
    batch, heads, nodes, dim = query.shape
    if query.device.type != "cpu" or nodes > NODES or refusals(query, key, *others):
        return
    scale = arguments.get("scale")
    scale = dim**-0.5 if scale is None else scale
    with graph.inserting_before(node):
        by_node = graph.call_function(torch.ops.specdec.attention.default, (*operands, scale))
        by_head = graph.call_function(torch.ops.aten.permute.default, (by_node, [0, 2, 1, 3]))
    by_node.meta["val"] = query.new_empty(batch, nodes, heads, node.meta["val"][0].shape[3])
    by_head.meta["val"] = by_node.meta["val"].permute(0, 2, 1, 3)
    for result in results:
        result.replace_all_uses_with(by_head)
        graph.erase_node(result)
    graph.erase_node(node)


def _untransposed(node: Any) -> fx.Node | None:
    """W if the node is W.T and W an input of the graph."""
    return node.args[0] if node.target is torch.ops.aten.permute.default and node.args[0].op == "placeholder" else None
