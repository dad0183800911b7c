#!/usr/bin/env bash
# Proves the GPU backends on this machine, then times them: tests, sanitizers, bench. Needs a GPU, no network. `bench` times
# everything and proves nothing but what each bench looks at before it times: it is for a machine on which the others have passed.
#
#   bash tests/gpu_check.sh PYTHON [quick|full|bench]
#
# Everything goes to $OUT (out/): gpu-check.log with the output of all stages, summary.txt, and the times, which also go to
# bench/results/. Exit status: 0 all passed, 1 something failed, 2 no GPU. A stage that fails does not stop the next ones, but
# nothing is timed after a failure. $LIMIT is the time for all of it, in seconds (make counts its own work too); a stage that it
# leaves no time for fails.
set -uo pipefail
python=$(realpath -s "$(command -v "$1")") || { echo "$1: expected a python, found none"; exit 1; }
mode=${2:-quick}
out=$(realpath -m "${OUT:-out}")
cd "$(dirname "$0")/.."
mkdir -p "$out" bench/results
log=$out/gpu-check.log
summary=$out/summary.txt
: >"$log"
: >"$summary"
case $mode in
  full) limit=${LIMIT:-5400} longer=6 ;;
  bench) limit=${LIMIT:-1200} longer=2 ;;
  *) limit=${LIMIT:-530} longer=1 ;;
esac
failed=0
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

say() { echo "$*" | tee -a "$log" "$summary"; }
note() { say "note: $*"; }
has() { "$python" -c "import $1" 2>/dev/null; }

# stage NAME SECONDS COMMAND...: in full mode it has longer. Returns whether it passed; its output stays in $output until the next one.
stage() {
  local name=$1 seconds=$(($2 * longer)) left=$((limit - SECONDS)) start=$SECONDS
  seconds=$((seconds < left ? seconds : left))
  shift 2
  output=$(mktemp -p "$scratch")
  status=pass
  printf '\n=== %s: %s\n' "$name" "$*" >"$output"
  if [ "$left" -lt 5 ]; then
    status="FAIL, no time left"
  else
    timeout -k 10 "$seconds" "$@" >>"$output" 2>&1
    case $? in
      0) ;;
      124) status="FAIL, time limit" ;;
      # one that does not end when it is told to; or the system, which was out of memory
      137) status="FAIL, killed"; [ $((SECONDS - start)) -ge "$seconds" ] && status="FAIL, time limit" ;;
      *) status=FAIL ;;
    esac
  fi
  cat "$output" >>"$log"
  # pytest ends with the number of its tests
  say "$(printf '%-28s %-18s %4d s  %s' "$name" "$status" $((SECONDS - start)) \
    "$(grep -aE '(passed|failed|skipped|errors?).* in [0-9.]+s' "$output" | tail -n 1 | tr -d = | cut -c 1-80)")"
  [ "$status" = pass ] && return
  findings | head -n 5 | cut -c 1-200 | tee -a "$summary"
  return 1
}

# What a sanitizer says of each finding before it ends, and pytest of a test that failed. Returns whether there is any.
findings() {
  {
    grep -aE '^=========' "$output" | grep -avE '=  |COMPUTE-SANITIZER|SUMMARY: 0 |Target application|terminate successfully|Warning: [^R]'
    grep -aE '^(FAILED|ERROR)' "$output"
    grep -aE '^[.sx]*[EF][.sxEF]*( +\[|$)' "$output"
    true
  } | grep -a .
}

# sanitize TOOL TESTS: a tool that had found nothing when its time was over has passed, and so has one that cannot run here. First
# comes what is rarely run: where time ends, the sizes are cut short, which the tests have seen.
sanitize() {
  stage "compute-sanitizer $1" 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" \
    --error-exitcode 9 --report-api-errors no "${pytest[@]}" -x tests/test_short_rows.py tests/test_reduce.py tests/test_plif.py \
    tests/test_linear.py tests/test_labels.py tests/test_tail.py "tests/test_kernels.py::"{test_many_short_rows,test_few_long_rows,test_delta,test_layouts_and_logits_unchanged,test_sizes} \
    -k "$2" && return
  # a virtual machine may keep the debugging interface from it
  if grep -q "Device not supported" "$output"; then
    note "compute-sanitizer does not support this device: no $1"
  elif [ "$status" = "FAIL, time limit" ] && ! findings >/dev/null && grep -qaE '^[.sx]+' "$output"; then
    note "compute-sanitizer $1 had found nothing in $(grep -aoE '^[.sx]+' "$output" | tr -d '\n' | wc -c) tests when its time was over"
  else
    return 1
  fi
}

"$python" -m sparse_ce | tee -a "$log"
if ! "$python" -c "import torch, sys; sys.exit(not torch.cuda.is_available())"; then
  say "no GPU: torch sees none on this machine, so nothing was proved"
  exit 2
fi
nvidia-smi >>"$log" 2>&1

