# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Record how many tokens a real model keeps with adaptive budgets.

    python -m benchmarks.kernels.record_kept --sparse JSON --output NAME.json

Two windows of prose and two of code are continued for some tokens; lengths of all lists
of all layers and KV heads become 400 quantiles.
"""

import argparse
import json
import os
from pathlib import Path
from random import Random

import torch

from benchmarks.accuracy.engine import WORKER_EXTENSION
from benchmarks.accuracy.text import TextSources
from scripts.get_model import get_model
from vllm_sparse.ops.kept import quantile, summary

QUANTILES = 400


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--context", type=int, default=7500)
    parser.add_argument("--sparse", type=json.loads, default={"top_p": 0.95})
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(get_model()),
        attention_backend="sparq",
        max_model_len=8192,
        max_num_seqs=4,
        kv_cache_memory_bytes=2**31,
        enforce_eager=True,
        disable_log_stats=True,
        worker_extension_cls=WORKER_EXTENSION,
        additional_config={"sparse": args.sparse},
    )
    sources, rng = TextSources(llm.get_tokenizer()), Random(0)
    texts = 2 * (sources.prose, sources.code)
    prompts = [
        {"prompt_token_ids": sources.window(text, args.context, rng)} for text in texts
    ]
    params = SamplingParams(temperature=0, max_tokens=args.tokens, ignore_eos=True)
    llm.generate(prompts, params)
    histograms = llm.collective_rpc("sparse_kept_histograms")[0]
    total = torch.tensor(list(histograms.values())).sum((0, 1))
    found = summary(total)
    stats = llm.collective_rpc("sparse_stats")[0]
    places = [(i + 0.5) / QUANTILES for i in range(QUANTILES)]
    result = {
        "model": "SmolLM2-135M-Instruct",
        "context": args.context,
        "options": args.sparse,
        "rows": found.rows,
        "mean": found.mean,
        "p50": found.p50,
        "p99": found.p99,
        "kv_share": stats["kv_bytes_read"] / stats["kv_bytes_dense"],
        "quantiles": [quantile(total.tolist(), q) for q in places],
    }
    args.output.write_text(json.dumps(result) + "\n")
    print({key: value for key, value in result.items() if key != "quantiles"})


if __name__ == "__main__":
    main()
