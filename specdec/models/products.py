"""On a CPU, products of a few tokens with large matrices read each matrix once, in passes of ours alone.

Torch's product of a few rows in float32 or bfloat16 takes up to three times as long as reading the matrix;
`specdec_kernels.linear` does not.

Several threads may run one model at a time, and copy or pickle it meanwhile. So nothing is written into a model: from the first
such pass of a process on, `nn.Linear` itself asks in which thread it is called.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional

from specdec_kernels.cpu import can_load
from specdec_kernels.linear import linear, pays


class _Here(threading.local):
    def __init__(self) -> None:  # not a class attribute: torch.compile takes those to be the same in every thread
        self.passes = 0  # how many passes of ours this thread is inside of


_here = _Here()


def few_rows(device: torch.device) -> AbstractContextManager[object]:
    """A context for passes over a few tokens, in this thread: on a CPU, linear layers compute these where that is faster."""
    if device.type != "cpu" or not can_load():
        return nullcontext()
    if nn.Linear.forward.__module__ == nn.Linear.__module__:  # else somebody else has replaced it: leave that
        nn.Linear.forward = _forward
    return _FewRows()


class _FewRows:
    def __enter__(self) -> None:
        _here.passes += 1

    def __exit__(self, *_: object) -> None:
        _here.passes -= 1


def _forward(self: nn.Linear, input: Tensor) -> Tensor:
    """Runs the forward pass."""
    weight = self.weight  # once: it may be computed (parametrizations)
    # by itself: TorchScript cannot compile what is beneath it, and takes "type: ignore" for a type
    if not torch.jit.is_scripting():  # pyright: ignore  # noqa: SIM102
        if _here.passes and _suits(weight, self.bias, input):
            return _product(input, weight, self.bias)
    return functional.linear(input, weight, self.bias)


def _suits(weight: Tensor, bias: Tensor | None, input: Tensor) -> bool:
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    if bias is not None and input.dtype != torch.float32:  # torch adds a bias before it rounds
        return False
    return type(weight) is nn.Parameter and pays(input.shape[:-1].numel(), input, weight)


def _product(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    found: Tensor = linear(input.reshape(-1, input.shape[-1]), weight).view(*input.shape[:-1], -1)
    return found if bias is None else found.add_(bias)
