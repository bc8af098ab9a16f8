"""Forward passes compiled by torch.compile: a layer once for all that are alike, once per number of tokens of a pass.

Code is for texts of any length in a cache of one size: attention reads on the device how many slots there are to see, and the
room behind them costs nothing. Where there is no such kernel (float16 and float64 on a CPU, patterns but causal and sliding),
it goes through all slots of the cache under a dense bias.

On a GPU, products of one input whose matrices lie together are one: see `specdec.join_weights`. Kernels wait until the last one
has ended, as torch has it; TORCHINDUCTOR_ENABLE_PDL=1 lets those of torch begin earlier, from Hopper on.

What is compiled is kept in the cache folder (see `specdec.cache_folder`), where later processes find it.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any
from weakref import WeakSet

import torch
from torch import fx, nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch._inductor import config as inductor
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

import specdec_kernels
from specdec.cache_folder import compiled_folder
from specdec.models.layerwise import by_layer
from specdec.models.routing import left_out
from specdec_kernels.linear import pays

_SHAPES = 256  # most shapes compiled of one model; torch's own limit is 8
_FOLDER = "TORCHINDUCTOR_CACHE_DIR"  # the variable that names inductor's
_VIEWS = torch.ops.aten.view.default, torch.ops.aten.reshape.default
_not_compiled: WeakSet[nn.Module] = WeakSet()


class Compiled:
    """A function that is compiled for every shape; it runs uncompiled if torch.compile cannot compile all of it.

    Args:
        run: the function.
        model: the model that it runs. A progress bar names it while it is compiled, which takes seconds. A model that cannot
            be compiled is not tried again.
    """

    def __init__(self, run: Callable[..., Any], model: nn.Module):
        self._run, self._model, self._name = run, model, type(model).__name__
        self._call = torch.compile(run, backend=_backend, fullgraph=True, dynamic=False)
        self._shapes: set[Hashable] = set()

    @property
    def works(self) -> bool:
        """Whether the model could be compiled so far."""
        return self._model not in _not_compiled

    def __call__(self, shape: tuple[int, ...], *args: Any) -> Any:
        """Call the function. `shape` is all of its arguments that the compiled code depends on."""
        if is_in_torch_dispatch_mode(include_infra_modes=False):  # `HostReads` watches, and torch.compile refuses that
            return self._run(*args)
        key = shape, left_out()
        what = f"compiling {self._name}, {' x '.join(map(str, shape))}"
        try:
            with _rules(), tqdm(total=1, desc=what, leave=False, delay=1, disable=key in self._shapes) as bar:
                self._shapes.add(key)
                result = self._call(*args)
                bar.update()
                return result
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            reason = str(getattr(error, "inner_exception", error)).strip().splitlines()[0]
            warnings.warn(f"engine: {self._name} cannot be compiled and runs as it stands: {reason}", stacklevel=2)
            _not_compiled.add(self._model)
            return self._run(*args)


def _rules() -> AbstractContextManager[object]:
    """How torch.compile decides what to compile again: known shapes too, when the model was changed."""
    # Torch leaves it unseen when a model gets its first hook.
    return torch._dynamo.config.patch(recompile_limit=_SHAPES, skip_nnmodule_hook_guards=False)


def _backend(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    with _own_folder():
        return by_layer(graph, _part)


def _part(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx  # which takes seconds to be imported

    with inductor.patch(post_grad_custom_pre_pass=_Products()):
        return compile_fx(graph, list(inputs))  # type: ignore[return-value]


@contextlib.contextmanager
def _own_folder() -> Iterator[None]:
    """Inductor keeps code in our cache folder if it can, unless the user has named another one."""
    found = os.environ.get(_FOLDER)
    ours = compiled_folder() if found in (None, default_cache_dir()) else None
    if ours is None:
        yield
        return
    os.environ[_FOLDER] = str(ours)
    try:
        yield
    finally:
        if found is None:
            del os.environ[_FOLDER]
        else:
            os.environ[_FOLDER] = found


class _Products(CustomGraphPass):
    """Products with matrices that are inputs of the graph, as they are fastest.

    On a CPU, large ones are read from memory once for several tokens: MKL computes x @ W.T for up to three tokens in the time
    that W takes to be read, and needs twice that for four. On a GPU, products of one input are joined: those of matrices that
    lie together (see `specdec.join_weights`) are one then.
    """

    def __call__(self, graph: fx.Graph) -> None:
        by_input: dict[Hashable, list[fx.Node]] = {}
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default):
            if _matrix(node) is not None:
                by_input.setdefault(_origin(node.args[0]), []).append(node)
        for nodes in by_input.values():
            if len(nodes) > 1 and nodes[0].meta["val"].device.type in specdec_kernels.DEVICES:
                _join(graph, nodes)
            else:
                for node in nodes:
                    _read_once(graph, node)

    def uuid(self) -> bytes:
        return get_hash_for_files((__file__, inspect.getfile(pays)))


def _join(graph: fx.Graph, nodes: Sequence[fx.Node]) -> None:
    """Replace products of one input by parts of `specdec_kernels.joined_linear`."""
    x, place = nodes[0].args[0], 0
    with graph.inserting_before(nodes[0]):
        joined = _call(graph, torch.ops.specdec.joined_linear.default, x, [_matrix(node) for node in nodes])
        for node in nodes:
            end = place + node.meta["val"].shape[1]
            node.replace_all_uses_with(_call(graph, torch.ops.aten.slice.Tensor, joined, 1, place, end))
            place = end
    for node in nodes:
        graph.erase_node(node)


def _read_once(graph: fx.Graph, node: fx.Node) -> None:
    """Replace a product by `specdec_kernels.linear` where that pays."""
    x: Any = node.args[0]
    weight: Any = _matrix(node)
    if not pays(len(x.meta["val"]), x.meta["val"], weight.meta["val"]):
        return
    with graph.inserting_before(node):
        node.replace_all_uses_with(_call(graph, torch.ops.specdec.linear.default, x, weight))
    graph.erase_node(node)


def _call(graph: fx.Graph, op: Any, *args: Any) -> fx.Node:
    made = graph.call_function(op, args)
    made.meta["val"] = op(*tree_map_only(fx.Node, lambda node: node.meta["val"], args))
    return made


def _origin(x: Any) -> Hashable:
    """The same for nodes that are one tensor in one shape."""
    shape = x.meta["val"].shape
    while x.target in _VIEWS:
        x = x.args[0]
    return x, shape


def _matrix(node: fx.Node) -> fx.Node | None:
    """W if the node is a product x @ W.T and W an input of the graph."""
    right: Any = node.args[1]
    return (
        right.args[0] if right.target is torch.ops.aten.permute.default and right.args[0].op == "placeholder" else None
    )
