#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
#
# Everything that needs a GPU: op, layer and engine tests, then the memory and race checkers.
# Wants vLLM for CUDA, pytest and this project (with its CUDA ops) in the environment.
#   scripts/test_gpu.sh            all of it
#   scripts/test_gpu.sh ops|backend|engine|train|sanitize ...
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ $# -eq 0 ]; then set -- ops backend engine train sanitize; fi
run() { python3 -m pytest -m gpu -q -p no:cacheprovider --tb=short "$@"; }

for part in "$@"; do
  echo "== $part"
  case "$part" in
    ops) run tests/ops ;;
    backend) run tests/backend ;;
    engine) run tests/e2e/test_gpu_engine.py tests/e2e/test_gpu_quantised.py tests/e2e/test_gpu_families.py \
      tests/e2e/test_gpu_offloading.py tests/e2e/test_gpu_lossless.py tests/e2e/test_gpu_drafters.py \
      tests/e2e/test_gpu_parallel.py tests/e2e/test_gpu_streaming.py tests/e2e/test_gpu_anchor.py \
      tests/e2e/test_quantised_weights.py ;;
    train) run tests/train ;;
    sanitize)
      # Small inputs: the tools slow a kernel down by up to a hundred times.
      # PyTorch's cached blocks would hide accesses to freed or neighbouring memory.
      for tool in memcheck racecheck; do
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 \
          python3 -m pytest -m gpu -q -p no:cacheprovider --tb=line \
          tests/ops -k "every_rank or every_group or \
            test_triton_ops and cuda and (rows or order or strided or select or attend or ties or range)"
      done ;;
    *) echo "unknown part: $part" >&2; exit 2 ;;
  esac
done
