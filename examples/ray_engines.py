# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""What both examples for Ray do: divide its resources among engines, set these up."""

import argparse
import os
from typing import Any

import ray

ENVIRONMENT = {
    # The actor is the engine's process; one more would only start more slowly.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # By itself vLLM binds each engine of a machine to the same cores. Ray lets it
    # have as many threads as it has CPUs.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
}


def share(args: argparse.Namespace, count: int, cpus: int, what: str) -> dict[str, Any]:
    """Ray's options for the actor of one of ``count`` engines.

    Args:
        cpus: of one engine; 0: an equal share.
        what: "engine" or "replica", as the command's options call them.
    """
    resources = ray.cluster_resources()
    gpus = args.tensor_parallel_size if resources.get("GPU") else 0
    cpus = cpus or max(1, int(resources["CPU"]) // count)
    for kind, needed in {"CPU": cpus * count, "GPU": gpus * count}.items():
        if needed > resources.get(kind, 0):
            raise SystemExit(
                f"{count} {what}s need {needed} {kind}s, but Ray has "
                f"{resources.get(kind, 0):g}: lower --{what}s, "
                f"--tensor-parallel-size or --cpus-per-{what}"
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