prove() {
  has pytest || { say "FAIL: the tests need pytest"; exit 1; }
  parallel=()
  cores=$(nproc)
  if has xdist; then
    parallel=(-n "${WORKERS:-$((cores < 14 ? cores : 14))}" --dist worksteal)
  else
    note "without pytest-xdist the tests run one by one"
  fi
  has hypothesis || note "without hypothesis its tests are left out"
  has expecttest || note "without expecttest opcheck is left out"
  pytest=("$python" -m pytest -q --maxfail=20 -p no:cacheprovider -rs)

  export SPARSE_CE_REQUIRE=cuda,triton,cpu,eager
  # every worker would start as many compilers as there are cores
  export TORCHINDUCTOR_COMPILE_THREADS=1
  # In quick mode one 16-bit dtype, and of the sizes those of the sanitizers. Both backends in one run: to start the workers takes
  # half a minute.
  sizes="33x5 or 257x21 or 1003x20 or 1003x129 or 5001x20 or 5001x300 or 5001x5001"
  less=" and not -float16"
  [ "$mode" = full ] && less=""
  selected="(cuda-cuda or triton-cuda) and not 2_31$less"
  [ "$mode" = full ] || selected="$selected and (not test_sizes or $sizes)"
  stage "tests of cuda and triton" 300 "${pytest[@]}" "${parallel[@]}" tests -k "$selected" --ignore-glob="*_aot.py" || failed=1
  # one by one: each takes ten GB or more
  stage "more than 2^31 elements" 60 "${pytest[@]}" tests/test_kernels.py tests/test_reduce.py \
    -k "2_31 and (triton-cuda or cuda-cuda)" || failed=1
  if [ "$mode" = full ]; then
    stage "all other tests" 600 "${pytest[@]}" "${parallel[@]}" tests --ignore-glob="*_aot.py" \
      -k "not triton-cuda and not cuda-cuda" || failed=1
  fi

  # Small cases of every kind of kernel, the tools side by side. Without torch's cache every tensor is an allocation of its own,
  # with ends.
  [ "$mode" = full ] && sizes="129x128 or 4096x1 or 4096x100 or 5001x1024 or $sizes"
  cases="(test_sizes and ($sizes)) or (test_layouts and misaligned) or (test_few_long_rows and (bfloat16 or float64)) or test_delta or test_sums_of_weighted_rows"
  cases="$cases or (test_many_short_rows and bfloat16) or test_dslopes or (test_tables and 1025)"
  short_rows="test_rows_of_a_warp and (triton or bfloat16)"
  [ "$mode" = full ] && short_rows="test_rows_of_a_warp"
  cases="$cases or ($short_rows) or test_lists_of_any_length or test_the_same_bits_again or (test_values and 16385-weight)"
  tools=(memcheck racecheck synccheck)
  [ "$mode" = full ] && tools+=(initcheck)
  command -v compute-sanitizer >/dev/null || { note "without compute-sanitizer no memory errors and races are looked for"; tools=(); }
  running=()
  for tool in "${tools[@]}"; do
    # races in shared memory and barriers of threads: Triton lays out its own
    backends="cuda-cuda"
    [ "$tool" = memcheck ] && backends="triton-cuda or cuda-cuda"
    sanitize "$tool" "($backends)$less and ($cases)" &
    running+=($!)
  done
  for process in "${running[@]}"; do wait "$process" || failed=1; done

  if [ "$failed" = 1 ]; then
    say "nothing was timed: a stage failed"
    exit 1
  fi
}

[ "$mode" = bench ] || prove

machine=$("$python" - <<'NAME'
import re
import torch

versions = f"torch{torch.__version__.partition('+')[0]}-cuda{torch.version.cuda}"
print(re.sub("[^a-z0-9.]+", "-", f"{torch.cuda.get_device_name()}-{versions}".lower()))
NAME
)

# bench NAME SECONDS MODULE ARGUMENTS...: its times go to bench/results when all of it has been timed
bench() {
  local name=$1 seconds=$2 module=$3 json=$out/$1-$machine.json
  shift 3
  rm -f "${json%.json}"*
  stage "bench: $name" "$seconds" "$python" -m "bench.$module" --device cuda "$@" --json "$json" || { failed=1; return; }
  if [ "$name" = floor ] && has matplotlib; then
    for backend in cuda triton; do
      stage "picture of $backend" 30 "$python" -m bench.plot "$json" --provider "sparse_ce.$backend" --out "${json%.json}-$backend.png" ||
        failed=1
    done
  fi
  cp "${json%.json}"* bench/results/
}

has matplotlib || note "without matplotlib there is no picture: python -m bench.plot"
# the compiled composition takes a minute to compile
rivals=(--provider sparse_ce.cuda sparse_ce.triton cross_entropy composition liger quack)
floor=(--dtype bf16 --repeats 10 "${rivals[@]}")
[ "$mode" = full ] && floor=(--dtype bf16 fp32)
bench floor 100 run --suite floor "${floor[@]}"
[ "$mode" = quick ] || bench linear 120 linear --dtype bf16 --repeats 6 --seconds 3
if [ "$mode" = bench ]; then
  # first what README shows and waits for
  bench tail 40 run --suite tail --dtype bf16 --repeats 8
  bench threshold 40 run --suite threshold --dtype bf16 --repeats 8
  bench plif 60 plif --dtype bf16 --repeats 5
  bench short 60 run --suite short --dtype bf16 --repeats 8 "${rivals[@]}"
  bench cut 30 run --shape 2048 32000 2000 --dtype bf16 --repeats 8 "${rivals[@]}"  # k beyond what lists hold
  bench small 45 run --suite small --dtype bf16 --repeats 100 "${rivals[@]}"
  bench floor-fp32 100 run --suite floor --dtype fp32 --repeats 8 "${rivals[@]}"
  bench continuous 40 continuous
  bench break-even 60 linear --break-even --dtype bf16 fp32
fi
[ "$failed" = 0 ] || exit 1
[ "$mode" = bench ] || say "passed: all that this machine can run"
