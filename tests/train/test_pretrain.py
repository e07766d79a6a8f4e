# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""A model from random weights: wordings, growing windows, the command, its folder."""

import json
from contextlib import nullcontext
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.accuracy import tasks
from vllm_sparse import checkpoint
from vllm_sparse.train import pretrain, qk_norm, wordings
from vllm_sparse.train.corpus import Corpus
from vllm_sparse.train.forward import hidden_states, load_model
from vllm_sparse.train.mixture import Batch, Curriculum
from vllm_sparse.train.wordings import Wordings

STEPS = 24


@pytest.fixture(scope="module")
def made(tokenizer):
    return Wordings(
        lambda text: tokenizer.encode(text, add_special_tokens=False),
        lambda token: tokenizer.decode([token]),
        len(tokenizer),
    )


@pytest.fixture(scope="module")
def corpus(data_folder):
    return Corpus(data_folder)


@pytest.mark.parametrize("kind", ["prose", "code"])
def test_drawn_facts_are_stated_and_asked_for(made, corpus, tokenizer, kind):
    rng, forms = np.random.default_rng(0), set()
    for _ in range(30):
        form = made.wording(kind, rng)
        forms.add(form)
        window = lambda n: corpus.window("train-code", n, rng)
        sample = made.facts([form], window, 1024, rng, number=2)
        assert len(sample.ids) == 1024
        answer = tokenizer.decode(sample.ids[-sample.answer :]).strip()
        assert answer.isdigit()
        assert tokenizer.decode(sample.ids).count(answer) == 2
        assert sample.weights[-sample.answer :].min() == made.answer_weight
    assert len(forms) > 25


def test_repeats_are_random_and_only_repetitions_count(made):
    rng = np.random.default_rng(0)
    for _ in range(10):
        sample = made.repeats(256, rng)
        period = int((sample.weights == 0).sum())
        assert 8 <= period <= 128 and sample.ids.min() >= 32
        assert (sample.ids[period:] == sample.ids[:-period]).all()


def test_wording_is_not_that_of_the_benchmarks(made):
    """No key, and no words in a row that say what is asked for."""
    assert not set(tasks.KEYS) & set(made.words)
    assert set(tasks.KEYS) == set(wordings.NOT_KEYS.split())
    drawn = [wordings.NOUNS, *chain(*wordings.CODE_ASK)]
    for parts in ("LINKS", "TELL", "OPENINGS", "ASK", "MEANWHILE", "CODE"):
        drawn += getattr(wordings, parts)
    words = set(" ".join(drawn).lower().split())
    assert not {"magic", "number", "numbers", "port", "registered"} & words
    assert not {"visitors'", "book"} & words  # nor the room's own held-out form


def test_windows_grow(made, corpus):
    sizes = dict(batch_tokens=1024, steps=10, lengths=(128, 256, 512))
    shares = dict(shares=(0.5, 0.3, 0.2), synthetic=0.5, code=0.5, seed=0)
    grown = Curriculum(corpus, made, **sizes, **shares)
    lengths = [grown.length(step) for step in range(10)]
    assert lengths == [128] * 5 + [256] * 3 + [512] * 2
    batch, again = grown.batch(9), grown.batch(9)
    assert batch.ids.shape == (2, 512) and (batch.ids == again.ids).all()
    assert (batch.positions == torch.arange(512)).all()
    assert not (batch.ids == grown.batch(8).ids).all()


SHAPE = """--layers 2 --hidden 64 --intermediate 128 --heads 2 --kv-heads 1
--head-size 64"""


def command(model, data, out, *more: str, shape: str = SHAPE) -> list[str]:
    options = f"""--data {data} --tokenizer {model} --out {out} --device cpu {shape}
    --lengths 128 256 --shares 0.75 0.25 --steps {STEPS} --batch-tokens 1024
    --micro-tokens 512 --learning-rate 0.01 --warmup 4 --evaluate-lengths 128 256
    --evaluate-samples 2 --evaluate-every 0 --save-every 5"""
    return [*options.split(), *more]


@pytest.fixture(scope="module")
def trained(model_folder, data_folder, tmp_path_factory):
    """In two parts, batches made by another process in the second."""
    out = tmp_path_factory.mktemp("pretrained")
    start = command(model_folder, data_folder, out)
    pretrain.main([*start, "--workers", "0", "--minutes", "0.005"])
    assert not json.loads((out / "run.json").read_text())["finished"]
    pretrain.main([*start, "--workers", "1"])
    return out


def test_it_learns_and_goes_on(trained, model_folder, data_folder, tmp_path):
    report = json.loads((trained / "run.json").read_text())
    assert report["finished"] and report["step"] == STEPS
    losses = [loss for _, loss, _ in report["losses"]]
    assert sum(losses[-4:]) < 0.95 * sum(losses[:4])
    pretrain.main(command(model_folder, data_folder, tmp_path, "--workers", "0"))
    whole = json.loads((tmp_path / "run.json").read_text())
    np.testing.assert_allclose(losses, [x[1] for x in whole["losses"]], rtol=1e-4)
    before, after = report["evaluations"][0], report["evaluations"][-1]
    for kind in ("code", "prose"):
        assert after["perplexity"][kind]["256"] < before["perplexity"][kind]["256"]


