#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
#
# The shipped 32K model's training from its base, in three parts that each go on from the one before
# (docs/training.md): 810 steps, most of them short, then 400 with three in five and 400 with four in five at full
# length. Give the same command again to go on after an interruption. OPTIONS (default "--cudnn") go to all parts.
# What was shipped differs in its first part: other packed text, and one wording of facts a window.
#   scripts/train_32k.sh BASE DATA OUT
set -euo pipefail
[ $# = 3 ] || { echo "usage: $0 BASE DATA OUT" >&2; exit 2; }
base=$1 data=$2 out=$3
read -ra options <<<"${OPTIONS---cudnn}"

part() { # name, options
  python -m vllm_sparse.train longcontext "$base" --data "$data" --out "$out/$1" --evaluate-every 0 \
    --evaluate-samples 16 "${@:2}" "${options[@]}"
  # The next part begins with this one's weights, and knows their hash.
  grep -q '"finished": true' "$out/$1/run.json" || { echo "$1 is not finished: give the command again" >&2; exit 1; }
}
more=(--steps 400 --synthetic 0.4 --learning-rate 3e-4 --warmup 20)
part short --steps 810 --full-share 0.15 --synthetic 0.15
part long "${more[@]}" --full-share 0.6 --start "$out/short/checkpoint"
part full "${more[@]}" --full-share 0.8 --start "$out/long/checkpoint" --seed 1
