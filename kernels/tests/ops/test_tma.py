"""The copy engine is asked to read what CUDA's documentation says it can, in an order of axes that nests."""

import pytest
import torch

from specdec_kernels import tma

CACHE, CONTIGUOUS = (2, 40, 8, 64), (2, 8, 40, 64)


def memory(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype)


KEYS = {  # [batch, head, slot, dim]
    "as the cache is": (memory(*CACHE).transpose(1, 2), tma.BY_SLOT),
    "the first slots of the cache": (memory(*CACHE)[:, :24].transpose(1, 2), tma.BY_SLOT),
    "contiguous": (memory(*CONTIGUOUS), tma.BY_HEAD),
    "one head": (memory(2, 40, 1, 64).transpose(1, 2), tma.BY_HEAD),
    "rows of 80": (memory(2, 40, 8, 80).transpose(1, 2), tma.BY_SLOT),
    "rows of 12 bytes": (memory(2, 40, 8, 6).transpose(1, 2), None),
    "beginning between units": (memory(2 * 40 * 8 * 64 + 1)[1:].view(CACHE).transpose(1, 2), None),
    "heads repeated by strides": (memory(2, 1, 40, 64).expand(2, 8, 40, 64), None),
    "batches inside of slots": (memory(40, 2, 8, 64).permute(1, 2, 0, 3), None),
    "heads with gaps that do not divide a slot": (memory(2, 40, 1000)[:, :, :960].unflatten(2, (8, 120)).transpose(1, 2), None),
    "every second element": (memory(2, 8, 40, 128)[..., ::2], None),
}  # fmt: skip


@pytest.mark.parametrize("name", KEYS)
def test_only_nested_strides_in_whole_units_are_read_by_the_copy_engine(name):
    key, expected = KEYS[name]
    assert tma.axes(key.stride(), key.element_size(), key.data_ptr()) == expected


def test_strides_are_shorter_than_the_longest_there_may_be():
    for batch, expected in ((1 << 38, tma.BY_HEAD), (1 << 39, None)):
        assert tma.axes((batch, 1 << 20, 64, 1), 2, 0) == expected
