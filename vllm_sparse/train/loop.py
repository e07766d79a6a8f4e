# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""The loop: AdamW, warm-up and cosine, checkpoints to go on from, a report."""

import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from tqdm import tqdm

STATE = "state.pt"
REPORT = "run.json"


@dataclass(frozen=True)
class Optimisation:
    """Steps and learning rate: linear warm-up, then a cosine down to a tenth."""

    steps: int
    learning_rate: float
    warmup: int
    weight_decay: float = 0.0
    clip: float = 1.0

    def rate(self, step: int) -> float:
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (0.55 + 0.45 * math.cos(math.pi * progress))


class Trainee(Protocol):
    """What is trained. Steps must be functions of their number, or a run that was
    interrupted would go on with other data than one that was not."""

    def parameters(self) -> dict[str, torch.nn.Parameter]: ...

    def losses(self, step: int) -> Iterator[tuple[torch.Tensor, int]]:
        """(Part of the step's loss, tokens) of each micro-batch; parts add up."""
        ...

    def evaluate(self) -> dict: ...


def train(
    trainee: Trainee,
    optimisation: Optimisation,
    out: Path,
    recipe: dict,
    minutes: float = math.inf,
    save_every: int = 100,
    evaluate_every: int = 0,
    clock: Callable[[], float] = time.monotonic,
) -> dict:
    """Train, or go on training, until all steps are done or the time is over.

    Args:
        out: folder of ``state.pt`` and ``run.json``; one that holds a state is gone on
            from, and gives the losses of a run without the interruption.
        recipe: everything that decides on the outcome, JSON; kept in both files.
        minutes: after which it saves and returns, without a last evaluation.
        save_every, evaluate_every: steps; 0: at the end only. Evaluations come also
            before the first step.

    Returns:
        The report: ``finished``, ``losses``, ``evaluations``, times, versions.

    Raises:
        ValueError: the folder holds a run of another recipe.
        RuntimeError: the loss is not a number.
    """
    start = clock()
    out.mkdir(parents=True, exist_ok=True)
    recipe = {**recipe, "optimisation": asdict(optimisation)}
    parameters = trainee.parameters()
    # Norms' weights are not to decay.
    groups = [
        {
            "params": [p for p in parameters.values() if (p.dim() > 1) is matrices],
            "weight_decay": optimisation.weight_decay if matrices else 0.0,
        }
        for matrices in (True, False)
    ]
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    device = next(iter(parameters.values())).device
    report = _resume(out, recipe, parameters, optimiser) or {
        "recipe": recipe,
        "step": 0,
        "tokens": 0,
        "seconds": 0.0,
        "losses": [],
        "evaluations": [],
    }
    before = report["seconds"]
    report |= environment(device)

    def save() -> None:
        report["seconds"] = round(before + clock() - start, 3)
        report["finished"] = report["step"] == optimisation.steps
        _save(out, report, parameters, optimiser)

    def evaluate() -> None:
        done = [entry["step"] for entry in report["evaluations"]]
        if report["step"] not in done:
            entry = {"step": report["step"], **trainee.evaluate()}
            report["evaluations"].append(entry)
            tqdm.write(json.dumps(entry), file=sys.stderr)

    if report["step"] == 0:
        evaluate()
    bar = tqdm(total=optimisation.steps, initial=report["step"], file=sys.stderr)
    while (step := report["step"]) < optimisation.steps:
        if clock() - start > 60 * minutes:
            break
        began = clock()
        optimiser.zero_grad(set_to_none=True)
        parts, tokens = [], 0
        for part, size in trainee.losses(step):
            part.backward()
            parts.append(part.detach())
            tokens += size
        loss = float(sum(parts))
        if not math.isfinite(loss):
            raise RuntimeError(
                f"the loss of step {step} is {loss}: lower --learning-rate"
            )
        torch.nn.utils.clip_grad_norm_(parameters.values(), optimisation.clip)
        for group in optimiser.param_groups:
            group["lr"] = optimisation.rate(step)
        optimiser.step()
        report["step"] = step + 1
        report["tokens"] += tokens
        speed = tokens / max(1e-9, clock() - began)
        report["losses"].append([step, round(loss, 6), round(speed)])
        bar.update()
        bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s")
        last = report["step"] == optimisation.steps
        if evaluate_every and report["step"] % evaluate_every == 0 and not last:
            evaluate()
        if save_every and report["step"] % save_every == 0 and not last:
            save()
    bar.close()
    if report["step"] == optimisation.steps:
        evaluate()
    save()
    return report


def _resume(out: Path, recipe: dict, parameters: dict, optimiser) -> dict | None:
    """What ``run.json`` held when the state was saved, the state being restored."""
    if not (out / STATE).is_file():
        return None
    state = torch.load(out / STATE, map_location="cpu", weights_only=True)
    report = json.loads(state["report"])
    if report["recipe"] != json.loads(json.dumps(recipe)):
        differing = [
            key
            for key in {*report["recipe"], *recipe}
            if report["recipe"].get(key) != json.loads(json.dumps(recipe.get(key)))
        ]
        raise ValueError(
            f"{out} holds a run that differs in {', '.join(sorted(differing))}; give "
            "the same options, or another --out"
        )
    if state["parameters"].keys() != parameters.keys():
        raise ValueError(
            f"{out} holds a run of a version that named parameters otherwise; give "
            "another --out"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state["parameters"][name])
    optimiser.load_state_dict(state["optimiser"])
    torch.set_rng_state(state["random"])
    if state["random_cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["random_cuda"])
    return report


def _save(out: Path, report: dict, parameters: dict, optimiser) -> None:
    """Both files, each replaced in one go: a run that is killed leaves whole ones."""
    cuda = next(iter(parameters.values())).is_cuda
    state = {
        "report": json.dumps(report),
        "parameters": {name: p.detach() for name, p in parameters.items()},
        "optimiser": optimiser.state_dict(),
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state() if cuda else None,
    }
    torch.save(state, out / f"{STATE}.new")
    os.replace(out / f"{STATE}.new", out / STATE)
    (out / f"{REPORT}.new").write_text(json.dumps(report) + "\n")
    os.replace(out / f"{REPORT}.new", out / REPORT)


def environment(device: torch.device) -> dict:
    import transformers

    from .. import __version__

    name = f"{platform.machine()}, {torch.get_num_threads()} threads"
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else name,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "vllm_sparse": __version__,
        },
    }
