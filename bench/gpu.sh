#!/usr/bin/env bash
# All that is worth knowing of a GPU, in nine minutes at most: GPU tests, sanitizers, scan, latency, training, counters.
#
#     bench/gpu.sh                          JSON and logs under $OUT (runs/gpu), from which RESULTS.md is written
#     DEVICE=cpu TINY=1 bench/gpu.sh        the same on a CPU, in less than a minute: tries this file
#     STAGES="tests scan" bench/gpu.sh      only those
#
# A stage ends at its own limit or at the deadline (SECONDS_IN_ALL); one that fails does not stop the next, but is the
# exit code. With mamba_ssm where Python finds it, it is timed too. ncu and compute-sanitizer are used where they are.
set -u
cd "$(dirname "$0")/.."
OUT=${OUT:-runs/gpu}; mkdir -p "$OUT"; OUT=$(cd "$OUT" && pwd)
python=${PYTHON:-python3}; device=${DEVICE:-cuda}; tiny=${TINY:-}; all=${SECONDS_IN_ALL:-540}
failed=0; : > "$OUT/summary.txt"
export PYTHONUNBUFFERED=1
[[ $tiny ]] && export OMP_NUM_THREADS=1   # on a busy machine a second thread only waits

say() { echo "$*" | tee -a "$OUT/summary.txt"; }

stage() {  # NAME LIMIT COMMAND...: run with the smaller of the limit and what is left; all it says goes to NAME.log
  local name=$1 limit=$2 left=$((all - SECONDS)) start=$SECONDS code; shift 2
  [[ -z ${STAGES:-} || " $STAGES " == *" ${name%%-*} "* ]] || return 0
  if (( left < 10 )); then say "== $name: no time left"; return 0; fi
  timeout -k 5 $((limit < left ? limit : left)) "$@" > "$OUT/$name.log" 2>&1; code=$?
  [[ $code = 0 || $code$tiny = 124 ]] || failed=1   # on a GPU, what ran out of time has written what it had
  say "== $name: exit code $code after $((SECONDS - start)) s"
  grep -hE '^\||^no CUDA graph|passed|failed|skipped|: error: |ERROR SUMMARY|RACECHECK SUMMARY|^FAILED|^ERROR' "$OUT/$name.log" \
    | cut -c1-200 | tail -40 | tee -a "$OUT/summary.txt"
}

missing() { [[ $device = cuda ]] && command -v "$1" > /dev/null && return 1; say "== without $1"; }

bench() { local name=$1 limit=$2 script=$3; shift 3; stage "$name" "$limit" "$python" "bench/$script.py" --device "$device" --json "$OUT/$name.json" "$@"; }

[[ $device = cuda ]] && nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,power.limit --format=csv,noheader | tee -a "$OUT/summary.txt"
mapfile -t gpu_tests < <(grep -rl --include="test_*.py" requires_cuda tests)
workers=(-n 0); [[ $device = cuda ]] && workers=(-n 8 --maxprocesses 8 --dist load)   # compiling takes most of it
stage tests 170 "$python" -m pytest "${gpu_tests[@]}" -m requires_cuda "${workers[@]}" -rfE --tb=short -p no:cacheprovider

sizes=(--length 256 --batch 64 1 16 4 --seconds 0.2)
[[ $tiny ]] && sizes=(--length 32 --batch 1 --seconds 0.02 --backend reference chunked)
bench scan 80 scan "${sizes[@]}"
[[ $tiny ]] || bench scan-long 30 scan --length 4096 65536 --batch 4 --dtype fp32 --seconds 0.2

forms=(plain fused fused-bf16 cuda-graph cuda-graph-bf16); [[ $device = cuda ]] || forms=(plain fused)
network=(--preset paper); [[ $tiny ]] && network=(--preset plus --backbone resnet18 --image-size 64)
seconds=10; [[ $tiny ]] && seconds=1
latency=("${network[@]}" --encoders mamba --patch-sizes 4 --forms "${forms[@]}" --seconds "$seconds")
bench latency-1 60 latency "${latency[@]}" --batch 1
[[ $tiny ]] || bench latency-64 80 latency "${latency[@]}" --batch 64

rate=("${network[@]}" --seconds "$seconds"); [[ $tiny ]] && rate+=(--images 4)
bench rate 50 rate "${rate[@]}"
[[ $tiny ]] || bench rate-amp 50 rate "${rate[@]}" --amp

small=("$python" -m pytest tests/kernels/test_triton_kernels.py -m requires_cuda -k on_a_gpu_small -n 0 -p no:cacheprovider)
if ! missing compute-sanitizer; then
  ours=(); for kernel in forward_kernel backward_kernel chunk_ends_kernel conv_kernel conv_slope_kernel; do
    ours+=(--kernel-name "kns=$kernel"); done
  for tool in racecheck memcheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 stage "sanitizer-$tool" 50 compute-sanitizer --tool "$tool" --error-exitcode 1 \
      --target-processes all --print-limit 20 "${ours[@]}" "${small[@]}"
  done
fi
if ! missing ncu; then
  for kernel in forward backward; do   # the second of a kind: the first is that of the check
    stage "counters-$kernel" 40 ncu --clock-control none --target-processes all -k "regex:^${kernel}_kernel$" -s 1 -c 1 --set full \
      "$python" bench/scan.py --device cuda --backend triton --length 256 --batch 64 --dtype fp32 --seconds 0
  done
fi
say "== all: $SECONDS s, $([[ $failed = 0 ]] && echo 'nothing failed' || echo 'something FAILED')"
exit $failed
