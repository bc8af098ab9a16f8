"""The least that a step can take on this machine, and what it takes (Williams et al., 2009): where the time goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from specdec.clock import finish, host_seconds
from specdec.models.ready import autocast_dtype
from specdec.models.stored_layers import StoredLinear
from specdec.models.target import ModelTarget, Target
from specdec.tuning import reading

_REPEATS = 5
# Of the product that tells the speed of arithmetic.
_ROWS = 256


@dataclass(frozen=True)
class Machine:
    """What this machine does in a second, as it was measured.

    Args:
        bandwidth: bytes read from memory, in the fastest of several ways.
        arithmetic: floating-point operations in a large product of the target's type.
    """

    bandwidth: float
    arithmetic: float


@dataclass(frozen=True)
class Roofline:
    """A forward pass of the target against the machine, in seconds.

    Args:
        machine: its speeds.
        weights: bytes of the target's weights, which every pass reads.
        cache: bytes of the keys and values of all rows, which every pass reads, too.
        operations: of one node of all rows.
        nodes, seconds: measured passes.
        alone: seconds of a step without a draft.
        shares: of a step with the plan's drafts: drafting, the target's pass, the loop.
    """

    machine: Machine
    weights: int
    cache: int
    operations: float
    nodes: Sequence[int]
    seconds: Sequence[float]
    alone: float
    shares: tuple[float, float, float]

    def least(self, nodes: int) -> float:
        """The least time of a pass: its memory read once, or its arithmetic."""
        return max(
            (self.weights + self.cache) / self.machine.bandwidth, nodes * self.operations / self.machine.arithmetic
        )

    def parts(self) -> dict[str, float]:
        """Where the time of a step of the plan goes, as shares that add up to 1."""
        draft, verify, other = self.shares
        whole = draft + verify + other
        floor = [part / self.machine.bandwidth / self.alone for part in (self.weights, self.cache)]
        scale = min(1.0, verify / sum(floor))  # a cache of the processor may hold part of it
        weights, attention = (part * scale for part in floor)
        named = {
            "reading weights": weights,
            "reading keys and values": attention,
            "the rest of the target's pass": verify - weights - attention,
            "drafting": draft,
            "the loop": other,
        }
        return {name: part / whole for name, part in named.items()}


def machine(model: PreTrainedModel) -> Machine:
    """Measure the speeds of the machine with the target's own weights."""
    weights = parameters(model)
    took = reading.least(weights, _REPEATS)["milliseconds"] / 1e3
    size, device = min(max(weights, key=torch.numel).shape[-1], 1024), weights[0].device
    a, b = (torch.ones(rows, size, dtype=model.dtype, device=device) for rows in (_ROWS, size))
    times = []
    with torch.inference_mode():
        for _ in range(_REPEATS):
            began = host_seconds()
            torch.mm(a, b)
            finish(device)
            times.append(host_seconds() - began)
    return Machine(sum(weight.nbytes for weight in weights) / took, 2 * _ROWS * size * size / min(times))


def parameters(model: PreTrainedModel) -> list[torch.Tensor]:
    """What a pass reads: matrices, each once and as it is stored, but for embeddings that are no LM head."""
    head, inputs = model.get_output_embeddings() or nn.Identity(), model.get_input_embeddings()
    apart = {id(p) for p in inputs.parameters()} - {id(p) for p in head.parameters()}
    plain = [p.detach() for p in model.parameters() if p.dim() > 1 and id(p) not in apart]
    return [*plain, *(kept for layer in _stored(model) for kept in layer.stored_parts)]


def products(model: PreTrainedModel) -> int:
    """Multiplications of a pass over one node."""
    kept = {id(part) for layer in _stored(model) for part in layer.stored_parts}
    plain = sum(weight.numel() for weight in parameters(model) if id(weight) not in kept)
    return plain + sum(layer.in_features * layer.out_features for layer in _stored(model))


def _stored(model: PreTrainedModel) -> list[StoredLinear]:
    return [part for part in model.modules() if isinstance(part, StoredLinear)]


def kept_bytes(target: Target, context: int) -> int:
    """Bytes of the keys and values of one row with so many tokens; 0 of what is no transformers model."""
    if not isinstance(target, ModelTarget):
        return 0
    slabs = [slab for layer in target.lm.layout(autocast_dtype(target.device)) for slab in layer.slabs or ()]
    return context * sum(slab.heads * slab.dim * slab.dtype.itemsize for slab in slabs)
