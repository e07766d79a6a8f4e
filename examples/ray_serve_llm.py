#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Serve a model with ray.serve.llm, Ray's own OpenAI-compatible server.

    python examples/ray_serve_llm.py --model MODEL \\
        --engine-kwargs '{"additional_config": {"sparse": {"kv_format": "k8v4"}}}'
    curl localhost:8000/v1/completions -H 'Content-Type: application/json' \\
        -d '{"model": "MODEL", "prompt": "Hello", "max_tokens": 16}'

Needs ``pip install 'vllm_sparse[ray]'``.
"""

import argparse
import json
from contextlib import suppress

import ray
from ray import serve
from ray.serve.llm import LLMConfig, build_openai_app


def llm_config(args: argparse.Namespace) -> LLMConfig:
    """Replicas of ``tensor_parallel_size`` GPUs each."""
    deployment, on_cpus = {"num_replicas": args.replicas}, {}
    if args.cpus:
        # The engine runs in processes of its own, and the replica waits for it.
        deployment["ray_actor_options"] = {"num_cpus": 0}
        on_cpus = {
            "accelerator_config": {"kind": "cpu"},
            "placement_group_config": {"bundles": [{"CPU": args.cpus}]},
            # By itself vLLM binds each engine of a machine to the same cores.
            "runtime_env": {"env_vars": {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}},
        }
    return LLMConfig(
        model_loading_config={
            "model_id": args.served_model_name or args.model,
            "model_source": args.model,
        },
        engine_kwargs={"attention_backend": "sparq"} | args.engine_kwargs,
        deployment_config=deployment,
        **on_cpus,
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True)
    add("--served-model-name")
    add(
        "--engine-kwargs",
        type=json.loads,
        default={},
        metavar="JSON",
        help="of vllm.AsyncEngineArgs",
    )
    add("--replicas", type=int, default=1)
    add("--cpus", type=float, help="of a replica's engine, on machines without GPUs")
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=8000)
    add("--metrics-port", type=int, help="for Prometheus; default: Ray chooses")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    # Of a Ray that this starts; in a running one (RAY_ADDRESS) they have no effect.
    ray.init(include_dashboard=False, _metrics_export_port=args.metrics_port)
    serve.start(http_options={"host": args.host, "port": args.port})
    app = build_openai_app({"llm_configs": [llm_config(args)]})
    with suppress(KeyboardInterrupt):
        serve.run(app, blocking=True)


if __name__ == "__main__":
    main()
