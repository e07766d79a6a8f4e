# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Whether several ranks say what one says."""

import argparse

from benchmarks.serving.engine import Timed, greedy

LENGTHS = (5, 129, 300, 700, 1500)  # of the prompts whose tokens are compared
COMPARED = 32  # tokens


def save_model(args: argparse.Namespace) -> None:
    """Random weights in the shape of ``--model``, into ``--checkpoint``: vLLM's dummy
    weights would differ from rank to rank."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(args.model)
    config.num_hidden_layers = args.layers
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(args.checkpoint)


def greedy_texts(engine: Timed) -> list[list[dict]]:
    """By prompt and step: the token, and the best tokens' log-probabilities."""
    params = greedy(COMPARED, logprobs=5)
    inputs = [{"prompt_token_ids": engine.prompts(1, n, n)[0]} for n in LENGTHS]
    texts = []
    for output in engine.llm.generate(inputs, params, use_tqdm=False):
        answer = output.outputs[0]
        steps = [{str(t): p.logprob for t, p in s.items()} for s in answer.logprobs]
        texts.append(
            [{"token": str(t), "best": s} for t, s in zip(answer.token_ids, steps)]
        )
    return texts


def compare(texts: list[list[dict]], reference: list[list[dict]]) -> dict:
    """How far texts equal those of one rank.

    16-bit ranks round differently, so texts may part where the best tokens are nearly
    equal; ``gap`` is the largest difference of log-probabilities where they do (None: a
    token was not among the reference's best five), and ``rounding`` the largest one of
    the same token after the same text.
    """
    same, rounding, parted = 0, 0.0, 0
    gap: float | None = 0.0
    for got, want in zip(texts, reference, strict=True):
        for a, b in zip(got, want, strict=True):
            both = a["best"].keys() & b["best"].keys()
            apart = (abs(a["best"][t] - b["best"][t]) for t in both)
            rounding = max(rounding, *apart, 0.0)
            if a["token"] != b["token"]:
                parted += 1
                if gap is not None and a["token"] in b["best"]:
                    gap = max(gap, b["best"][b["token"]] - b["best"][a["token"]])
                else:
                    gap = None
                break
            same += 1
    return {
        "equal": same / sum(map(len, reference)),
        "parted": parted,
        "of": len(reference),
        "gap": gap,
        "rounding": rounding,
    }


def describe(name: str, compared: dict) -> str:
    gap = compared["gap"]
    at = "unknown ones" if gap is None else f"at most {gap:.3f} nats"
    return (
        f"{name}: {compared['equal']:.1%} of the tokens lie before texts part from one "
        f"rank's; {compared['parted']} of {compared['of']} texts do, at differences of "
        f"{at}; the same token differs by up to {compared['rounding']:.3f}"
    )
