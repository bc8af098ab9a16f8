"""Memory of tensors is put into large pages where the system has them, and holds what it held."""

import os
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from pathlib import Path

import pytest
import torch

from specdec_kernels.cpu.large_pages import keep_in_large_pages, page_size


def large_pages() -> int:
    """Bytes of large pages that this process has."""
    said = Path(f"/proc/{os.getpid()}/smaps_rollup").read_text("ascii")
    return next(1024 * int(line.split()[1]) for line in said.splitlines() if line.startswith("AnonHugePages"))


@pytest.mark.skipif(not page_size(), reason="this system has no large pages")
def test_what_is_said_to_be_in_large_pages_is_there_and_what_it_was():
    before, memory = large_pages(), mmap(-1, 8 * page_size(), flags=MAP_PRIVATE | MAP_ANONYMOUS)
    tensor = torch.frombuffer(memory, dtype=torch.float32)
    torch.arange(len(tensor), out=tensor)
    place, made = tensor.data_ptr(), keep_in_large_pages([tensor, tensor[:10]])
    assert made in range(0, 9 * page_size() + 1, page_size())
    assert large_pages() - before >= min(made, 7 * page_size())  # those at the ends may hold other memory
    assert tensor.data_ptr() == place and torch.equal(tensor, torch.arange(len(tensor), dtype=torch.float32))


def test_a_system_without_large_pages_is_asked_for_nothing(monkeypatch):
    monkeypatch.setattr("specdec_kernels.cpu.large_pages.page_size", lambda: 0)
    assert keep_in_large_pages([torch.zeros(4)]) == 0


def test_the_system_is_not_asked_for_memory_of_other_devices(monkeypatch):
    asked = []
    monkeypatch.setattr("specdec_kernels.cpu.large_pages.page_size", lambda: 4096)
    monkeypatch.setattr("specdec_kernels.cpu.large_pages._is_made", lambda *place: asked.append(place) or True)
    keep_in_large_pages([torch.zeros(4, device="meta")])
    assert not asked
