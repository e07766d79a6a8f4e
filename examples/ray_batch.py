#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Answer a file of prompts with several vLLM engines, each of them a Ray actor.

    python examples/ray_batch.py prompts.jsonl answers.jsonl --model MODEL \\
        --engines 2 --additional-config '{"sparse": {"top_k": 0.125}}'

A line of the input is ``{"prompt": "..."}`` with any further fields. The output has the
same lines in the same order, with ``text``, ``finish_reason`` and ``tokens`` (how many
were generated), or with ``error`` where vLLM refuses the prompt (too long, say); the
exit status is then 1. Needs Ray: ``pip install vllm_sparse[ray]``.
"""

import argparse
import json
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import ray
from ray_engines import engine_settings, positive, share
from tqdm import tqdm

ANSWER = ("text", "finish_reason", "tokens", "error")  # fields of ours


class Engine:
    """One vLLM engine in the actor's own process."""

    def __init__(self, settings: dict, sampling: dict) -> None:
        """Start it; arguments of ``vllm.LLM`` and of ``vllm.SamplingParams``."""
        from vllm import LLM, SamplingParams

        self.llm = LLM(**settings)
        self.params = SamplingParams(**sampling)

    def ready(self) -> None:
        """Return once the engine is there."""

    def answer(self, rows: list[dict]) -> list[dict]:
        """The rows with what the engine generated for their prompts."""
        from vllm.exceptions import VLLMClientError

        answers = []
        for row in rows:
            # Not what an earlier run said.
            answers.append({k: v for k, v in row.items() if k not in ANSWER})
            try:
                self.llm.enqueue([row["prompt"]], self.params, use_tqdm=False)
            except VLLMClientError as error:
                answers[-1]["error"] = str(error)
        outputs = iter(self.llm.wait_for_completion(use_tqdm=False))
        for answer in answers:
            if "error" not in answer:
                output = next(outputs).outputs[0]
                answer["text"] = output.text
                answer["finish_reason"] = output.finish_reason
                answer["tokens"] = len(output.token_ids)
        return answers


def read_rows(path: Path) -> list[dict]:
    """The input's lines; empty ones are skipped.

    Raises:
        SystemExit: a line is not a JSON object with a string "prompt"; names the line.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row["prompt"], str):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            raise SystemExit(
                f"{path}, line {number}: expected a JSON object with a string "
                f'"prompt", got {line[:80]!r}'
            ) from None
        rows.append(row)
    return rows


def start_engines(args: argparse.Namespace) -> list:
    """The actors, all of them ready."""
    if args.address:
        ray.init(address=args.address)
    else:
        # Prompts and answers are small: vLLM needs the memory more than Ray's store.
        ray.init(address="local", include_dashboard=False, object_store_memory=2**27)
    options = share(args, args.engines, args.cpus_per_engine or 0, "engine")
    actor = ray.remote(Engine).options(**options)
    settings = {"disable_log_stats": True} | engine_settings(args)
    sampling = {"temperature": args.temperature, "max_tokens": args.max_tokens}
    engines = [actor.remote(settings, sampling) for _ in range(args.engines)]
    ray.get([engine.ready.remote() for engine in engines])
    return engines


def answers(engines: list, batches: list[list[dict]]) -> Iterator[tuple[int, list]]:
    """(number of the batch, its answers), as they become ready."""
    waiting = deque(enumerate(batches))
    running = {}

    def give(engine) -> None:
        if waiting:
            number, batch = waiting.popleft()
            running[engine.answer.remote(batch)] = number, engine

    for engine in engines:
        give(engine)
    while running:
        (done,), _ = ray.wait(list(running))
        number, engine = running.pop(done)
        give(engine)
        yield number, ray.get(done)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("input", type=Path, help="JSON lines with a prompt each")
    add("output", type=Path)
    add("--model", required=True)
    add("--engines", type=positive, default=1)
    add("--attention-backend", default="sparq")
    add("--additional-config", type=json.loads, default={}, metavar="JSON")
    add(
        "--engine-args", type=json.loads, default={}, metavar="JSON", help="of vllm.LLM"
    )
    add("--tensor-parallel-size", type=positive, default=1, help="GPUs of an engine")
    add("--cpus-per-engine", type=positive, help="default: as many as fit")
    add(
        "--batch-size",
        type=positive,
        default=64,
        help="prompts that an engine gets at once",
    )
    add("--max-tokens", type=positive, default=128)
    add("--temperature", type=float, default=0.0)
    add(
        "--address", help="of a running Ray cluster; default: a local one, for this run"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    rows = read_rows(args.input)
    size = args.batch_size
    batches = [rows[i : i + size] for i in range(0, len(rows), size)]
    ready: dict[int, list[dict]] = {}
    written = refused = 0
    try:
        engines = start_engines(args)
        with (
            args.output.open("w", encoding="utf-8") as file,
            tqdm(total=len(rows), unit="prompt") as bar,
        ):
            for number, answered in answers(engines, batches):
                ready[number] = answered
                bar.update(len(answered))
                while written in ready:
                    for row in ready.pop(written):
                        refused += "error" in row
                        file.write(json.dumps(row, ensure_ascii=False) + "\n")
                    file.flush()
                    written += 1
    except ray.exceptions.RayError as error:
        done = min(written * size, len(rows))
        sys.exit(f"{error}\nAn engine failed; {done} of {len(rows)} prompts answered.")
    if refused:
        sys.exit(f'{refused} of {len(rows)} prompts were refused; see their "error"')


if __name__ == "__main__":
    main()
