#!/usr/bin/env bash
# Everything that needs a GPU, in one run of at most nine minutes: gpu tests, op benchmarks, step benchmark.
# Works with the Python that holds torch (2.11 with triton 3.6, or the pinned versions); installs nothing, reaches no network.
#
#   benchmarks/gpu_check.sh [OUTPUT_FOLDER]     # default: benchmarks/results
#   PYTHON=.venv/bin/python benchmarks/gpu_check.sh out
#   benchmarks/gpu_check.sh --cpu [FOLDER]      # does this script work? tiny shapes, no GPU; default: a temporary folder
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
unset TRITON_INTERPRET

CPU=
if [[ ${1:-} == --cpu ]]; then
    CPU=1
    shift
    export CUDA_VISIBLE_DEVICES=
    FOLDER=${1:-$(mktemp -d)}
else
    FOLDER=${1:-benchmarks/results}
    "$PYTHON" - <<'EOF' || exit 2
import sys, torch
if not torch.cuda.is_available():
    sys.exit("error: no CUDA device; this check is for a machine with one (--cpu tries the script itself)")
import triton
print(f"{torch.cuda.get_device_name()}  torch {torch.__version__}  triton {triton.__version__}")
EOF
fi
OUT=$(mkdir -p "$FOLDER" && cd "$FOLDER" && pwd)
HARDWARE=$(cd benchmarks && "$PYTHON" -c "import harness; print(harness.hardware_slug())") || exit 2
RECORD="$OUT/$HARDWARE.json"
STEP_RECORD="$OUT/train_step_$HARDWARE.json"
declare -A STATUS
stage() {  # name, seconds, command...
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    echo "== $name"
    timeout "$limit" "$@" 2>&1 | tee "$OUT/gpu_check_$name.log" | tail -n 40
    STATUS[$name]="rc ${PIPESTATUS[0]}, $((SECONDS - start)) s"
}

# Hundreds of kernel specialisations compile here: several processes where pytest-xdist is installed.
PARALLEL=()
"$PYTHON" -c "import xdist" 2>/dev/null && PARALLEL=(-n 8)
TESTS=(tests)
TRAINER=1
"$PYTHON" -c "import pydantic, peft, bitsandbytes, yaml, jinja2" 2>/dev/null || {
    TRAINER=
    TESTS=(tests/kernels)
    echo "the trainer's own dependencies are not all here: gpu tests and benchmarks of the ops only"
}
OPS=(--benchmark-enable --benchmark-only)
STEP=(--benchmark-enable --benchmark-disable-gc)
if [[ $CPU ]]; then
    PARALLEL=()
    TESTS=(tests/kernels/test_gpu.py)
    OPS+=(--smoke -k "pairwise or window")
    STEP+=(--smoke --cases real)
else
    # The largest batch of the small weights first, then the setting at which eager fits most cards.
    STEP+=(--rounds 2 --cases llama3-8b-nf4-b4-real,llama3-8b-bfloat16-b1-real)
fi
stage tests 190 "$PYTHON" -m pytest "${TESTS[@]}" -m gpu -q --timeout 180 -o addopts="--strict-markers -ra --benchmark-skip" "${PARALLEL[@]}"
stage ops 140 "$PYTHON" -m pytest benchmarks -q -p no:cacheprovider "${OPS[@]}" --results "$RECORD"
if [[ $TRAINER ]]; then
    LEFT=$((530 - SECONDS))  # of nine minutes, less the time to report
    stage step $((LEFT > 60 ? LEFT : 60)) "$PYTHON" -m pytest benchmarks/test_train_step.py -q -p no:cacheprovider "${STEP[@]}" --results "$STEP_RECORD"
else
    STATUS[step]="skipped: it needs the trainer's dependencies"
fi

echo "== results"
for record in "$RECORD" "$STEP_RECORD"; do
    [[ -f $record ]] && "$PYTHON" benchmarks/report.py "$record"
done
failed=0
for name in tests ops step; do
    printf '%-6s %s\n' "$name" "${STATUS[$name]}"
    case ${STATUS[$name]} in "rc 0,"* | skipped:*) ;; *) failed=1 ;; esac
done
echo "records and logs: $OUT"
exit $failed
