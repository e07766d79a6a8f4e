#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
set -euo pipefail

usage() {
  cat <<'TXT'
Usage: bash scripts/quickstart.sh [option...]
           Ask questions about a long document, dense, sparse and lossless, and compare.
           Options are those of scripts/quickstart.py (see --help there).
       bash scripts/quickstart.sh serve [option of vllm serve...]
           Serve a small model with --attention-backend sparq and print a curl line.

The first run sets up .venv and fetches a model of 135M parameters; no GPU is needed.
Environment: TORCH_INDEX_URL and PYTHON (scripts/setup_env.sh), VLLM_SPARSE_CACHE (where
the model is kept), PORT (serve, default 8000), VLLM_LOGGING_LEVEL (default ERROR).
TXT
}

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
case "${1:-}" in -h | --help) usage; exit ;; esac

# shellcheck source=scripts/setup_env.sh
. "$here/setup_env.sh" cpu bench
export VLLM_LOGGING_LEVEL="${VLLM_LOGGING_LEVEL:-ERROR}" VLLM_NO_USAGE_STATS=1
# Warnings of libraries that a reader of the table can do nothing about.
export PYTHONWARNINGS="${PYTHONWARNINGS:-ignore}" TORCH_CPP_LOG_LEVEL=ERROR
# GiB of KV cache; vLLM would take most of the machine's memory.
export VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-2}"

serve() {
  local port="${PORT:-8000}"
  # Eager: compiling takes minutes on CPU and pays only for a server that stays up.
  python -m vllm_sparse serve "$model" \
    --served-model-name smollm2 --attention-backend sparq --dtype bfloat16 \
    --max-model-len 8192 --enforce-eager --distributed-executor-backend uni \
    --port "$port" "$@" &
  server=$!
  # Again and again: a server that is still starting may overlook a signal.
  trap 'while kill "$server" 2>/dev/null; do sleep 1; done' EXIT
  echo "starting the server (about a minute)" >&2
  until python "$here/quickstart.py" --probe "$port"; do
    kill -0 "$server" 2>/dev/null || { echo "the server did not start" >&2; exit 1; }
    sleep 1
  done
  cat <<TXT

Serving on port $port; Ctrl-C ends it. Try, in another terminal:

curl http://localhost:$port/v1/completions -H 'Content-Type: application/json' \\
  -d '{"model": "smollm2", "prompt": "The capital of France is", "max_tokens": 16, "temperature": 0}'

TXT
  wait "$server"
}

model="$(python "$here/get_model.py" | tail -n 1)"
if [ "${1:-}" = serve ]; then
  shift
  serve "$@"
else
  python "$here/quickstart.py" --model "$model" "$@"
fi
