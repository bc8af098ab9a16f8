"""Whether the rows of a cache fit into memory."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from specdec.models.layer_shapes import RecurrentShape, Slab


class DoesNotFit(ValueError):
    """So many rows do not fit into the memory of a device."""


def _row_bytes(
    slabs: Sequence[Slab], recurrent: Sequence[RecurrentShape], capacity: int, nodes: int, states: int
) -> dict[torch.device, int]:
    """Bytes that a row takes on each device, with so many recurrent states."""
    found: dict[torch.device, int] = {}
    for slab in slabs:
        found[slab.device] = found.get(slab.device, 0) + capacity * slab.heads * slab.dim * slab.dtype.itemsize
    for shape in recurrent:
        found[shape.input.device] = found.get(shape.input.device, 0) + shape.bytes(nodes, states)
    return found


def check_memory(
    slabs: Sequence[Slab], recurrent: Sequence[RecurrentShape], batch: int, capacity: int, nodes: int, marks: bool
) -> None:
    """Raise DoesNotFit if so many rows cannot fit into the memory of a device."""
    # rows that are filled again keep two states
    rows, smaller = (_row_bytes(slabs, recurrent, capacity, nodes, states) for states in (1 + marks, 2))
    states = "two a row, " if marks else ""
    what = f"Recurrent states, {states}trees of {nodes} nodes, keys" if recurrent else "Keys"
    for device, row in rows.items():
        free = free_memory(device)
        if free is not None and row * batch > free:
            fits = free // smaller[device]
            cure = f"pass batch_size={fits}" if fits else "shorten the prompts or lower max_new_tokens"
            raise DoesNotFit(
                f"{what} and values of {batch} texts of up to {capacity} tokens take {row * batch / 1e9:.1f} GB on {device}, "
                f"where {free / 1e9:.1f} GB can be had; {cure}."
            )


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be allocated on a GPU, or all that a CPU has; None where it is not known."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    return all_memory(device)


def all_memory(device: torch.device) -> int | None:
    """Bytes of memory that a device has; None where it is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if device.type == "cpu" and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None