def test_the_folder_is_a_qwen3_and_its_hash_is_kept(trained, model_folder):
    report = json.loads((trained / "run.json").read_text())
    folder = trained / "model"
    assert report["model_sha256"] == checkpoint.base_hash(folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["head_dim"] == 64 and config["max_position_embeddings"] == 256
    same = "tokenizer.json"  # what packed text was made with
    assert (folder / same).read_bytes() == (model_folder / same).read_bytes()
    model = load_model(folder, torch.device("cpu"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    state = torch.load(trained / "state.pt", weights_only=True)["parameters"]
    name = "model.layers.0.self_attn.q_norm.weight"
    saved = model.get_parameter(name)
    torch.testing.assert_close(saved, state[name], atol=1e-2, rtol=1e-2)
    assert hidden_states(model, torch.ones(1, 8).long(), torch.arange(8)[None]).any()


def test_a_llama_gets_qk_norm_and_heads_of_twice_the_size(
    model_folder, data_folder, tmp_path
):
    more = ["--llama", str(model_folder), "--workers", "0", "--learning-rate", "0.003"]
    pretrain.main(command(model_folder, data_folder, tmp_path, *more, shape=""))
    report = json.loads((tmp_path / "run.json").read_text())
    assert report["recipe"]["llama_sha256"] == checkpoint.base_hash(model_folder)
    assert "heads" not in report["recipe"]
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    llama = json.loads((model_folder / "config.json").read_text())
    assert config["head_dim"] == 2 * llama["head_dim"]
    assert config["max_position_embeddings"] == 256
    before, after = report["evaluations"][0], report["evaluations"][-1]
    for kind in ("code", "prose"):
        assert after["perplexity"][kind]["256"] < before["perplexity"][kind]["256"]


def test_without_its_norms_the_wide_model_computes_the_llama(model_folder):
    """And its norms leave logits as large as the mean ones were."""
    llama = load_model(model_folder, torch.device("cpu"))
    ids = torch.randint(0, 512, (2, 64), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(64).expand(2, -1)
    wide = qk_norm.widened(llama, ids, odd=0.0)
    size = llama.config.head_dim
    lengths = qk_norm._lengths(llama, ids, size)
    for layer, (query, key) in zip(wide.model.layers, lengths, strict=True):
        attention = layer.self_attn
        both = attention.q_norm.weight * attention.k_norm.weight
        normed = 2 * size * both * attention.scaling
        torch.testing.assert_close(
            normed, torch.full_like(both, query * key / size**0.5)
        )
        attention.q_norm = attention.k_norm = torch.nn.Identity()
        attention.scaling = size**-0.5
    expected = hidden_states(llama, ids, positions)
    torch.testing.assert_close(hidden_states(wide, ids, positions), expected)


def test_shares_that_do_not_fit_are_refused(model_folder, data_folder, tmp_path):
    for more in (["--shares", "0.5"], ["--shares", "0.5", "0.6"]):
        with pytest.raises(SystemExit):
            pretrain.arguments_of(command(model_folder, data_folder, tmp_path, *more))


@pytest.mark.parametrize("option", [*SHAPE.split()[::2], "--rope-theta"])
def test_a_shape_beside_a_llama_is_refused(option, capsys):
    folders = [Path("model"), Path("data"), Path("out")]
    given = command(*folders, option, "10", shape="")  # 10: the default of --layers
    with pytest.raises(SystemExit):
        pretrain.arguments_of([*given, "--llama", "llama"])
    assert f"{option} shapes random weights" in capsys.readouterr().err
    assert pretrain.arguments_of(given).llama is None
    usual = pretrain.arguments_of(command(*folders, shape=""))
    assert (usual.layers, usual.hidden, usual.rope_theta) == (10, 512, 1e6)


def test_cudnn_is_of_gpus_and_of_the_forward(
    model_folder, data_folder, tmp_path, tokenizer, monkeypatch, capsys
):
    arguments = command(model_folder, data_folder, tmp_path)
    with pytest.raises(SystemExit):
        pretrain.arguments_of([*arguments, "--cudnn"])
    assert "--cudnn is of GPUs" in capsys.readouterr().err
    args = pretrain.arguments_of(arguments)
    model = pretrain.build(args, tokenizer, torch.device("cpu"))
    asked = []
    kernels = lambda cudnn: asked.append(cudnn) or nullcontext()
    monkeypatch.setattr(pretrain, "attention_kernels", kernels)
    for cudnn in (False, True):
        trainee = pretrain.Pretraining(model, Fixed(), 1024, 0, None, cudnn)
        monkeypatch.setattr(trainee, "batch", Fixed().batch)
        next(trainee.losses(0))
    assert asked == [False, True]


class Fixed:
    """One step of random tokens; every other one counts more."""

    steps = 1

    def batch(self, step: int) -> Batch:
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(0, 512, (4, 256), generator=generator)
        weights = 1.0 + 9 * (torch.arange(256) % 2).float()
        return Batch(ids, torch.arange(256).expand(4, -1), weights.expand(4, -1))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_products_in_bf16_give_the_gradients_of_fp32(
    device, model_folder, data_folder, tmp_path, tokenizer, monkeypatch
):
    """At head size 128 with grouped heads; on GPUs by fused attention."""
    arguments = command(model_folder, data_folder, tmp_path, "--head-size", "128")
    args = pretrain.arguments_of(arguments)
    gradients = []
    for place, in_bf16 in (("cpu", False), (device, True)):
        torch.manual_seed(0)
        model = pretrain.build(args, tokenizer, torch.device("cpu")).to(place)
        trainee = pretrain.Pretraining(model, Fixed(), 512, 0, None)
        autocast = torch.autocast(place, torch.bfloat16, enabled=in_bf16)
        monkeypatch.setattr(trainee, "bf16", lambda a=autocast: a)
        parts = list(trainee.losses(0))
        assert sum(tokens for _, tokens in parts) == 1024
        sum(loss for loss, _ in parts).backward()
        flat = [p.grad.float().cpu().flatten() for p in model.parameters()]
        gradients.append(torch.cat(flat))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.999
    assert not torch.equal(*gradients)
