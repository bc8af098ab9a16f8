#!/usr/bin/env bash
# Everything that needs a GPU, in under nine minutes: tests of the kernels on the device, then their timings.
# Needs torch >= 2.11 with CUDA, triton >= 3.6, transformers >= 5.17, pytest and this checkout; no network, no installation.
# Results: experiments/results/kernels_<gpu>_<date>.json and .md. PYTHON chooses the Python.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
RESULTS=${RESULTS:-experiments/results}
export PYTHONPATH=$PWD:$PWD/kernels PYTHONUNBUFFERED=1 TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$PWD/outputs/triton}
unset TRITON_INTERPRET

"$PYTHON" -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "experiments/gpu.sh: torch sees no GPU here.")' || exit 1
mkdir -p outputs
timeout 240 "$PYTHON" -m pytest kernels/tests/gpu -q --junitxml=outputs/gpu_tests.xml
tested=$?
timeout 280 "$PYTHON" kernels/bench/bench_tree_attention.py --tests outputs/gpu_tests.xml --results "$RESULTS" --seconds 200
timed=$?
exit $((tested > timed ? tested : timed))
