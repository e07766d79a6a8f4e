#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Serve a model with Ray Serve, a vLLM engine in every replica.

    python examples/ray_serve.py --model MODEL --replicas 2 \\
        --additional-config '{"sparse": {"top_k": 0.125}}'
    curl localhost:8000/v1/completions -H 'Content-Type: application/json' \\
        -d '{"prompt": "Hello", "max_tokens": 16}'

Requests and answers are the part of OpenAI's completions that ``Completion`` names; for
all of it put a load balancer before several ``vllm serve``. Requests that arrive
together are decoded together. Needs Ray: ``pip install vllm_sparse[ray]``.
"""

import argparse
import json
import uuid

import ray
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray_engines import engine_settings, positive, share

app = FastAPI()


class Completion(BaseModel):
    """A request; other fields are refused."""

    model_config = ConfigDict(extra="forbid")

    prompt: str
    model: str | None = None
    max_tokens: int = Field(16, ge=1)
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = None


@serve.deployment
@serve.ingress(app)
class Engine:
    """A replica: one engine, decoding all of its requests together."""

    def __init__(self, settings: dict) -> None:
        """Start the engine; arguments of ``vllm.AsyncEngineArgs``."""
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.metrics.ray_wrappers import RayPrometheusStatLogger

        # Ray collects the metrics of all replicas, vLLM's and vllm_sparse's.
        self.engine = AsyncLLM.from_engine_args(
            AsyncEngineArgs(**settings), stat_loggers=[RayPrometheusStatLogger]
        )
        self.model = settings["model"]

    async def check_health(self) -> None:
        """Ray Serve replaces the replica when this raises."""
        await self.engine.check_health()

    @app.post("/v1/completions")
    async def complete(self, request: Completion) -> dict:
        """Answer one request; 400 where vLLM refuses it (a prompt too long, say)."""
        from vllm import SamplingParams
        from vllm.exceptions import VLLMClientError

        name = f"cmpl-{uuid.uuid4().hex}"
        try:
            params = SamplingParams(**request.model_dump(exclude={"prompt", "model"}))
            async for output in self.engine.generate(request.prompt, params, name):
                last = output
        except VLLMClientError as error:
            raise HTTPException(400, str(error)) from error
        (answer,) = last.outputs
        return {
            "id": name,
            "object": "text_completion",
            "model": self.model,
            "choices": [
                {"index": 0, "text": answer.text, "finish_reason": answer.finish_reason}
            ],
            "usage": {
                "prompt_tokens": len(last.prompt_token_ids),
                "completion_tokens": len(answer.token_ids),
            },
        }


def deployment(args: argparse.Namespace) -> serve.Application:
    """The application, with Ray's resources divided among the replicas."""
    return Engine.options(
        num_replicas=args.replicas,
        max_ongoing_requests=args.max_ongoing_requests,
        ray_actor_options=share(
            args, args.replicas, args.cpus_per_replica or 0, "replica"
        ),
    ).bind(engine_settings(args))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True)
    add("--replicas", type=positive, default=1)
    add("--attention-backend", default="sparq")
    add("--additional-config", type=json.loads, default={}, metavar="JSON")
    add(
        "--engine-args",
        type=json.loads,
        default={},
        metavar="JSON",
        help="of vllm.AsyncEngineArgs",
    )
    add("--tensor-parallel-size", type=positive, default=1, help="GPUs of a replica")
    add("--cpus-per-replica", type=positive, help="default: as many as fit")
    add("--max-ongoing-requests", type=positive, default=256, help="of a replica")
    add("--name", default="vllm-sparse", help="of the application in Ray Serve")
    add("--route-prefix", default="/", help="of the application's URLs")
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=8000)
    add("--metrics-port", type=int, help="for Prometheus, of a local Ray")
    add(
        "--address", help="of a running Ray cluster; default: a local one, for this run"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.address:
        ray.init(address=args.address)
    else:
        # Prompts and answers are small: vLLM needs the memory more than Ray's store.
        ray.init(
            address="local",
            include_dashboard=False,
            object_store_memory=2**27,
            _metrics_export_port=args.metrics_port,
        )
    application = deployment(args)
    serve.start(http_options={"host": args.host, "port": args.port})
    if args.name in serve.status().applications:
        raise SystemExit(f"{args.name} runs already in this cluster: choose a --name")
    try:
        serve.run(
            application,
            name=args.name,
            route_prefix=args.route_prefix,
            blocking=True,
        )
    except KeyboardInterrupt:
        pass
    finally:
        # In a cluster it would live on, and keep its GPUs.
        if args.address:
            serve.delete(args.name)


if __name__ == "__main__":
    main()
