"""The ops specdec runs on: tree attention and what else is worth a kernel.

`specdec_kernels.reference` is the specification, in plain torch: it is importable without triton and runs without a GPU.
On CUDA devices the ops launch the kernels of `specdec_kernels.triton`; `attention`, `linear` and
`linear_bf16` are for a CPU, and `joined_linear` is made of torch's products.
"""

from specdec_kernels.attention import attention
from specdec_kernels.compact import compact
from specdec_kernels.gated_delta import gated_delta
from specdec_kernels.joined_linear import joined_linear
from specdec_kernels.law import law
from specdec_kernels.linear import linear
from specdec_kernels.linear_attention import fold_linear_attention, linear_attention
from specdec_kernels.stored_linear import linear_bf16, linear_int4, linear_int8
from specdec_kernels.tree_attention import tree_attention
from specdec_kernels.verify import verify

DEVICES = {"cuda"}  # types of devices that there are kernels for

__all__ = [
    "DEVICES",
    "attention",
    "compact",
    "fold_linear_attention",
    "gated_delta",
    "joined_linear",
    "law",
    "linear",
    "linear_attention",
    "linear_bf16",
    "linear_int4",
    "linear_int8",
    "tree_attention",
    "verify",
]
