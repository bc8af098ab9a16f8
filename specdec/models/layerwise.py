"""A backend for torch.compile that compiles a model layer by layer, and layers that are alike once.

The compiler's time goes with the operations that it is given, and the layers of a model are mostly alike. Its graph is cut
where an element of a list of modules begins or ends: the parts are what is before the layers, each layer, and what is after
them. Parts of the same operations over tensors of the same kinds share code, whatever module they come from, so there are as
many compiled layers as kinds (sliding and full attention, dense and sparse, recurrent). A graph without such lists is one part.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from operator import getitem
from typing import Any

from torch import Tensor, fx
from torch.utils._pytree import tree_map_only

_ELEMENT = re.compile(r".*?(\.\d+(?=\.|$)|\[\d+\])")  # the path of a module up to the first number
Compile = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]


def by_layer(graph: fx.GraphModule, compile_part: Compile) -> Callable[..., Any]:
    """The function of a graph of torch.compile, made of parts that are compiled by `compile_part(graph, inputs)`."""
    whole, compiled = fx.Graph(), dict[Hashable, Callable[..., Any]]()
    made = {node: whole.node_copy(node) for node in graph.graph.find_nodes(op="placeholder")}
    held = fx.GraphModule(graph, fx.Graph())
    for number, nodes in enumerate(_parts(graph.graph)):
        inputs, outputs = _ends(nodes)
        part = _part(graph, nodes, inputs, outputs)
        what = _signature(part.graph)
        if what not in compiled:
            compiled[what] = compile_part(part, [_value(node) for node in inputs])
        setattr(held, f"part_{number}", compiled[what])
        results = whole.call_module(f"part_{number}", tuple(made[node] for node in inputs))
        made |= {node: whole.call_function(getitem, (results, place)) for place, node in enumerate(outputs)}
    whole.node_copy(graph.graph.output_node(), made.__getitem__)
    held.graph = whole
    return held.forward


def _parts(graph: fx.Graph) -> Iterator[list[fx.Node]]:
    """The operations, cut where they come to another layer outside of contexts."""
    nodes, last, entered = list[fx.Node](), None, 0
    for node in graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        layer = _layer(node, last)
        if layer != last and nodes and not entered:
            yield nodes
            nodes = []
        last = layer
        entered += _name(node).startswith("_enter_") - _name(node).startswith("_exit_")
        nodes.append(node)
    yield nodes


def _layer(node: fx.Node, last: str | None) -> str | None:
    """The outermost element of a list of modules in which an operation was met; `last` is that of the one before.

    Contexts are entered and left by operations that belong to no module: they go with what is inside.
    """
    while _name(node).startswith("_enter_"):
        node = node.next
    if not node.meta.get("nn_module_stack"):
        return last
    found = _ELEMENT.match(next(reversed(node.meta["nn_module_stack"].values()))[0])
    return found and found[0]


def _name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", "")


def _ends(nodes: Sequence[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
    """What a part reads of others, and what others read of it."""
    own = {*nodes}
    inputs = dict.fromkeys(node for reader in nodes for node in reader.all_input_nodes if node not in own)
    return [*inputs], [node for node in nodes if any(reader not in own for reader in node.users)]


def _part(
    owner: fx.GraphModule, nodes: Iterable[fx.Node], inputs: Iterable[fx.Node], outputs: Iterable[fx.Node]
) -> fx.GraphModule:
    graph, made = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in inputs:
        made[node] = graph.placeholder(node.name)
        made[node].meta = dict(node.meta)
    for node in nodes:
        made[node] = graph.node_copy(node, made.__getitem__)
    graph.output(tuple(made[node] for node in outputs))
    return fx.GraphModule(owner, graph)


def _value(node: fx.Node) -> Any:
    return node.meta["example_value"]


def _signature(graph: fx.Graph) -> Hashable:
    """All that the code of a part depends on."""
    number = {node: index for index, node in enumerate(graph.nodes)}
    return tuple(
        (
            node.op,
            _kind(_value(node)) if node.op == "placeholder" else node.target,
            repr(tree_map_only(fx.Node, lambda other: f"node {number[other]}", (list(node.args), dict(node.kwargs)))),
        )
        for node in graph.nodes
    )


def _kind(value: Any) -> Hashable:
    """What code depends on in an input."""
    if not isinstance(value, Tensor):
        return type(value), str(value)
    return str(value.shape), str(value.stride()), value.dtype, value.device, value.requires_grad
