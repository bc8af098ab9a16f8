"""Whether work may be skipped: a question that is free on a CPU, and would make the host wait elsewhere."""

from __future__ import annotations

from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode


def all_false_cheaply(rows: Tensor) -> bool:
    """Whether no row [batch] bool is True, on a CPU. Elsewhere False, so that work is done which may not be needed.

    Under a TorchDispatchMode too: whoever watches or records operations on a CPU finds those of a GPU.
    """
    return rows.device.type == "cpu" and _get_current_dispatch_mode() is None and not bool(rows.any())
