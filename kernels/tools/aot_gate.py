"""Compiles every kernel for GPUs that need not be there, and holds it to budgets.json.

python kernels/tools/aot_gate.py            the quick cases for sm_80 and sm_90: with every change
python kernels/tools/aot_gate.py --all      every case, for sm_100 and gfx942 too
python kernels/tools/aot_gate.py --write    ... and write what was found as the new budgets of what was compiled
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import triton
from ahead_of_time import SHARED, Compiled, compiling
from aot_cases import CASES, Launch

from specdec_kernels.plan import resident

BUDGETS = Path(__file__).resolve().parents[1] / "budgets.json"
QUICK = ("sm_80", "sm_90")
_SLACK = 1.1  # of instructions by token: other versions of the compiler write a few more
Budgets = dict[str, dict[str, int]]  # arch and launch and kernel -> what it may take; nothing said: no spills, no stack


def main(arguments: list[str]) -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--all", action="store_true", help="every case, for every chip")
    options.add_argument("--write", action="store_true", help="write what was found to budgets.json")
    chosen = options.parse_args(arguments)
    archs = tuple(SHARED) if chosen.all else QUICK
    launches = [launch for launch in CASES if chosen.all or launch.quick]
    recorded = json.loads(BUDGETS.read_text("utf-8"))
    measured, faults = gate(archs, launches, recorded["kernels"])
    if chosen.write:
        recorded = {"triton": triton.__version__, "kernels": {**recorded["kernels"], **measured}}
        BUDGETS.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n", "utf-8")
    elif faults:
        sys.exit(
            f"{len(faults)} faults (budgets of triton {recorded['triton']}, this is {triton.__version__}):\n"
            + "\n".join(faults)
        )
    print(
        f"{len(measured)} kernels compiled for {', '.join(archs)}{', budgets written' if chosen.write else ': within budget'}"
    )


def gate(archs: tuple[str, ...], launches: list[Launch], budgets: Budgets) -> tuple[Budgets, list[str]]:
    """What every kernel takes, and what is wrong with it."""
    measured, faults = {}, []
    for arch in archs:
        for launch in launches:
            with compiling(arch) as kernels:
                launch.run()
            for kernel in kernels:
                name = f"{arch} {launch.name} {kernel.kernel}"
                fields = ("registers", "spills", "stack", "shared", *(["per_token"] if kernel.per_token else []))
                measured[name] = {field: getattr(kernel, field) for field in fields}
                faults += [f"{name}: {fault}" for fault in _faults(arch, launch, kernel, budgets.get(name, {}))]
    return measured, faults


def _faults(arch: str, launch: Launch, kernel: Compiled, budget: dict[str, int]) -> Iterator[str]:
    if kernel.shared > SHARED[arch]:
        yield f"{kernel.shared} bytes of shared memory, {arch} has {SHARED[arch]}: smaller tiles or fewer stages"
    for field, unit in (("spills", "spill instructions"), ("stack", "bytes of stack")):
        found, most = getattr(kernel, field), budget.get(field, 0)
        if found > most:
            yield f"{found} {unit}, its budget is {most}: smaller tiles, fewer stages or more warps"
    most = budget.get("per_token", kernel.per_token)
    if kernel.per_token > _SLACK * most:
        yield f"{kernel.per_token} instructions a token, its budget is {most}: fewer passes over the vocabulary"
    if kernel.kernel == launch.kernel:
        found, most = resident(arch, kernel.registers, kernel.shared, kernel.warps), launch.resident(arch)
        if found < most:
            yield f"{found} programs fit a multiprocessor, the plan counts on {most}: correct `Config.resident`"
        for need in launch.needs:
            if arch in need and not any(op.startswith(need[arch]) for op in kernel.instructions):
                yield f"no {need[arch]} instruction: it does not use the unit it is meant for"


if __name__ == "__main__":
    main(sys.argv[1:])
