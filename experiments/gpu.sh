#!/usr/bin/env bash
# Everything that needs a GPU, in under nine minutes: tests on the device, then timings of the kernels.
# Needs torch >= 2.11 with CUDA, triton >= 3.6, transformers >= 5.17, pytest and this checkout; no network, no installation.
# Results: experiments/results/kernels_<gpu>_<date>_{verification,tree_attention}.json and .md. PYTHON chooses the Python.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
RESULTS=${RESULTS:-experiments/results}
TESTS=outputs/gpu_tests # one report for each file of kernels/tests/gpu
export PYTHONPATH=$PWD:$PWD/kernels PYTHONUNBUFFERED=1 TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$PWD/outputs/triton}
unset TRITON_INTERPRET

"$PYTHON" -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "experiments/gpu.sh: torch sees no GPU here.")' || exit 1
rm -rf "$TESTS"
mkdir -p "$TESTS"
worst=0
ended() { worst=$(($1 > worst ? $1 : worst)); }

suites=(compact law verify graphs tree_attention)
pids=()
for suite in "${suites[@]}"; do # side by side: they mostly wait for the compiler
  timeout 250 "$PYTHON" -m pytest "kernels/tests/gpu/test_$suite.py" -q --junitxml="$TESTS/$suite.xml" &>"$TESTS/$suite.log" &
  pids+=($!)
done
for i in "${!suites[@]}"; do
  wait "${pids[i]}"
  ended $?
  echo "== ${suites[i]}"
  tail -n 60 "$TESTS/${suites[i]}.log"
done

bench() { # bench NAME SECONDS: a kernel is timed if its tests passed
  timeout $(($2 + 40)) "$PYTHON" "kernels/bench/bench_$1.py" --tests "$TESTS" --results "$RESULTS" --seconds "$2"
  ended $?
}
bench verify 60
bench tree_attention 130
exit $worst
