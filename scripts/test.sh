#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
#
# Run the tests that need no GPU and, where there is nvcc, compile the CUDA kernels for
# Hopper (scripts/compile_gate.py alone: for all architectures). Arguments go to pytest, and then the kernels are left out:
#   scripts/test.sh -m slow      scripts/test.sh tests/unit -k config
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=scripts/setup_env.sh
. "$here/setup_env.sh" cpu bench dev ray

# Tests with a real model find it in the cache.
python "$here/get_model.py" >/dev/null
export VLLM_LOGGING_LEVEL="${VLLM_LOGGING_LEVEL:-WARNING}" VLLM_NO_USAGE_STATS=1
export VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-2}"
cd "$here/.."
if [ $# -gt 0 ]; then exec python -m pytest --durations=5 "$@"; fi
python scripts/compile_gate.py --archs 90a
# Two files of tests at a time, whose idle threads must not spin.
export KMP_BLOCKTIME=0
exec python -m pytest -q -n 2 --dist loadfile --durations=10
