"""Memory in large pages: reading weights costs a translation of addresses per page, and there are 512 times fewer of them.

Products read several rows of a matrix side by side, each in a page of its own, which is more than a processor remembers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

from torch import Tensor

# Linux's <asm-generic/mman-common.h>: make large pages now (from Linux 6.1 on), or when the system comes to it.
_COLLAPSE, _ADVISE = 25, 14
_SIZE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")


def keep_in_large_pages(tensors: Iterable[Tensor]) -> int:
    """Ask the system to hold the memory of tensors in large pages, where it lies; values and addresses stay.

    It takes about as long as copying them. Tensors on other devices are left out. Memory that is a file's, as of weights that
    were mapped and not read, and small tensors with nothing of their kind beside them, stay in small pages.

    Returns:
        Bytes of large pages that were made or were there; 0 where the system has none, or makes them later.
    """
    size = page_size()
    if not size:
        return 0
    starts = {start for tensor in tensors if tensor.device.type == "cpu" for start in _pages(tensor, size)}
    advise = ctypes.CDLL(None).madvise
    return size * sum(_is_made(advise, start, size) for start in sorted(starts))


@cache
def page_size() -> int:
    """Bytes of a large page; 0 if the system has none."""
    try:
        return int(_SIZE.read_text("ascii"))
    except (OSError, ValueError):
        return 0


def _pages(tensor: Tensor, size: int) -> range:
    """Addresses of the large pages that a tensor touches."""
    start = tensor.data_ptr()
    return range(start - start % size, start + tensor.nbytes, size)


def _is_made(advise: Callable[..., int], start: int, size: int) -> bool:
    place = ctypes.c_void_p(start), ctypes.c_size_t(size)
    if advise(*place, _COLLAPSE) == 0:
        return True
    advise(*place, _ADVISE)
    return False
