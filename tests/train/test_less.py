# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Training a state for what has left, at toy size."""

import json
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from benchmarks.serving import untrained
from vllm_sparse import checkpoint
from vllm_sparse.cache.layout import BLOCK_SIZE, STATE_RANK, state_bytes
from vllm_sparse.methods.less import (
    KIND,
    Kernels,
    add_state,
    load_kernels,
    tensor_shapes,
)
from vllm_sparse.train import less
from vllm_sparse.train.corpus import Corpus
from vllm_sparse.train.forward import load_model
from vllm_sparse.train.less_evaluate import (
    BLOCKS_AT_ONCE,
    attend_exactly,
    nats,
    state_tokens,
)
from vllm_sparse.train.less_joint import JointTrainee, divergences
from vllm_sparse.train.less_layers import LessTrainee
from vllm_sparse.train.less_rows import Kept, Rows, attended, logits_of, recorded

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


def random_text(length: int) -> list[torch.Tensor]:
    """Query, key and value, [heads, length, size]."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(n, length, 16, generator=generator) for n in (4, 2, 2)]


def rows_of(kept: Kept, positions, query, key, value) -> Rows:
    mask = kept.mask(positions, torch.arange(key.shape[1]))
    logits = logits_of(query[:, positions], key, mask, 0.25)
    return Rows.of(kept, positions, query, key, value, *attended(logits, value))


def test_serving_computes_what_is_trained():
    """States of blocks and merged results equal the trainer's sums over tokens."""
    kernels, length, size = random_kernels(), 1000, 16
    query, key, value = random_text(length)
    positions = torch.tensor([300, 511, 512, 640, 999])
    kept = Kept(SINKS, WINDOW, BLOCK_SIZE)
    rows = rows_of(kept, positions, query, key, value)
    alone, (expected, _) = rows.exact, rows.merged(rows.sums(kernels))
    # Exact attention, and states, as the engine makes them.
    near = kept.mask(positions, torch.arange(length))
    left = (torch.arange(length) <= positions[:, None]) & ~near
    keys, values = key.repeat_interleave(2, 0), value.repeat_interleave(2, 0)
    logits = query[:, positions] @ keys.mT * 0.25
    logits = logits.masked_fill(~near, float("-inf"))
    exact = (logits.softmax(-1) @ values).transpose(0, 1)
    with_ones = torch.cat([value, torch.ones(2, length, 1)], -1)
    psi = kernels.psi(key)
    state = torch.stack([(psi * gone[:, None]).mT @ with_ones for gone in left.float()])
    lse = logits.logsumexp(-1).T
    found, _ = add_state(
        kernels, query[:, positions].transpose(0, 1), state, lse, exact
    )
    torch.testing.assert_close(found.transpose(0, 1), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(alone, exact.transpose(0, 1), atol=1e-4, rtol=1e-4)
    assert (alone - expected).abs().max() > 0.1
    assert state[0, 0].numel() * 4 == state_bytes(size)


KEPT = [Kept(5, 40, 1), Kept(0, 3, 1), Kept(SINKS, WINDOW, BLOCK_SIZE)]


@pytest.mark.parametrize("kept", KEPT)
def test_states_are_sums_over_what_has_left(kept):
    """Whatever a sum's run of tokens leaves over."""
    kernels, (query, key, value) = random_kernels(), random_text(700)
    positions = torch.arange(kept.tokens, 700, 7)
    found = rows_of(kept, positions, query, key, value).states(kernels)
    tokens = torch.arange(700)
    left = (tokens <= positions[:, None]) & ~kept.mask(positions, tokens)
    given = torch.cat([value, torch.ones(2, 700, 1)], -1)[:, None]
    each = (kernels.psi(key)[:, None] * left[..., None]).mT
    torch.testing.assert_close(found, each @ given, atol=2e-3, rtol=1e-4)
    assert left[-1].any()


@pytest.mark.parametrize("kept", [*KEPT, Kept(0, 700, 1), Kept(5, 150, 1)])
@pytest.mark.parametrize("at_once", [1, 3])
def test_blocks_of_positions_attend_as_single_ones(kept, at_once, monkeypatch):
    monkeypatch.setitem(BLOCKS_AT_ONCE, "cpu", at_once)
    query, key, value = random_text(700)
    positions = torch.arange(301, 700)
    rows = rows_of(kept, positions, query, key, value)
    exact, lse = attend_exactly(301, query, key, value, 0.25, kept)
    torch.testing.assert_close(exact, rows.exact, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(lse, rows.lse, atol=1e-5, rtol=1e-4)


def test_all_layers_at_once_give_what_each_gives():
    kernels, kept = random_kernels(), Kept(5, 40, 1)
    other = Kernels(**{f.name: getattr(kernels, f.name) / 2 for f in fields(Kernels)})
    positions, query, key, value = torch.arange(50, 300, 3), *random_text(300)
    one = rows_of(kept, positions, query, key, value)
    one = replace(one, expected=one.exact, whole=one.lse)
    text = recorded([one, one])
    both = Kernels(
        *(
            torch.stack([getattr(kernels, f.name), getattr(other, f.name)])
            for f in fields(Kernels)
        )
    )
    assert text.key.dtype == torch.float16 and text.lse.dtype == torch.float32
    for found, each in zip(text.sums(both), (kernels, other)):
        expected = recorded([one]).sums(each)[0]
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-5)


@pytest.fixture
def arguments(model_folder, data_folder, tmp_path):
    options = dict(length=768, window=WINDOW, rows=16, hidden=8, steps=4, warmup=1)
    options |= {"texts": 2}
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


@pytest.mark.parametrize("name", ["sinks", "window", "evaluate-windows"])
def test_parts_of_blocks_are_refused(arguments, name, capsys):
    """Their states would leave out what is not a whole block."""
    with pytest.raises(SystemExit):
        less.arguments_of([*arguments, f"--{name}", "200"])
    assert f"--{name} must be a multiple of 128" in capsys.readouterr().err
    one_by_one = [*arguments, "--block", "1", f"--{name}", "20"]
    assert less.arguments_of(one_by_one).block == 1


@pytest.mark.parametrize("name", ["joint-rate", "joint-batch"])
def test_joint_options_without_joint_steps_are_refused(arguments, name, capsys):
    given = [*arguments, f"--{name}", "1"]  # 1: also where it is the default
    with pytest.raises(SystemExit):
        less.arguments_of(given)
    assert f"--{name} is of joint steps" in capsys.readouterr().err
    assert less.arguments_of([*given, "--joint-steps", "2"]).joint_steps == 2
    args = less.arguments_of([*arguments, "--joint-steps", "2"])
    assert (args.joint_rate, args.joint_batch) == (1e-3, 1)


def test_layers_of_unlike_shapes_are_refused(arguments, model_folder, data_folder):
    model = load_model(model_folder, torch.device("cpu"))
    attention = model.model.layers[1].self_attn
    attention.o_proj = torch.nn.Linear(8, 8, bias=False)
    with pytest.raises(ValueError, match="same shapes"):
        less.LessTrainee(model, Corpus(data_folder), less.arguments_of(arguments))


def test_the_command_trains_resumes_and_writes_a_checkpoint(
    arguments, model_folder, tmp_path
):
    less.main([*arguments, "--minutes", "0"])
    assert json.loads((tmp_path / "run/run.json").read_text())["step"] == 0
    less.main(arguments)
    report = json.loads((tmp_path / "run/run.json").read_text())
    assert report["finished"] and report["step"] == 4
    first, last = (entry["by_window"] for entry in report["evaluations"])
    assert first.keys() == last.keys() == {str(WINDOW)}
    for kind in ("prose", "code"):
        found, later = (e[str(WINDOW)]["perplexity"][kind] for e in (first, last))
        assert found.keys() == {"dense", "window", "window_plus", "less"}
        # Nothing but the state is trained.
        assert found["window"] == later["window"]
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
    less.main([*arguments, "--steps", "40", "--texts", "2", "--rows", "64"])
    report = json.loads((tmp_path / "run/run.json").read_text())
    losses = [loss for _, loss, _ in report["losses"]]
    # The state is useful from the first step on, and more so later.
    assert losses[0] < 1 and sum(losses[-4:]) < 0.88 * sum(losses[:4])


def test_all_layers_together_learn_from_the_dense_model(
    arguments, model_folder, data_folder, tmp_path
):
    args = less.arguments_of([*arguments, "--joint-steps", "3", "--joint-batch", "2"])
    corpus, cpu = Corpus(data_folder, model_folder), torch.device("cpu")
    trainee = LessTrainee(load_model(model_folder, cpu), corpus, args)
    joint = JointTrainee(trainee)

    def loss() -> torch.Tensor:
        return sum(part for part, _ in joint.losses(0))

    optimiser = torch.optim.Adam(joint.parameters().values(), lr=0.01)
    first = loss()
    for _ in range(8):
        optimiser.zero_grad()
        loss().backward()
        assert all(p.grad.isfinite().all() for p in joint.parameters().values())
        optimiser.step()
    assert loss() < 0.9 * first
    less.main([*arguments, "--joint-steps", "3", "--steps", "2"])
    run = tmp_path / "run"
    report = json.loads((run / "joint" / "run.json").read_text())
    assert report["finished"] and report["recipe"]["joint_steps"] == 3
    made = checkpoint.load(run / "checkpoint", KIND, model_folder)
    state = torch.load(run / "joint" / "state.pt", weights_only=True)["parameters"]
    torch.testing.assert_close(made.tensors["layers.1.q1"], state["q1"][1].half())
    assert made.tensors["layers.1.s1"].dtype == torch.float32
    assert made.description["recipe"]["steps_done"] == 3


def test_untrained_features_are_a_checkpoint_of_their_shape(tmp_path):
    untrained.write("llama-3.1-8b:1", tmp_path, hidden=8, sinks=128, window=128)
    made = checkpoint.load(tmp_path, KIND, None)
    checkpoint.check_shapes(made, tensor_shapes(made.description["config"]))
    (kernels,) = load_kernels(str(tmp_path))
    key = torch.randn(8, 16, 128, generator=torch.Generator().manual_seed(0))
    features = kernels.psi(key)
    assert features.min() > 0 and features.max() < 1


def test_the_dense_model_is_nowhere_from_itself():
    hidden, head = torch.randn(3, 8), torch.randn(20, 8)
    assert divergences(hidden, head, hidden).abs().max() < 1e-5
    assert divergences(hidden, head, hidden + 1).min() > 0


def test_any_sinks_and_windows_are_evaluated(arguments, tmp_path):
    """In tokens, where no engine serves it; the same texts and rows for all arms."""
    given = ["--block", "1", "--sinks", "3", "--window", "29", "--steps", "2"]
    less.main([*arguments, *given, "--evaluate-windows", "10", "29"])
    report = json.loads((tmp_path / "run/run.json").read_text())
    narrow, wide = report["evaluations"][-1]["by_window"].values()
    assert narrow["tokens"] == 3 + 10 + 1 and wide["tokens"] == 33
    assert narrow["window_plus_tokens"] == 14 + state_tokens(64, Kept(3, 10, 1))
    for kind, arms in narrow["perplexity"].items():
        assert arms["dense"] == wide["perplexity"][kind]["dense"]
        assert len(set(arms.values())) == 4


def test_what_is_kept_whole_is_dense(model_folder, data_folder):
    """Arms differ in what is kept alone."""
    model = load_model(model_folder, torch.device("cpu"))
    rng = np.random.default_rng(0)
    ids = Corpus(data_folder).window("heldout-prose", 500, rng)
    dense = nats(model, ids, 100, None, None)
    assert nats(model, ids, 100, Kept(0, 500, 1), None) == pytest.approx(
        dense, abs=1e-5
    )
    assert nats(model, ids, 100, Kept(4, 32, 1), None) != pytest.approx(dense, abs=1e-4)
