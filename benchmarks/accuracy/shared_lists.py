# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""What positions that are verified together would read if they shared one list.

    python -m benchmarks.accuracy.shared_lists --output NAME.json

Decodes, and takes consecutive positions for the drafts of one step: the tokens that
their lists name together, beside the lists by themselves (docs/speculation.md).
"""

import argparse
import os
from pathlib import Path
from random import Random

import torch
from tqdm import tqdm

from benchmarks.accuracy.text import TextSources
from benchmarks.environment import save
from scripts.get_model import get_model
from vllm_sparse.methods.sparq import Sparq


def record(steps: list[list[torch.Tensor]]) -> None:
    """Let every decode row leave its lists: [num_kv_heads, length] bool by layer."""
    attend = Sparq.attend

    def recording(self, query, kv_cache, rows, out, layer_name):
        attend(self, query, kv_cache, rows, out, layer_name)
        length = int(rows.seq_lens[0])
        kept = torch.zeros(rows.counts.shape[1], length, dtype=torch.bool)
        for head, count in enumerate(rows.counts[0].tolist()):
            kept[head, rows.indices[0, head, :count].long()] = True
        if not steps or len(steps[-1]) == self.num_layers:
            steps.append([])
        steps[-1].append(kept)

    Sparq.attend = recording


def union(window: list[list[torch.Tensor]]) -> tuple[int, int]:
    """Tokens of the lists together, and one by one, over layers and KV heads."""
    together = alone = 0
    for lists in zip(*window):
        whole = torch.zeros_like(lists[-1])
        for kept in lists:
            whole[:, : kept.shape[1]] |= kept
            alone += int(kept.sum())
        together += int(whole.sum())
    return together, alone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--top-k", type=float, default=0.125)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    model = str(get_model())
    llm = LLM(
        model,
        attention_backend="sparq",
        additional_config={"sparse": {"top_k": args.top_k}},
        enforce_eager=True,
        max_model_len=args.context + 128,
        kv_cache_memory_bytes=2**30,
    )
    Sparq.num_layers = llm.llm_engine.model_config.hf_config.num_hidden_layers
    steps: list[list[torch.Tensor]] = []
    record(steps)
    (stream,) = TextSources(llm.get_tokenizer()).prose
    greedy = SamplingParams(temperature=0, max_tokens=args.tokens, ignore_eos=True)
    sums = {k: [0, 0] for k in (1, 2, 4, 7)}
    for index in tqdm(range(args.prompts)):
        first = Random(index).randrange(len(stream) - args.context)
        prompt = {"prompt_token_ids": stream[first : first + args.context]}
        steps.clear()
        llm.generate(prompt, greedy, use_tqdm=False)
        for k, total in sums.items():
            for i in range(len(steps) - k):
                for place, count in enumerate(union(steps[i : i + k + 1])):
                    total[place] += count
    results = []
    for k, (together, alone) in sums.items():
        lists = alone / (k + 1)
        results.append({"drafts": k, "union_in_lists": together / lists})
        print(f"{k} drafts: together {together / lists:.2f} lists for {k + 1}")
    save(args, results)


if __name__ == "__main__":
    main()
