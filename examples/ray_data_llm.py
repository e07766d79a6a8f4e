#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Answer a file of prompts with ray.data.llm, Ray's own library for batches.

    python examples/ray_data_llm.py prompts.jsonl answers.jsonl --model MODEL \\
        --engine-kwargs '{"additional_config": {"sparse": {"kv_format": "k8v4"}}}'

A line of the input is ``{"prompt": "..."}`` with any further fields. The output has the
same lines in the same order, with ``generated_text`` and ``num_generated_tokens``, or
with ``error`` where vLLM refuses the prompt (too long, say); the exit status is then 1.
Needs ``pip install 'vllm_sparse[ray]'``.
"""

import argparse
import json
import sys

import ray
from ray.data.llm import build_processor, vLLMEngineProcessorConfig

ANSWER = ("generated_text", "num_generated_tokens")
ERROR = "__inference_error__"  # Ray's column; empty where all went well


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
        # All at once: of a plain number Ray starts one, and more when that is busy.
        concurrency=(args.concurrency, args.concurrency),
        batch_size=args.batch_size,
        should_continue_on_error=True,
        chat_template_stage=args.chat,
        tokenize_stage=False,  # vLLM does both itself
        detokenize_stage=False,
        **on_cpus,
    )


def prepare(line: str, chat: bool, max_tokens: int) -> dict:
    """What Ray's stages read, and the line, which they hand on.

    Raises:
        ValueError: it is not a JSON object with a string "prompt".
    """
    try:
        prompt = json.loads(line)["prompt"]
        if not isinstance(prompt, str):
            raise TypeError
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f'expected a JSON object with a string "prompt", got {line[:80]!r}'
        ) from None
    said = {"messages": [{"role": "user", "content": prompt}]}
    sampling = {"temperature": 0, "max_tokens": max_tokens}
    return {"line": line, "sampling_params": sampling} | (
        said if chat else {"prompt": prompt}
    )


def answer(row: dict) -> dict:
    """The line's fields with what was generated, or with the error."""
    given = json.loads(row["line"])
    for name in (*ANSWER, "error"):
        given.pop(name, None)  # of an earlier run
    if row[ERROR]:
        return given | {"error": row[ERROR]}
    return given | {name: row[name] for name in ANSWER}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("input", help="JSON lines with a prompt each")
    add("output")
    add("--model", required=True)
    add(
        "--engine-kwargs",
        type=json.loads,
        default={},
        metavar="JSON",
        help="of vllm.AsyncEngineArgs",
    )
    add("--concurrency", type=int, default=1, help="engines")
    add("--batch-size", type=int, default=32, help="prompts an engine gets at once")
    add("--max-tokens", type=int, default=128)
    add("--chat", action="store_true", help="prompts are what a user says")
    add("--cpus", type=float, help="of an engine, on machines without GPUs")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    ray.init(include_dashboard=False)  # where this starts Ray
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    prompts = ray.data.read_text(args.input).map(
        lambda row: prepare(row["text"], args.chat, args.max_tokens)
    )
    process = build_processor(processor_config(args))
    written = refused = 0
    with open(args.output, "w", encoding="utf-8") as file:
        for row in process(prompts).iter_rows():
            file.write(json.dumps(answer(row), ensure_ascii=False) + "\n")
            written += 1
            refused += bool(row[ERROR])
    if refused:
        sys.exit(f'{refused} of {written} prompts were refused; see their "error"')


if __name__ == "__main__":
    main()
