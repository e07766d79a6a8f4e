# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Record how many tokens a real model keeps with adaptive budgets.

    python -m benchmarks.kernels.record_kept --sparse JSON --output NAME.json

Two windows of prose and two of code are continued for some tokens; lengths of all lists
of all layers and KV heads become 400 quantiles.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from random import Random

import torch

from benchmarks.accuracy.engine import Engine, EngineOptions
from benchmarks.accuracy.text import TextSources
from benchmarks.serving.engine import greedy
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
    engine = Engine(EngineOptions(str(get_model()), max_num_seqs=4, kv_cache_gib=2.0))
    engine.configure(args.sparse)
    llm, sources, rng = engine.llm, TextSources(engine.tokenizer), Random(0)
    texts = 2 * (sources.prose, sources.code)
    prompts = [
        {"prompt_token_ids": sources.window(text, args.context, rng)} for text in texts
    ]
    llm.generate(prompts, greedy(args.tokens))
    histograms = llm.collective_rpc("sparse_kept_histograms")[0]
    total = torch.tensor(list(histograms.values())).sum((0, 1))
    stats = llm.collective_rpc("sparse_stats")[0]
    places = [(i + 0.5) / QUANTILES for i in range(QUANTILES)]
    result = {
        "model": "SmolLM2-135M-Instruct",
        "context": args.context,
        "options": args.sparse,
        **asdict(summary(total)),
        "kv_share": stats["kv_bytes_read"] / stats["kv_bytes_dense"],
        "quantiles": [quantile(total.tolist(), q) for q in places],
    }
    args.output.write_text(json.dumps(result) + "\n")
    print({key: value for key, value in result.items() if key != "quantiles"})


if __name__ == "__main__":
    main()
