#!/usr/bin/env bash
# Everything that needs a GPU, on a machine without network, in under 10 minutes: the gpu tests, then both benchmarks.
#   kernels/bench/gpu.sh [WHEELS [OUT]]
# WHEELS: a folder with wheels of pytorch-metric-learning and flash-kmeans (baselines; left out, their rows say so).
# OUT: where the results go (default benchmarks/results): kernels_margin_<GPU>.jsonl, kernels_kmeans_<GPU>.jsonl,
# gpu_tests_<GPU>.log.
# Python 3.11 or newer with torch >= 2.9, triton >= 3.6, numpy and pytest must be there. DNC_COMMIT names the commit where git cannot.
set -euo pipefail
cd "$(dirname "$0")/../.."
wheels=${1:-}
out=${2:-benchmarks/results}
mkdir -p "$out"
export PYTHONPATH=kernels:. PYTHONUNBUFFERED=1 PYTHONSAFEPATH=1
if [ -n "$wheels" ]; then
  site=$(mktemp -d)
  python3 -m pip install -q --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl
  PYTHONPATH=$PYTHONPATH:$site
fi
gpu=$(python3 -c 'import re, torch; print(re.sub(r"[^a-z0-9]+", "_", torch.cuda.get_device_name().lower()))')
python3 -c 'import torch, triton, dnc_kernels as k; print(torch.__version__, triton.__version__, k.implementation_note("cuda"))'

failed=0
step() { # seconds, then the command: one that fails or outlasts its time does not keep the next from running
  local seconds=$1 started=$SECONDS
  shift
  timeout "$seconds" "$@" 2>&1 || failed=1
  echo "== $((SECONDS - started)) s: $*"
}
# Most of the tests' time is compilation, which runs side by side where pytest-xdist is there.
workers=$(python3 -c 'import importlib.util as u; print("-n 8" if u.find_spec("xdist") else "")')
tests=(tests/test_triton_gpu.py tests/test_triton_sampling.py tests/test_triton_margin.py tests/test_triton_lloyd.py)
# shellcheck disable=SC2086
step 180 python3 -m pytest "${tests[@]}" $workers -p no:cacheprovider --durations=5 > "$out/gpu_tests_$gpu.log"
step 205 python3 -m bench.margin --device cuda --seconds 0.3 --out "$out/kernels_margin_$gpu.jsonl"
step 160 python3 -m bench.kmeans --device cuda --seconds 0.3 --out "$out/kernels_kmeans_$gpu.jsonl"
tail -n 20 "$out/gpu_tests_$gpu.log"
exit "$failed"
