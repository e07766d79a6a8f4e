# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Training a state for what has left, at toy size."""

import json
from dataclasses import fields

import pytest
import torch

from vllm_sparse import checkpoint
from vllm_sparse.cache.layout import STATE_RANK, state_bytes
from vllm_sparse.methods.less import KIND, Kernels, add_state, load_kernels
from vllm_sparse.train import less

SINKS, WINDOW = 128, 128


def random_kernels(heads=4, kv_heads=2, size=16, hidden=8) -> Kernels:
    generator = torch.Generator().manual_seed(1)
    shapes = dict(
        q1=(heads, size, hidden),
        q2=(heads, hidden, STATE_RANK),
        k1=(kv_heads, size, hidden),
        k2=(kv_heads, hidden, STATE_RANK),
        k3=(kv_heads, STATE_RANK, STATE_RANK),
        s1=(kv_heads, STATE_RANK),
        s2=(kv_heads, STATE_RANK),
    )
    return Kernels(
        **{n: torch.randn(s, generator=generator) for n, s in shapes.items()}
    )


def test_serving_computes_what_is_trained():
    """States of blocks and merged results equal the trainer's sums over tokens."""
    kernels, length, size = random_kernels(), 1000, 16
    generator = torch.Generator().manual_seed(3)
    query, key, value = (
        torch.randn(n, length, size, generator=generator) for n in (4, 2, 2)
    )
    rows = torch.tensor([300, 511, 512, 640, 999])
    given = (rows, query, key, value, 0.25, SINKS, WINDOW)
    expected = less.attend_rows(kernels, *given)
    # Exact attention, and states, as the engine makes them.
    kept, left = less.kept_tokens(rows, length, SINKS, WINDOW)
    keys, values = key.repeat_interleave(2, 0), value.repeat_interleave(2, 0)
    logits = query[:, rows] @ keys.mT * 0.25
    logits = logits.masked_fill(~kept, float("-inf"))
    exact = (logits.softmax(-1) @ values).transpose(0, 1)
    with_ones = torch.cat([value, torch.ones(2, length, 1)], -1)
    psi = kernels.psi(key)
    state = torch.stack([(psi * gone[:, None]).mT @ with_ones for gone in left.float()])
    lse = logits.logsumexp(-1).T
    found = add_state(kernels, query[:, rows].transpose(0, 1), state, lse, exact)
    torch.testing.assert_close(found.transpose(0, 1), expected, atol=1e-4, rtol=1e-4)
    alone = less.attend_rows(None, *given)
    assert (alone - expected).abs().max() > 0.1
    assert state[0, 0].numel() * 4 == state_bytes(size)


@pytest.fixture
def arguments(model_folder, data_folder, tmp_path):
    options = dict(length=768, window=WINDOW, rows=16, hidden=8, steps=4, warmup=1)
    options |= {"evaluate-samples": 1, "save-every": 2, "learning-rate": 0.01}
    argv = [
        str(model_folder),
        "--data",
        str(data_folder),
        "--out",
        str(tmp_path / "run"),
    ]
    for name, value in options.items():
        argv += [f"--{name}", str(value)]
    return argv


def test_the_command_trains_resumes_and_writes_a_checkpoint(
    arguments, model_folder, tmp_path
):
    less.main([*arguments, "--minutes", "0"])
    assert json.loads((tmp_path / "run/run.json").read_text())["step"] == 0
    less.main(arguments)
    report = json.loads((tmp_path / "run/run.json").read_text())
    assert report["finished"] and report["step"] == 4
    first, last = report["evaluations"]
    assert first["perplexity"]["prose"].keys() == {
        "dense",
        "window",
        "window_plus",
        "less",
    }
    # At first the state is all but silent.
    for kind in ("prose", "code"):
        found = first["perplexity"][kind]
        assert found["less"] == pytest.approx(found["window"], rel=0.02)
    folder = tmp_path / "run/checkpoint"
    made = checkpoint.load(folder, KIND, model_folder)
    assert made.description["config"]["local_window"] == WINDOW
    layers = load_kernels(str(folder))
    config = made.description["config"]
    assert len(layers) == config["num_layers"]
    shape = (config["num_heads"], config["head_size"], 8)
    assert layers[0].q1.shape == shape
    assert len(made.tensors) == len(layers) * len(fields(Kernels))


def test_losses_fall(arguments, tmp_path):
    less.main([*arguments, "--steps", "30", "--code", "1", "--rows", "64"])
    losses = [
        x for _, x, _ in json.loads((tmp_path / "run/run.json").read_text())["losses"]
    ]
    assert sum(losses[-5:]) < 0.97 * sum(losses[:5])
    assert losses[0] == pytest.approx(1, abs=0.1)
