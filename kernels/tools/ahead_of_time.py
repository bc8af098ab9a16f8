"""Compiles what a launcher launches for a GPU that is not there, and reads what became of it."""

from __future__ import annotations

import contextlib
import itertools
import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED = {"sm_80": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}  # bytes a program may use
_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
_SASS = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", re.MULTILINE)
_GCN = re.compile(r"^\s+([a-z][a-z0-9_]+)", re.MULTILINE)


class Compiled(NamedTuple):
    """One kernel as a chip would run it."""

    kernel: str
    registers: int  # a thread
    spills: int  # loads and stores of spilled registers
    stack: int  # bytes a thread
    shared: int  # bytes a program
    warps: int  # a program
    # Of kernels over the vocabulary, instructions of a thread by token it holds, rounded up; 0 of others.
    per_token: int
    instructions: Counter[str]

    @property
    def length(self) -> int:
        """Instructions as they are written; those of a loop count once."""
        return self.instructions.total() - self.instructions["NOP"]

    @property
    def products(self) -> int:
        """Instructions of the tensor cores among them."""
        return sum(count for name, count in self.instructions.items() if re.search("MMA|mfma", name))


class _Absent(DriverBase):
    """Stands for the driver of a GPU that is not there: launchers run as they are, on CPU tensors, and only compile."""

    _numbers = itertools.count()

    def __init__(self, target: GPUTarget):
        # Triton keeps compiled kernels in memory by device number: under a new one it begins with none, asks the cache
        # folder, and writes there what it compiles
        self.target, self.number = target, next(self._numbers)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.number

    def set_current_device(self, device): ...

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_device_capability(self, device=None):
        return divmod(self.target.arch, 10) if isinstance(self.target.arch, int) else (9, 4)

    @classmethod
    def is_active(cls):
        return True

    def map_python_to_cpp_type(self, ty):
        return ty

    def get_benchmarker(self):
        raise NotImplementedError

    def get_empty_cache_for_benchmark(self):
        raise NotImplementedError


@contextlib.contextmanager
def compiling(arch: str) -> Iterator[list[Compiled]]:
    """Launches inside compile for `arch` and do not run; collects the kernels. None is taken over from another such block."""
    compiled, launch = [], JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        kernel: Any = launch(self, *args, grid=grid, warmup=True, **options)
        threads = TARGETS[arch].warp_size * kernel.metadata.num_warps
        tokens = options["BLOCK"] / threads if "BLOCK" in options and "vocab" in self.arg_names else 0
        compiled.append(_read(self.fn.__name__, kernel, tokens))
        return kernel

    driver.set_active(_Absent(TARGETS[arch]))
    JITFunction.run = compile_only
    try:
        yield compiled
    finally:
        JITFunction.run = launch
        driver._active = None


def _read(name: str, kernel: Any, tokens: float) -> Compiled:
    """`tokens`: how many of the vocabulary a thread holds."""
    shared, warps = kernel.metadata.shared, kernel.metadata.num_warps

    def per_token(instructions: Counter[str]) -> int:
        return math.ceil((instructions.total() - instructions["NOP"]) / tokens) if tokens else 0

    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        vgpr, spills, stack = (
            int(re.search(rf"\.{field}:\s+(\d+)", text)[1])  # type: ignore[index]
            for field in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
        )
        instructions = Counter(_GCN.findall(text))
        return Compiled(name, vgpr, spills, stack, shared, warps, per_token(instructions), instructions)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        instructions = Counter(_SASS.findall(_run("nvdisasm", "-c", file.name)))
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())  # type: ignore[union-attr]
    spills = instructions["LDL"] + instructions["STL"]
    return Compiled(name, registers, spills, stack, shared, warps, per_token(instructions), instructions)


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout
