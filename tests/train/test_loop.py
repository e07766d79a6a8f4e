# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""The loop: learning, going on after an interruption, limits; the model's forward."""

import json

import pytest
import torch
import torch.nn.functional as F

from vllm_sparse.train import lora
from vllm_sparse.train.forward import hidden_states, load_model, token_losses
from vllm_sparse.train.loop import Optimisation, train

CPU = torch.device("cpu")


class Line:
    """Fits a line to points that are a function of the step."""

    def __init__(self):
        torch.manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(8))
        self.evaluated = 0

    def parameters(self):
        return {"weight": self.weight}

    def losses(self, step):
        generator = torch.Generator().manual_seed(step)
        for _ in range(2):
            x = torch.randn(16, 8, generator=generator)
            noise = torch.rand(())  # from the global generator, which is saved, too
            yield ((x @ self.weight - x.sum(1)) ** 2).mean() / 2 + 0.01 * noise, 16

    def evaluate(self):
        self.evaluated += 1
        return {"distance": (self.weight - 1).norm().item()}


OPTIMISATION = Optimisation(steps=12, learning_rate=0.3, warmup=2)


def run(folder, trainee=None, **options) -> dict:
    return train(trainee or Line(), OPTIMISATION, folder, {"name": "line"}, **options)


def test_it_learns_and_reports(tmp_path):
    report = run(tmp_path, evaluate_every=4)
    first, last = report["losses"][0][1], report["losses"][-1][1]
    assert last < 0.2 * first and report["finished"]
    assert [entry["step"] for entry in report["evaluations"]] == [0, 4, 8, 12]
    assert report["tokens"] == 12 * 32 and report["seconds"] >= 0
    written = json.loads((tmp_path / "run.json").read_text())
    assert written == report and "torch" in written["versions"]


class Killed(Exception):
    pass


def test_going_on_gives_the_same_losses(tmp_path):
    """After a kill in the middle of a step, the last state counts."""
    whole = run(tmp_path / "whole", save_every=5)

    class Dying(Line):
        def losses(self, step):
            if step == 8:
                raise Killed
            yield from super().losses(step)

    with pytest.raises(Killed):
        run(tmp_path / "killed", Dying(), save_every=5)
    killed = json.loads((tmp_path / "killed" / "run.json").read_text())
    assert killed["step"] == 5 and not killed["finished"]
    rest = run(tmp_path / "killed", save_every=5)
    losses = [[step, loss] for step, loss, _ in rest["losses"]]
    assert losses == [[step, loss] for step, loss, _ in whole["losses"]]
    assert rest["evaluations"] == whole["evaluations"]


def test_the_time_limit_saves_and_ends(tmp_path):
    now = iter(range(10_000))
    clock = lambda: 20.0 * next(now)  # each look at the clock takes 20 seconds
    parts = []
    while not parts or not parts[-1]["finished"]:
        parts.append(run(tmp_path, minutes=2, clock=clock))
    assert len(parts) > 2 and 0 < parts[0]["step"] < parts[1]["step"]
    assert parts[0]["seconds"] < 200 < parts[-1]["seconds"]
    whole = run(tmp_path / "whole")
    assert [x[1] for x in parts[-1]["losses"]] == [x[1] for x in whole["losses"]]


def test_another_recipe_is_refused(tmp_path):
    run(tmp_path, minutes=0)
    with pytest.raises(ValueError, match="differs in name; give the same options"):
        train(Line(), OPTIMISATION, tmp_path, {"name": "other"})


def test_parameters_of_other_names_are_refused(tmp_path):
    run(tmp_path, minutes=0)

    class Renamed(Line):
        def parameters(self):
            return {f"other.{n}": p for n, p in super().parameters().items()}

    with pytest.raises(ValueError, match="give another --out"):
        run(tmp_path, Renamed())


def test_a_broken_loss_is_an_error(tmp_path):
    class Broken(Line):
        def losses(self, step):
            yield self.weight.sum() * float("nan"), 1

    with pytest.raises(RuntimeError, match="the loss of step 0 is nan"):
        run(tmp_path, Broken())


def test_learning_rate():
    rates = [Optimisation(100, 1.0, 10).rate(step) for step in range(101)]
    assert rates[0] == 0.1 and max(rates) == rates[10] == 1.0
    assert rates[100] == pytest.approx(0.1) and sorted(rates[10:])[::-1] == rates[10:]


@pytest.fixture(scope="module")
def model(model_folder):
    return load_model(model_folder, CPU)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 512, (2, 50), generator=torch.Generator().manual_seed(0))


def test_forward_is_the_models_own(model, ids):
    positions = torch.arange(50).expand(2, -1)
    expected = model(ids).logits
    found = hidden_states(model, ids, positions) @ model.lm_head.weight.T
    torch.testing.assert_close(found, expected)


def test_skipped_positions_do_not_cut_attention(model, ids):
    """The first token changes what stands behind a jump, and the jump counts."""
    positions = torch.arange(50).expand(2, -1) + 500 * (torch.arange(50) >= 25)
    hidden = hidden_states(model, ids, positions)
    changed = ids.clone()
    changed[:, 0] += 1
    assert not torch.allclose(
        hidden_states(model, changed, positions)[:, -1], hidden[:, -1]
    )
    plain = hidden_states(model, ids, torch.arange(50).expand(2, -1))
    torch.testing.assert_close(plain[:, :25], hidden[:, :25])
    assert not torch.allclose(plain[:, 25:], hidden[:, 25:])


def test_chunked_loss_and_checkpointing_change_nothing(model_folder, ids):
    model = load_model(model_folder, CPU, theta=5e4)
    assert model.config.rope_parameters["rope_theta"] == 5e4
    lora.add_lora(model, 4, 8.0)
    parameters = lora.factors(model)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.normal_(std=0.1)
    positions = torch.arange(50).expand(2, -1)
    targets = ids[:, 1:].flatten()

    def gradients(checkpointing, chunk):
        model.zero_grad()
        hidden = hidden_states(model, ids, positions, checkpointing)[:, :-1]
        hidden = hidden.flatten(0, 1)
        if chunk:
            losses = token_losses(hidden, model.lm_head.weight, targets, chunk)
        else:
            logits = hidden @ model.lm_head.weight.T
            losses = F.cross_entropy(logits, targets, reduction="none")
        losses.mean().backward()
        return losses, [p.grad.clone() for p in parameters.values()]

    expected = gradients(False, None)
    for found in (gradients(False, 17), gradients(True, 64)):
        torch.testing.assert_close(found, expected)
    assert len(parameters) == 3 * 4 * 2


def test_lora_without_layers_is_an_error(model):
    with pytest.raises(ValueError, match="none of the layers qkv_proj"):
        lora.add_lora(model, 4, 8.0, ["qkv_proj"])


@pytest.mark.gpu
def test_gpus_train_by_fused_attention(model_folder):
    """In bf16, with grouped heads: loss and gradients near those of fp32."""

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 512, (2, 1024), generator=generator)
    drawn: dict[str, torch.Tensor] = {}

    def losses(device):
        model = load_model(model_folder, torch.device(device))
        lora.add_lora(model, 4, 8.0)
        parameters = lora.factors(model)
        with torch.no_grad():
            for name, p in parameters.items():
                values = torch.randn(p.shape, generator=generator) * 0.05
                p.copy_(drawn.setdefault(name, values))
        here = ids.to(device)
        positions = torch.arange(1024, device=device).expand(2, -1)
        hidden = hidden_states(model, here, positions)[:, :-1].flatten(0, 1)
        targets = here[:, 1:].flatten()
        loss = token_losses(hidden, model.lm_head.weight, targets).mean()
        loss.backward()
        gradients = [p.grad.flatten().cpu() for p in parameters.values()]
        return loss.item(), torch.cat(gradients)

    expected, found = losses("cpu"), losses("cuda")
    assert found[0] == pytest.approx(expected[0], rel=0.02)
    assert F.cosine_similarity(found[1], expected[1], dim=0) > 0.98
