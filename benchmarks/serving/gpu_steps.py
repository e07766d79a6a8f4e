# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Length of decode steps on the GPU's own time line, one engine a call.

    python -m benchmarks.serving.gpu_steps --backend sparq --model FOLDER \\
        --cases 1x6500 16x1000

Free of what the host does between steps, so steadier than ``decode_gpu``. Weights are
dummies, decode steps are FULL CUDA graphs. Kernels that start before the one ahead of
them is through (programmatic dependent launch) count their waiting, so only the whole
step compares.
"""

import argparse
import json
import os
from pathlib import Path

import torch

from benchmarks.serving.decode import make_prompts

LAST_US = 60_000  # of the time line, some eight steps
ATTENTION = ("FlashAttnFwdSm90", "decode_kernel")  # once a layer


def measure(llm, batch: int, length: int, num_layers: int) -> dict:
    from vllm import SamplingParams

    def generate(tokens: int) -> None:
        params = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        prompts = make_prompts(batch, length, seed=length + batch)
        llm.generate(prompts, params, use_tqdm=False)

    generate(4)  # prompts are cached from here on
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CUDA]
    ) as profile:
        generate(24)
        torch.cuda.synchronize()
    spans = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    spans = [span for span in spans if span[0] > spans[-1][1] - LAST_US]
    calls = sum(any(name in span[2] for name in ATTENTION) for span in spans)
    steps = calls / num_layers
    total = max(end for _, end, _ in spans) - spans[0][0]
    return {"batch": batch, "context": length, "us_per_step": total / steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backend", default="sparq")
    parser.add_argument("--sparse", type=json.loads, default={})
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--cases", nargs="+", default=["1x6500", "16x1000"])
    parser.add_argument("--max-model-len", type=int, default=65536)
    args = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    cases = [tuple(map(int, case.split("x"))) for case in args.cases]
    llm = LLM(
        model=str(args.model),
        load_format="dummy",
        skip_tokenizer_init=True,
        attention_backend=args.backend,
        max_model_len=args.max_model_len,
        max_num_seqs=max(batch for batch, _ in cases),
        compilation_config={"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
        additional_config={"sparse": args.sparse},
    )
    layers = llm.llm_engine.model_config.hf_text_config.num_hidden_layers
    for batch, length in cases:
        print(json.dumps(measure(llm, batch, length, layers)), flush=True)


if __name__ == "__main__":
    main()
