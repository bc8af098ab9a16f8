#!/usr/bin/env bash
# Everything that needs a GPU, in under nine minutes: tests on the device, then timings of the kernels.
# Needs torch >= 2.11 with CUDA, triton >= 3.6, transformers >= 5.17, pytest and this checkout; no network, no installation.
# Results: experiments/results/kernels_<gpu>_<date>_{verification,tree_attention}.json and .md. PYTHON chooses the Python, RESULTS
# another folder, and COMMIT says what was checked out where there is no git.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
RESULTS=${RESULTS:-experiments/results}
TESTS=outputs/gpu_tests # one report for each part of a file of kernels/tests/gpu
export PYTHONPATH=$PWD:$PWD/kernels PYTHONUNBUFFERED=1 TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$PWD/outputs/triton}
unset TRITON_INTERPRET

"$PYTHON" -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "experiments/gpu.sh: torch sees no GPU here.")' || exit 1
rm -rf "$TESTS"
mkdir -p "$TESTS"
worst=0
ended() { worst=$(($1 > worst ? $1 : worst)); }

# side by side, in parts: they mostly wait for the compiler, and most of what it makes belongs to one part of a suite
declare -A parts=([compact]=1 [law]=1 [verify]=5 [graphs]=4 [tree_attention]=5)
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 # what is installed here is not ours to choose, nor are its warnings: see -W
declare -A pids
for suite in "${!parts[@]}"; do
  for part in $(seq "${parts[$suite]}"); do
    name=$suite.$part
    : >"$TESTS/$name.xml" # stays empty if time runs out
    PART=$part/${parts[$suite]} OMP_NUM_THREADS=1 timeout 250 "$PYTHON" -m pytest "kernels/tests/gpu/test_$suite.py" -q -W default \
      --junitxml="$TESTS/$name.xml" &>"$TESTS/$name.log" &
    pids[$name]=$!
  done
done
for name in "${!pids[@]}"; do
  wait "${pids[$name]}"
  ended $?
  echo "== $name"
  tail -n 40 "$TESTS/$name.log"
done

bench() { # bench NAME SECONDS: a kernel is timed if its tests passed
  timeout $(($2 + 40)) "$PYTHON" "kernels/bench/bench_$1.py" --tests "$TESTS" --results "$RESULTS" --seconds "$2"
  ended $?
}
bench verify 60
bench tree_attention 130
exit $worst
