"""Forward passes compiled by torch.compile: a layer once for all that are alike, once per number of tokens of a pass.

Code is for texts of any length in a cache of one size: attention reads on the device how many slots there are to see, and the
room behind them costs nothing. Where there is no such kernel (float16 and float64 on a CPU, patterns but causal and sliding),
it goes through all slots of the cache under a dense bias.

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
from tqdm import tqdm

from specdec.cache_folder import compiled_folder
from specdec.models.layerwise import by_layer
from specdec.models.routing import left_out
from specdec_kernels.linear import pays

_SHAPES = 256  # most shapes compiled of one model; torch's own limit is 8
_FOLDER = "TORCHINDUCTOR_CACHE_DIR"  # the variable that names inductor's
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

    with inductor.patch(post_grad_custom_pre_pass=_ReadOnce()):
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


class _ReadOnce(CustomGraphPass):
    """On a CPU, read large matrices from memory once for several tokens.

    MKL computes x @ W.T for up to three tokens in the time that W takes to be read, and needs twice that for four.
    """

    def __call__(self, graph: fx.Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default):
            _replace_product(graph, node)

    def uuid(self) -> bytes:
        return get_hash_for_files((__file__, inspect.getfile(pays)))


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


def _untransposed(node: Any) -> fx.Node | None:
    """W if the node is W.T and W an input of the graph."""
    return node.args[0] if node.target is torch.ops.aten.permute.default and node.args[0].op == "placeholder" else None
