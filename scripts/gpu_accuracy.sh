#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
#
# One model, every method, on packed text (docs/training.md): an engine for each cache format and length, several
# side by side on each GPU, as each mostly waits for its host.
#   scripts/gpu_accuracy.sh MODEL DATA OUT LENGTH ...
# GPUS (default "0"), JOBS per GPU (4), SAMPLES (24), METHODS (sparq at its usual 0.125, twilight's 0.9, sparq at
# 1/16 of the bytes), NEEDLES (tasks with an answer; "fact fact_code" for a model of the training room that is too small for
# others), FEW samples (8) for quest and window, which loop over rows on the host, ONLY ("auto k8v4 int8 quest window":
# kinds of jobs). What is in OUT already is not run again; logs lie beside; it fails where a job does. Each job takes SAMPLES x length x 32 KiB of GPU memory, and a core.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
model=$1 data=$2 out=$3
shift 3
read -ra gpus <<<"${GPUS:-0}"
tails="repetition code prose"
needles=${NEEDLES:-needle needle_2keys needle_4keys needle_code needle_code_2keys needle_code_4keys}
only=${ONLY:-auto k8v4 int8 quest window}
mkdir -p "$out"

# GPU, name, length, options of benchmarks.accuracy.run
job() {
  local gpu=$1 file="$out/$2_$3"
  [ -f "$file.done" ] && return
  CUDA_VISIBLE_DEVICES=$gpu python3 -m benchmarks.accuracy.run --model "$model" --texts "$data" --lengths "$3" \
    --max-model-len $(($3 + 256)) --samples "${SAMPLES:-24}" --max-num-seqs "${SAMPLES:-24}" \
    --kv-cache-gib $(($3 * ${SAMPLES:-24} / 32768 + 2)) --gpu-memory-utilization 0.1 --output "$file.json" "${@:4}" \
    >"$file.log" 2>&1 && touch "$file.done" || echo "$file failed: $(tail -n 1 "$file.log")"
}
export -f job
export model data out

read -ra lengths <<<"$(printf '%s\n' "$@" | sort -n | xargs)"
few="${NEEDLES:-needle needle_4keys needle_code} repetition"
{
  for ((i = ${#lengths[@]} - 1; i >= 0; i--)); do # the longest take longest
    echo "auto ${lengths[i]} --tasks $needles $tails --methods ${METHODS:-sparq:top_k=0.125 sparq:top_p=0.9 sparq:rank=12} --budgets 0.0625"
  done
  for length in "${lengths[@]}"; do
    echo "k8v4 $length --tasks $needles $tails --methods sparq:top_k=0.125 sparq:rank=18:top_k=0.05 --kv-format k8v4"
    echo "int8 $length --tasks $needles $tails --methods sparq:top_k=0.125 --kv-format int8"
  done
  for length in "${lengths[@]}"; do
    for method in quest window; do
      echo "$method $length --tasks $few --methods $method --budgets 0.0625 0.18 --samples ${FEW:-8}"
    done
  done
} | grep -E "^(${only// /|}) " | awk -v "gpus=${gpus[*]}" -v "out=$out" '{ n = split(gpus, g, " "); gpu = g[(NR - 1) % n + 1]; print gpu, $0 > (out "/jobs_" gpu ".txt") }'
for gpu in "${gpus[@]}"; do
  # shellcheck disable=SC2016
  [ -f "$out/jobs_$gpu.txt" ] && xargs -a "$out/jobs_$gpu.txt" -P "${JOBS:-4}" -I{} bash -c 'job {}' &
done
wait
ls "$out"
for log in "$out"/*.log; do [ -f "${log%.log}.done" ] || failed=1; done
rm -f "$out"/jobs_*.txt
exit "${failed:-0}"
