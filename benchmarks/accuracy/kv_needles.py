# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Needles that KV formats find, without an engine: are 4-bit keys enough?

    python -m benchmarks.accuracy.kv_needles [--length 4096] [--samples 96]

As kv_formats.py, with the needle task in place of perplexity: a hit is an answer all of
whose tokens greedy decoding would say. Also the answer's mean negative log-likelihood,
which moves before hits do.
"""

import argparse
import json
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.accuracy.environment import describe
from benchmarks.accuracy.kv_formats import (
    Format,
    asymmetric,
    exact,
    formats,
    load_model,
    per_channel,
    per_token,
)
from benchmarks.accuracy.tasks import make_samples


def more_formats(head_size: int) -> dict[str, Format]:
    """What might save the needles that 4-bit keys lose."""
    value = per_token(4, 32)
    result = {
        f"K {bits} bit per {group}, V 4": Format(
            per_channel(bits, group), value, (bits + 32 / group + 5) / 2
        )
        for bits, group in ((4, 16), (5, 32), (5, 128), (6, 128))
    }
    result["K exact, V 4"] = Format(exact, value, (16 + 5) / 2)
    result["K 4 per 32, V exact"] = Format(per_channel(4, 32), exact, (5 + 16) / 2)
    # k8v4, without the 4-bit K that only selection reads
    result["K 8 bit by token, V 4"] = Format(
        per_token(8, head_size), value, (8 + 32 / head_size + 5) / 2
    )

    def shared(x: torch.Tensor) -> torch.Tensor:
        """8-bit parameters: scale and minimum in steps of the block's largest."""
        full = x.shape[1] // 128 * 128
        groups = x[:, :full].unflatten(1, (-1, 4, 32)).transpose(-1, -2)
        low = groups.amin(-1, keepdim=True)
        low_codes = asymmetric(low.transpose(2, 4), 8).transpose(2, 4)
        scale = (groups.amax(-1, keepdim=True) - low_codes) / 15
        step = scale.amax(2, keepdim=True) / 255
        scale = (scale / step).ceil() * step
        codes = ((groups - low_codes) / scale).round().clamp(0, 15)
        done = (codes * scale + low_codes).transpose(-1, -2).flatten(1, 3)
        return torch.cat([done, x[:, full:]], dim=1)

    result["K 4 per 32, 8-bit parameters"] = Format(shared, value, 4.75)
    return result


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=96)
    parser.add_argument("--task", default="needle")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="+", help="names, or parts of them")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.set_default_device(args.device)
    current: list[Format] = []
    model, sources, head_size = load_model(current, args.device)
    tried = {
        name: kept
        for name, kept in (formats(head_size) | more_formats(head_size)).items()
        if name == "none" or not args.only or any(part in name for part in args.only)
    }
    hits = {name: [] for name in tried}
    losses = {name: [] for name in tried}
    samples = make_samples(args.task, sources, args.length, args.samples)
    with tqdm(total=len(samples) * len(tried)) as bar:
        for sample in samples:
            ids = torch.tensor(sample.prompt_ids + sample.forced_ids)
            answer = ids[len(sample.prompt_ids) :]
            for name, kept in tried.items():
                current[:] = [kept]
                out = model.model(ids[None]).last_hidden_state[0]
                logits = model.lm_head(out[-len(answer) - 1 : -1])
                hits[name].append(bool((logits.argmax(-1) == answer).all()))
                losses[name].append(
                    float(torch.nn.functional.cross_entropy(logits, answer))
                )
                bar.update()
    print("| format | bits | hits | lost, won | answer's nats |\n|---|---|---|---|---|")
    for name, found in hits.items():
        pairs = list(zip(hits["none"], found, strict=True))
        lost = sum(a and not b for a, b in pairs)
        won = sum(b and not a for a, b in pairs)
        nats = torch.tensor(losses[name], device="cpu")
        change = nats - torch.tensor(losses["none"], device="cpu")
        error = change.std() / len(change) ** 0.5
        print(
            f"| {name} | {tried[name].bits:.2f} | {sum(found)} / {len(found)} "
            f"| {lost}, {won} | {nats.mean():.3f}: {change.mean():+.3f} ± {error:.3f} |"
        )
    if args.output:
        data = {
            "header": describe() | vars(args) | {"output": None},
            "hits": hits,
            "loss": losses,
            "bits": {name: kept.bits for name, kept in tried.items()},
        }
        args.output.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
