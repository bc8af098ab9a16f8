"""Every kernel in Triton's interpreter, on CPU tensors. The flag counts only if set before triton is imported."""

import os
import sys
from importlib.metadata import version

import pytest
from packaging.version import Version

assert "triton" not in sys.modules, "run these tests in a process of their own: pytest kernels/tests/interpret"
os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items):
    if Version(version("triton")) < Version("3.7") and Version(version("numpy")) >= Version("2.4"):
        for item in items:  # its loops make an int of an array of one number, which numpy has refused since
            item.add_marker(pytest.mark.skip(reason="the interpreter of triton 3.6 needs numpy < 2.4"))


@pytest.fixture
def poisoned():
    """Memory that a launcher asks for holds NaN and the largest integers: what it happens to hold must not count."""
    import torch

    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
