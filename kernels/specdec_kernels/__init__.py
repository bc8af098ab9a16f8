"""The ops specdec runs on: tree attention and what else is worth a kernel.

`specdec_kernels.reference` is the specification, in plain torch: it is importable without triton and runs without a GPU.
"""
