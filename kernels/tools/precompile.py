"""Compiles kernels for a GPU beforehand, where there is none: minutes that the machine with the GPU does not spend.

    python kernels/tools/precompile.py kernels_sm_90.tar.gz          then there: KERNELS=kernels_sm_90.tar.gz make gpu-smoke

The archive is a cache of Triton's, which knows a kernel by its source, by what it was specialised on, and by the exact build of
Triton (that of the same version for another Python is another one). So use the Python and Triton of that machine; what is not
found there is compiled there. Launches are made on tensors without memory, so any size will do.
"""

from __future__ import annotations

import argparse
import os
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), *(str(ROOT / "kernels" / folder) for folder in ("", "bench", "tools"))]

import ahead_of_time  # noqa: E402
import bench_recurrences  # noqa: E402
import bench_splits  # noqa: E402
import bench_stored_linear  # noqa: E402
import bench_tree_attention  # noqa: E402
import bench_verify  # noqa: E402
import smoke  # noqa: E402
import torch  # noqa: E402
import verification  # noqa: E402
from floors import Compaction, Laws, Product, Recurrence, Shape  # noqa: E402

from specdec_kernels.triton.compact import compact  # noqa: E402
from specdec_kernels.triton.gated_delta import gated_delta  # noqa: E402
from specdec_kernels.triton.law import law  # noqa: E402
from specdec_kernels.triton.linear_attention import fold_linear_attention, linear_attention  # noqa: E402
from specdec_kernels.triton.stored_linear import stored_linear  # noqa: E402
from specdec_kernels.triton.tree_attention import tree_attention  # noqa: E402
from specdec_kernels.triton.verify import verify  # noqa: E402


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("archive", type=Path)
    options.add_argument("--arch", default="sm_90")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        with ahead_of_time.compiling(chosen.arch) as kernels:
            for launch in launches():
                launch()
        with tarfile.open(chosen.archive, "w:gz") as archive:
            for path in sorted(Path(folder).iterdir()):
                archive.add(path, arcname=path.name)
    print(f"{len(kernels)} launches, {chosen.archive.stat().st_size / 1e6:.1f} MB")


def launches() -> Iterator[partial]:
    """Those of the smoke call, of the sweep of splits and of the kernels' benchmarks; each once."""
    shapes = [*(s for some in smoke.OPS.values() for s in some), *bench_splits.shapes_of("", False)]
    shapes += [*bench_tree_attention.shapes(), *bench_verify.shapes(), *bench_recurrences.shapes()]
    for shape in dict.fromkeys(shapes):
        if isinstance(shape, Shape):
            yield partial(_attention, shape, getattr(shape, "splits", None))
        elif isinstance(shape, Compaction):
            yield partial(_compact, shape)
        elif isinstance(shape, Recurrence):
            yield partial(_recurrence, shape)
        elif isinstance(shape, Product):
            yield partial(_product, shape)
        elif isinstance(shape, Laws):
            yield partial(_law if shape.op == "law" else _verify, shape)


def _attention(shape, splits) -> None:
    batch, nodes, dim, slots = shape.batch, shape.nodes, shape.head_dim, shape.length + shape.nodes
    query, key, value = (
        _empty(batch, count, heads, dim, torch.bfloat16).transpose(1, 2)
        for count, heads in ((nodes, shape.heads), (slots, shape.kv_heads), (slots, shape.kv_heads))
    )
    first, lengths = _empty(batch, nodes, torch.int32), _empty(batch, torch.int32)
    ancestors = _empty(batch, nodes, -(-nodes // 32), torch.int32)
    tree_attention(query, key, value, first, lengths, ancestors, None, shape.softcap, None, splits)


def _law(shape) -> None:
    law(_empty(shape.batch * shape.nodes, shape.vocab, torch.bfloat16), *verification.SAMPLINGS[shape.sampling])


def _verify(shape) -> None:
    batch, nodes, width = shape.batch, shape.nodes, shape.width
    integers, coins = _empty(batch, nodes, torch.int64), _empty(batch, nodes, torch.float64)
    children, laws = _empty(batch, nodes, width, torch.int64), _empty(batch, nodes, torch.uint8)
    draft = None if shape.children == "POINT" else _empty(batch, shape.internal, shape.vocab, torch.float32)
    logits = _empty(batch, nodes, shape.vocab, torch.bfloat16)
    filters = verification.SAMPLINGS[shape.sampling]
    verify(logits, integers, children, laws, draft, coins, coins, shape.depth, *filters, lenience=1.0)


def _compact(shape) -> None:
    stack = _empty(2 * shape.layers, shape.batch, 64, shape.kv_heads, shape.head_dim, torch.bfloat16)
    counts = _empty(shape.batch, torch.int64)
    compact(stack, _empty(shape.batch, shape.kept, torch.int64), counts, counts)


def _recurrence(shape) -> None:
    drawn = bench_recurrences.inputs(replace(shape, batch=1), "cpu", 0)
    arguments = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") for x in drawn]
    kernel = {"gated_delta": gated_delta, "linear_attention": linear_attention}.get(shape.op)
    if kernel is None:
        fold_linear_attention(*arguments)
    else:
        kernel(*arguments[: -bench_recurrences.FOLDED], arguments[-bench_recurrences.FOLDED :])


def _product(shape) -> None:
    x, weight, scales, out = bench_stored_linear.inputs(replace(shape, out=64), "cpu", 0)
    stored_linear(x.to("meta"), weight.to("meta"), scales.to("meta"), out)


def _empty(*what):
    *sizes, dtype = what
    return torch.empty(sizes, dtype=dtype, device="meta")


if __name__ == "__main__":
    main()
