"""What the launchers know of the device that they launch on. Imports triton: only what launches imports this."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs

# Triton's interpreter (TRITON_INTERPRET=1, read when triton is imported) has no bfloat16 arithmetic, `tl.dot` included:
# kernels take this as the constexpr UPCAST and compute on float32 copies of what they loaded.
UPCAST: bool = knobs.runtime.interpret


class Chip(NamedTuple):
    """What the choice of a configuration depends on."""

    arch: str  # family, the key of `configs`: "sm_80", "sm_90", "sm_100", "gfx942"
    processors: int  # multiprocessors or compute units: how many programs run at once, at one each
    tma: bool  # has the bulk tensor copy engine
    overlaps: bool  # has programmatic dependent launch: programs may begin before those they wait for have ended
    precision: str = "tf32x3"  # of products of float32 matrices: about that of float32 itself


# Processors are those of the A100, H100/H200, B200 and MI300X: launches at hand ask the device, compilation ahead of time
# has none to ask. sm_80 stands for every earlier and consumer chip, so its configurations fit the 99 KB of those.
CHIPS = {
    chip.arch: chip
    for chip in (
        Chip("sm_80", 108, False, False),
        Chip("sm_90", 132, True, True),
        Chip("sm_100", 148, True, True),
        Chip("gfx942", 304, False, False, "ieee"),
    )
}


def chip() -> Chip:
    """Of the current device; the interpreter passes for an sm_80."""
    if UPCAST:
        return CHIPS["sm_80"]._replace(processors=4)
    target: Any = triton.runtime.driver.active.get_current_target()
    if target.backend == "hip":
        if not str(target.arch).startswith("gfx9"):
            raise ValueError(
                f"The kernels were never compiled for {target.arch}, only for gfx9 (MI200, MI300) among AMD's."
            )
        known = CHIPS["gfx942"]
    else:
        known = CHIPS[{9: "sm_90", 10: "sm_100"}.get(int(target.arch) // 10, "sm_80")]
    return known._replace(processors=_processors() or known.processors)


def _processors() -> int | None:
    """None where programs are only compiled."""
    return torch.cuda.get_device_properties().multi_processor_count if torch.cuda.is_available() else None


def on(tensor: Tensor) -> torch.cuda.device_of:
    """Context in which launches go to the device of `tensor`: Triton launches on the current one."""
    return torch.cuda.device_of(tensor)
