"""The kernels on the device that is here: skipped where there is none. PART=2/5 runs every fifth test from the second on."""

import os

import pytest
import torch


def pytest_collection_modifyitems(items):
    part, parts = map(int, os.environ.get("PART", "1/1").split("/"))
    items[:] = items[part - 1 :: parts]
    for item in items:
        if "kernels/tests/gpu" in item.path.as_posix():
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
