"""The ops specdec runs on: tree attention and what else is worth a kernel.

`specdec_kernels.reference` is the specification, in plain torch: it is importable without triton and runs without a GPU.
On CUDA devices the ops launch the kernels of `specdec_kernels.triton`.
"""

from specdec_kernels.tree_attention import tree_attention

__all__ = ["tree_attention"]
