"""The kernels on the device that is here: skipped where there is none."""

import pytest
import torch


def pytest_collection_modifyitems(items):
    for item in items:
        if "kernels/tests/gpu" in item.path.as_posix():
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
