# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""What both examples for Ray do: divide its resources among engines, set these up."""

import argparse
import os
import sys
from typing import Any

import ray

ENVIRONMENT = {
    # An ``LLM`` runs in the actor; a process more would only start more slowly.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # By itself vLLM binds each engine of a machine to the same cores. Ray lets it
    # have as many threads as it has CPUs.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
}


def positive(text: str) -> int:
    """A count on the command line."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return int(text)


def share(args: argparse.Namespace, count: int, cpus: int, what: str) -> dict[str, Any]:
    """Ray's options for the actor of one of ``count`` engines.

    Args:
        cpus: of one engine; 0: as many as fit.
        what: "engine" or "replica", as the command's options call them.

    Raises:
        SystemExit: they do not fit on Ray's nodes.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = args.tensor_parallel_size if any(n.get("GPU") for n in nodes) else 0

    def places(cpus: int) -> int:
        """Engines that fit, each of them on one node."""
        fit = ((n.get("CPU", 0) // cpus, n.get("GPU", 0) // (gpus or 1)) for n in nodes)
        return int(sum(min(c, g) if gpus else c for c, g in fit))

    largest = int(max(node.get("CPU", 0) for node in nodes))
    # The most that each can have; too much if even one is.
    cpus = cpus or next((c for c in range(largest, 1, -1) if places(c) >= count), 1)
    if places(cpus) < count:
        of_nodes = "; ".join(
            f"{n.get('CPU', 0):g} CPUs, {n.get('GPU', 0):g} GPUs" for n in nodes
        )
        raise SystemExit(
            f"{count} {what}s of {cpus} CPUs and {gpus} GPUs do not fit on Ray's nodes "
            f"({of_nodes}): lower --{what}s, --tensor-parallel-size or "
            f"--cpus-per-{what}"
        )
    free = ray.available_resources()
    if free.get("CPU", 0) < cpus * count or free.get("GPU", 0) < gpus * count:
        print(
            f"waiting until others leave {cpus * count} CPUs and {gpus * count} GPUs "
            f"of Ray's free (now {free.get('CPU', 0):g} and {free.get('GPU', 0):g})",
            file=sys.stderr,
        )
    environment = {"env_vars": ENVIRONMENT}
    return {"num_cpus": cpus, "num_gpus": gpus, "runtime_env": environment}


def engine_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of vLLM's engine."""
    size = args.tensor_parallel_size
    return {
        "model": args.model,
        "attention_backend": args.attention_backend,
        "additional_config": args.additional_config,
        "tensor_parallel_size": size,
        # Ray has chosen this actor's GPUs; vLLM must not ask it for others.
        "distributed_executor_backend": "mp" if size > 1 else None,
    } | args.engine_args
