"""A stand-in for CUDA graphs, on any device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from specdec.engines.host_reads import watching


class Tape:
    """A captured stage of a step. A replay carries out its operations again, in the same memory, without its Python.

    >>> engine = specdec.Graphs(capture=specdec.testing.Tape)
    >>> specdec.generate(target, prompts, drafter, engine=engine)  # the text is that of engine="eager"

    With it, tests on a CPU find what a CUDA graph would not repeat: a tensor that a later step does not fill where the
    graph reads it, or a number that the host has computed once. As with CUDA graphs, capturing changes nothing: memory that
    the stage has written to is restored, and only a replay leaves results. It is slower than calling the stage.

    Args:
        stage: a function without arguments; it is called once.
    """

    outputs: Any  # what the stage returned; every replay fills the same tensors
    bytes: int  # of memory that its operations have made and that it keeps

    def __init__(self, stage: Callable[[], Any]):
        recorder = _Recorder()
        try:
            with watching, recorder:
                self.outputs = stage()
        finally:  # a stage that cannot be captured is run as it stands, from where it was
            for storage, content in recorder.before.values():
                storage.copy_(content)
        self._operations, self.bytes = recorder.operations, sum(recorder.made.values())

    def replay(self) -> None:
        """Carry out the operations of the stage again."""
        for func, args, kwargs, out in self._operations:
            inputs = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
            for old, new in zip(_tensors(out), _tensors(func(*args, **kwargs)), strict=True):
                # Views, and inputs that were written to, are in place already.
                if new.untyped_storage().data_ptr() not in inputs:
                    old.copy_(new)


class _Recorder(TorchDispatchMode):
    """Notes every operation, and the contents of all memory before it is first written to."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []  # function, arguments, keyword arguments, result
        self.before: dict[int, tuple[Any, Any]] = {}  # by address: a storage, and what it held
        self.made: dict[int, int] = {}  # by address: bytes of storages that are results of operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for tensor in _tensors((args, kwargs)):
                storage = tensor.untyped_storage()
                self.before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        out = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, out))
        given = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
        storages = [tensor.untyped_storage() for tensor in _tensors(out)]
        self.made |= {each.data_ptr(): each.nbytes() for each in storages if each.data_ptr() not in given}
        return out


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
