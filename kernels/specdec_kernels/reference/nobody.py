"""A question that is free on a CPU, and would make the host wait elsewhere."""

from __future__ import annotations

from torch import Tensor

FREE = "cpu"  # the kind of device that can be asked for nothing


def nobody(rows: Tensor) -> bool:
    """Whether no row [batch] bool is True, on a CPU. Elsewhere False, so that work is done which may not be needed."""
    return rows.device.type == FREE and not bool(rows.any())
