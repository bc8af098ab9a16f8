"""Compiles every kernel for GPUs that need not be there, and holds it to budgets.json.

python kernels/tools/aot_gate.py            the quick cases for sm_80 and sm_90: with every change
python kernels/tools/aot_gate.py --all      every case, for sm_100 and gfx942 too
python kernels/tools/aot_gate.py --write    ... and write what was found as the new budgets of what was compiled

Budgets count what is written: how often a loop is gone through, and so what a kernel reads, is counted in the interpreter
(kernels/tests/interpret/test_reads.py).
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
_SLACK = 1.1  # of what other versions of the compiler take a little more of
_EXACT = {"spills": "spill instructions", "stack": "bytes of stack", "products": "instructions of the tensor cores"}
_ABOUT = {
    "registers": "registers a thread",
    "shared": "bytes of shared memory",
    "length": "instructions",
    "per_token": "instructions a token",
}
Budgets = dict[str, dict[str, int]]  # arch and launch and kernel -> what it may take


def main(arguments: list[str]) -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--all", action="store_true", help="every case, for every chip")
    options.add_argument("--write", action="store_true", help="write what was found to budgets.json")
    chosen = options.parse_args(arguments)
    archs = tuple(SHARED) if chosen.all else QUICK
    launches = [launch for launch in CASES if chosen.all or launch.quick]
    recorded = json.loads(BUDGETS.read_text("utf-8"))
    measured, faults = gate(archs, launches, recorded["kernels"])
    if chosen.all:
        gone = recorded["kernels"].keys() - measured
        faults += [f"{name}: it has a budget, and nothing launches it: --all --write" for name in gone]
    if chosen.write:
        others = {} if chosen.all else recorded["kernels"]
        recorded = {"triton": triton.__version__, "kernels": {**others, **measured}}
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
                found = measured[name] = {field: getattr(kernel, field) for field in (*_EXACT, *_ABOUT)}
                if lacking := sorted(found.keys() - budgets.get(name, {}).keys()):
                    faults.append(
                        f"{name}: no budget of {', '.join(lacking)}: look at what it takes, then --all --write"
                    )
                faults += [f"{name}: {fault}" for fault in _faults(arch, launch, kernel, found | budgets.get(name, {}))]
    return measured, faults


def _faults(arch: str, launch: Launch, kernel: Compiled, budget: dict[str, int]) -> Iterator[str]:
    if kernel.shared > SHARED[arch]:
        yield f"{kernel.shared} bytes of shared memory, {arch} has {SHARED[arch]}: smaller tiles or fewer stages"
    for fields, slack in ((_EXACT, 1.0), (_ABOUT, _SLACK)):
        for field, unit in fields.items():
            if (found := getattr(kernel, field)) > slack * budget[field]:
                yield f"{found} {unit}, its budget is {budget[field]}"
    if kernel.kernel == launch.kernel:
        found, most = resident(arch, kernel.registers, kernel.shared, kernel.warps), launch.resident(arch)
        if found < most:
            yield f"{found} programs fit a multiprocessor, the plan counts on {most}: correct `Config.resident`"
        for need in launch.needs:
            if arch in need and not any(op.startswith(need[arch]) for op in kernel.instructions):
                yield f"no {need[arch]} instruction: it does not use the unit it is meant for"


if __name__ == "__main__":
    main(sys.argv[1:])
