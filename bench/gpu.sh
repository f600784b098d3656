#!/usr/bin/env bash
# Everything that needs a GPU, in under ten minutes: build, tests, sanitizers, benchmarks.
#
#   bash bench/gpu.sh [STAGE ...]      stages: build tests sanitize numerics bench (default: all)
#
# For a machine with python3, torch, triton, pybind11, cmake, ninja and nvcc, and without a network:
# nothing is downloaded, no virtual environment is made. Peers come from wheels in the folder .whl
# of the repository where it exists. CSVs and pictures go to $OUT (default bench/results), and one
# archive of them and of all logs. A stage that fails or runs out of its time does not stop the
# others; the exit code tells at the end.
#
#   KDK_CUDA_ARCHS   architectures to build for (default 90a)
#   KDK_COMMIT       what the CSVs call the commit, for a copy without git
#   KDK_GPU_SECONDS  time for everything (default 570); no stage may go beyond it
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

OUT=${OUT:-bench/results}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
LOGS=$(mktemp -d)
PYTHON=${PYTHON:-python3}
WANTED=${*:-build tests sanitize numerics bench}
SITE=${KDK_PEERS_SITE:-$LOGS/site}
TOTAL=${KDK_GPU_SECONDS:-570}

export KDK_CUDA=on KDK_CUDA_ARCHS=${KDK_CUDA_ARCHS:-90a} MAX_JOBS=${MAX_JOBS:-$(nproc)}
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
touch "$LOGS/began"

table=()
status=0

note() { table+=("$(printf '%-12s %8s  %s' "$1" "$2" "$3")"); }
wanted() { [[ " $WANTED " == *" $1 "* ]]; }
left() { echo $((TOTAL - SECONDS)); }

# run NAME SECONDS COMMAND...: runs a command under a time limit, keeps its log, notes how it ended.
run() {
  local name=$1 limit=$2 began=$SECONDS code word
  shift 2
  ((limit <= $(left))) || limit=$(left)
  if ((limit < 5)); then
    skip "$name" "no time is left"
    return 1
  fi
  echo "== $name (at most $limit s): $*"
  timeout --kill-after=5 "$limit" "$@" 2>&1 | tee "$LOGS/$name.log"
  code=${PIPESTATUS[0]}
  case $code in
    0) word=ok ;;
    124 | 137) word="out of time after $limit s" ;;
    *) word="failed, code $code" ;;
  esac
  ((code == 0)) || status=1
  note "$name" $((SECONDS - began)) "$word"
  return "$code"
}

# skip NAME REASON: a stage that cannot run is a failure that says why.
skip() {
  echo "== $1: not run: $2"
  note "$1" - "not run: $2"
  status=1
}

if wanted build; then
  run build 150 "$PYTHON" setup.py build_ext --inplace --parallel "$MAX_JOBS"
fi
run info 30 "$PYTHON" -m kdkernels info

if wanted tests; then
  flags=(-q -p no:cacheprovider --maxfail=20 --continue-on-collection-errors)
  # Without the plugin the stage's own limit is the only one.
  if "$PYTHON" -c 'import pytest_timeout' 2>/dev/null; then flags+=(--timeout 60); fi
  KDK_TEST_BACKENDS=cuda run tests 150 "$PYTHON" -m pytest "${flags[@]}" tests
fi

if wanted sanitize; then
  sanitizer=$(PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin command -v compute-sanitizer)
  for tool in memcheck racecheck synccheck; do
    if [[ -z $sanitizer ]]; then
      skip "$tool" "compute-sanitizer is not installed"
      continue
    fi
    # The caching allocator would hide an access beyond a tensor but inside its block.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 run "$tool" 45 "$sanitizer" --tool "$tool" \
      --error-exitcode 9 "$PYTHON" tests/gpu_smoke.py
  done
fi

if wanted numerics || wanted bench; then
  # Without their wheels the peers are rows that say so.
  if compgen -G '.whl/*.whl' >/dev/null; then
    if run peers 40 "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile \
      --no-cache-dir --upgrade --target "$SITE" .whl/*.whl; then
      export PYTHONPATH="$PYTHONPATH:$SITE"
    fi
  fi
fi
if wanted numerics; then
  # Without torch.compile: the compiler's start-up would take the time of the benchmarks.
  run numerics 60 "$PYTHON" bench/numerics.py --device cuda --no-compile --csv "$OUT/numerics-cuda.csv"
fi
if wanted bench; then
  # No new run starts in the last 40 s, so that the tables and the picture are still written.
  run bench "$(left)" "$PYTHON" -m kdkernels bench --device cuda --peers \
    --time-limit $(($(left) - 40)) --out "$OUT" --plot "$OUT/bench-cuda.png"
fi

{
  printf '%-12s %8s  %s\n' stage seconds status
  printf '%s\n' "${table[@]}"
  echo "in all: $SECONDS s"
} | tee "$LOGS/summary.log"

# One archive: the logs, and what this run wrote into $OUT.
mapfile -t written < <(cd "$OUT" && find . -maxdepth 1 -type f -newer "$LOGS/began" \
  \( -name '*.csv' -o -name '*.png' \))
((${#written[@]} == 0)) || cp "${written[@]/#/$OUT/}" "$LOGS"
tar -czf "$OUT/gpu.tar.gz" --exclude=./site --exclude=./began -C "$LOGS" .
rm -rf "$LOGS"
exit "$status"
