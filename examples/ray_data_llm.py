#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Answer a file of prompts with ray.data.llm, Ray's own library for batches.

    python examples/ray_data_llm.py prompts.jsonl answers/ --model MODEL \\
        --engine-kwargs '{"additional_config": {"sparse": {"top_k": 0.125}}}'

A line of the input is ``{"prompt": "..."}`` with any further fields; JSON files in the
output folder have the same rows with ``generated_text``. Needs
``pip install 'vllm_sparse[ray]'``.
"""

import argparse
import json

import ray
from ray.data.llm import build_processor, vLLMEngineProcessorConfig


def processor_config(args: argparse.Namespace) -> vLLMEngineProcessorConfig:
    """An engine on each of ``--concurrency`` times ``tensor_parallel_size`` GPUs."""
    on_cpus = {}
    if args.cpus:
        on_cpus = {
            "placement_group_config": {"bundles": [{"CPU": args.cpus}]},
            # By itself vLLM binds each engine of a machine to the same cores.
            "runtime_env": {"env_vars": {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}},
        }
    return vLLMEngineProcessorConfig(
        model_source=args.model,
        engine_kwargs={"attention_backend": "sparq"} | args.engine_kwargs,
        concurrency=args.concurrency,
        chat_template_stage=args.chat,
        tokenize_stage=False,  # vLLM does both itself
        detokenize_stage=False,
        **on_cpus,
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("input", help="JSON lines with a prompt each")
    add("output", help="a folder")
    add("--model", required=True)
    add(
        "--engine-kwargs",
        type=json.loads,
        default={},
        metavar="JSON",
        help="of vllm.AsyncEngineArgs",
    )
    add("--concurrency", type=int, default=1, help="engines")
    add("--max-tokens", type=int, default=128)
    add("--chat", action="store_true", help="prompts are what a user says")
    add("--cpus", type=float, help="of an engine, on machines without GPUs")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    sampling = {"temperature": 0, "max_tokens": args.max_tokens}

    def prepare(row: dict) -> dict:
        said = row["prompt"]
        if args.chat:
            said = {"messages": [{"role": "user", "content": said}]}
        else:
            said = {"prompt": said}
        # A copy: Ray puts what is returned here into the row itself.
        return said | {"row": dict(row), "sampling_params": sampling}

    def answer(row: dict) -> dict:
        return row["row"] | {"generated_text": row["generated_text"]}

    process = build_processor(processor_config(args), prepare, answer)
    process(ray.data.read_json(args.input, lines=True)).write_json(args.output)


if __name__ == "__main__":
    main()
