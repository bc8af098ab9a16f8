"""Every kernel in Triton's interpreter, on CPU tensors. The flag counts only if set before triton is imported."""

import os
import sys

assert "triton" not in sys.modules, "run these tests in a process of their own: pytest kernels/tests/interpret"
os.environ["TRITON_INTERPRET"] = "1"
