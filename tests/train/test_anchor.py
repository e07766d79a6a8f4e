# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Training with anchors: masks against plain loops, both arms, what merge makes."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from scripts import get_model
from vllm_sparse import checkpoint
from vllm_sparse.anchor_config import FILE, AnchorConfig
from vllm_sparse.cache.layout import BLOCK_SIZE
from vllm_sparse.cache.lines import NEAR_BLOCKS, anchors, visible
from vllm_sparse.train import anchor, lora
from vllm_sparse.train.anchored import Anchored, line_ends
from vllm_sparse.train.forward import hidden_states, load_model
from vllm_sparse.train.merge import ANCHOR_KINDS, merge

CPU = torch.device("cpu")
ENDS = (5, 6, 7)
STEPS = 12


def windows(*shape: int, ends: float = 0.1) -> torch.Tensor:
    """Random ids; so many of them end a line."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(8, 512, shape, generator=generator)
    ending = torch.rand(shape, generator=generator) < ends
    return torch.where(ending, torch.randint(5, 8, shape, generator=generator), ids)


@pytest.fixture(scope="module")
def model(model_folder):
    return load_model(model_folder, CPU)


def test_batches_are_masked_as_contexts_are(model):
    ids = torch.cat([windows(2, 600), windows(1, 600, ends=0.001)])
    for look_back in (True, False):
        anchored = Anchored(model, AnchorConfig(ENDS, look_back))
        found = anchored.seen(ids)
        for row, seen in zip(ids, found, strict=True):
            ends = torch.tensor([int(token) in ENDS for token in row])
            assert torch.equal(seen, visible(anchors(ends), look_back))
        causal = torch.ones(600, 600).tril().bool()
        assert (found <= causal).all() and not torch.equal(found[0], causal)


def twin(model, ids, seen, pairs, older) -> torch.Tensor:
    """Hidden states of one context, position by position and head by head."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    inner, hidden, kept = model.model, model.model.embed_tokens(ids)[None], []
    positions = torch.arange(len(ids))[None]
    cos, sin = inner.rotary_emb(hidden, position_ids=positions)
    for number, layer in enumerate(inner.layers):
        x, attention = layer.input_layernorm(hidden), layer.self_attn
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        q, k, v = (p(x).view(1, len(ids), -1, 64).transpose(1, 2) for p in projections)
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        kept.append((k[0], v[0]))
        out = torch.empty(len(ids), q.shape[1], 64)
        for i in range(len(ids)):
            for head in range(q.shape[1]):
                of = head // (q.shape[1] // k.shape[1])
                keys, values = (
                    kept[number][0][of, seen[i]],
                    kept[number][1][of, seen[i]],
                )
                if number in pairs:
                    more = kept[pairs[number]]
                    keys = torch.cat([keys, more[0][of, older[i]]])
                    values = torch.cat([values, more[1][of, older[i]]])
                out[i, head] = (keys @ q[0, head, i] / 8).softmax(0) @ values
        hidden = hidden + attention.o_proj(out.flatten(1))[None]
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return inner.norm(hidden)


@pytest.mark.parametrize("pairs", [{}, {1: 0, 2: 1}, {2: 0}], ids=str)
@pytest.mark.parametrize("look_back", [True, False])
def test_forward_is_that_of_plain_loops(model, pairs, look_back):
    ids, n = windows(1, 450), 450
    anchored = Anchored(model, AnchorConfig(ENDS, look_back, pairs))
    before = model.config._attn_implementation
    found = anchored(ids, torch.arange(n)[None])
    assert model.config._attn_implementation == before
    marked, seen = anchored.anchors(ids), anchored.seen(ids)
    older = torch.zeros(n, n, dtype=torch.bool)
    for i in range(n):
        for j in range((i // BLOCK_SIZE - NEAR_BLOCKS) * BLOCK_SIZE):
            older[i, j] = seen[0, i, j] and marked[0, j]
    expected = twin(model, ids[0], seen[0], pairs, older)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    plain = hidden_states(model, ids, torch.arange(n)[None])
    assert (plain - found).abs().max() > 0.1
    if pairs:
        alone = Anchored(model, AnchorConfig(ENDS, look_back))
        assert (alone(ids, torch.arange(n)[None]) - found).abs().max() > 0.1


def test_line_ends_are_read_from_the_tokenizer(tokenizer):
    assert line_ends(tokenizer) == (tokenizer.convert_tokens_to_ids("Ċ"),)

    class Texts(list):
        decode = lambda self, ids: self[ids[0]]

    texts = Texts(["\n", " \n\t ", "\n\n    ", "\n#", "a", ");\n", "\r", "\\n"])
    assert line_ends(texts) == (0, 1, 2, 5)
    with pytest.raises(ValueError, match="no token of this tokenizer ends a line"):
        line_ends(Texts(["a", " b"]))


def test_configs_of_other_models_are_refused(model):
    with pytest.raises(ValueError, match="layer 9 of lower layers: the model has 3"):
        Anchored(model, AnchorConfig(ENDS, lower_layers={9: 1}))
    with pytest.raises(ValueError, match="beyond the model's vocabulary"):
        Anchored(model, AnchorConfig((512,)))


def command(model: Path, data: Path, out: Path, *more: str) -> list[str]:
    options = f"""--data {data} --out {out} --length 512 --batch-tokens 1024 --rank 4
    --micro-tokens 512 --alpha 8 --steps {STEPS} --warmup 2 --learning-rate 0.01
    --evaluate-lengths 512 256 --evaluate-samples 2 --evaluate-every 0 --save-every 4
    --device cpu"""
    return [str(model), *options.split(), *more]


def report_of(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


@pytest.fixture(scope="module")
def runs(model_folder, data_folder, tmp_path_factory) -> dict[str, Path]:
    """Both arms; the anchors' in two parts."""
    made = {}
    for arm in ("anchor", "control"):
        made[arm] = tmp_path_factory.mktemp(arm)
        given = command(model_folder, data_folder, made[arm], "--arm", arm)
        if arm == "anchor":
            given += ["--lower-layers", "2:0"]
            anchor.main([*given, "--minutes", "0.005"])
            assert not report_of(made[arm])["finished"]
        anchor.main(given)
    return made


def test_both_arms_learn(runs, model_folder):
    for arm, folder in runs.items():
        report = report_of(folder)
        assert report["finished"] and report["step"] == STEPS
        losses = [loss for _, loss, _ in report["losses"]]
        assert sum(losses[-4:]) < 0.97 * sum(losses[:4])
        before, after = report["evaluations"][0], report["evaluations"][-1]
        for length in ("256", "512"):
            assert after["perplexity"][length] < before["perplexity"][length]
        assert report["recipe"]["arm"] == arm
        assert report["recipe"]["base_sha256"] == checkpoint.base_hash(model_folder)
    first = [report_of(folder)["losses"][0][1] for folder in runs.values()]
    assert abs(first[0] - first[1]) > 1e-4  # by the mask alone


def test_an_interrupted_run_gives_the_losses_of_a_whole(
    runs, model_folder, data_folder, tmp_path
):
    given = command(model_folder, data_folder, tmp_path, "--lower-layers", "2:0")
    anchor.main(given)
    whole, parts = report_of(tmp_path), report_of(runs["anchor"])
    losses = lambda report: [loss for _, loss, _ in report["losses"]]
    assert losses(whole) == pytest.approx(losses(parts), abs=1e-5)


def test_other_arms_do_not_go_on(runs, model_folder, data_folder):
    given = command(model_folder, data_folder, runs["anchor"], "--arm", "control")
    with pytest.raises(ValueError, match=r"holds a run that differs in anchors_.*arm"):
        anchor.main(given)


def test_options_that_contradict_are_refused(capsys):
    for more, message in (
        ("--arm control --lower-layers 2:0", "are of --arm anchor"),
        ("--lower-layers 2:0 --compile", "does not go with --lower-layers"),
        ("--lower-layers 2", "invalid pairs value"),
        ("--cudnn --device cpu", "is of GPUs, not of --device cpu"),
    ):
        with pytest.raises(SystemExit):
            anchor.arguments_of(["model", "--data", "d", "--out", "o", *more.split()])
        assert message in capsys.readouterr().err


def test_data_of_another_tokenizer_is_refused(model_folder, data_folder, tmp_path):
    other = Path(shutil.copytree(model_folder, tmp_path / "other"))
    content = json.loads((other / "tokenizer.json").read_text())
    content["model"]["merges"].pop()
    (other / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="was tokenised for another model"):
        anchor.main(command(other, data_folder, tmp_path / "run"))


@pytest.mark.parametrize("arm", ["anchor", "control"])
def test_merged_models_compute_what_was_trained(runs, model_folder, tmp_path, arm):
    folder = runs[arm] / "checkpoint"
    out = merge(folder, model_folder, tmp_path / "merged")
    assert (out / FILE).exists() == (arm == "anchor")
    merged, tuned = load_model(out, CPU), load_model(model_folder, CPU)
    lora.add_lora(tuned, 4, 8.0, [*lora.ATTENTION, *lora.MLP])
    saved = checkpoint.load(folder, ANCHOR_KINDS[arm], model_folder)
    with torch.no_grad():
        for name, parameter in lora.factors(tuned).items():
            parameter.copy_(saved.tensors[name])
    ids, positions = windows(1, 300), torch.arange(300)[None]
    found = [hidden_states(m, ids, positions) for m in (merged, tuned)]
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)
    untrained = hidden_states(load_model(model_folder, CPU), ids, positions)
    assert (untrained - found[0]).abs().max() > 0.1
    if arm == "anchor":
        declared = AnchorConfig.from_json(json.loads((out / FILE).read_text()))
        assert declared.lower_layers == {2: 0} and declared.anchors_look_back
        assert len(declared.line_ends) == 1
        assert declared.recipe["steps_done"] == STEPS


def test_all_weights_can_be_trained(model_folder, data_folder, tmp_path):
    given = command(model_folder, data_folder, tmp_path / "run", "--full")
    anchor.main([*given, "--steps", "2", "--learning-rate", "1e-3"])
    out = merge(tmp_path / "run/checkpoint", model_folder, tmp_path / "merged")
    merged, base = load_model(out, CPU), load_model(model_folder, CPU)
    apart = (merged.lm_head.weight - base.lm_head.weight).abs().max()
    assert 0 < apart < 0.1 and (out / FILE).exists()


def test_get_model_makes_both_of_shipped_checkpoints(
    runs, model_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(get_model, "CHECKPOINTS", tmp_path)
    monkeypatch.setenv("VLLM_SPARSE_CACHE", str(tmp_path))
    with pytest.raises(RuntimeError, match="is not shipped yet"):
        get_model.get_model("smollm2-135m-anchor")
    shutil.copytree(model_folder, tmp_path / "SmolLM2-135M-Instruct")
    for arm, name in (("anchor", "anchor"), ("control", "anchor-control")):
        shutil.copytree(runs[arm] / "checkpoint", tmp_path / f"smollm2-135m-{name}")
        made = get_model.get_model(f"smollm2-135m-{name}")
        assert (made / FILE).exists() == (arm == "anchor")


def test_checkpoints_fit_16_mib():
    """Of SmolLM2-135M, by the defaults."""
    args = anchor.arguments_of(["model", "--data", "data", "--out", "out"])
    weights = {
        f"{i}.{name}.weight": torch.Size(size)
        for i in range(30)
        for name, size in {
            "q_proj": (576, 576),
            "k_proj": (192, 576),
            "v_proj": (192, 576),
            "o_proj": (576, 576),
            "gate_proj": (1536, 576),
            "up_proj": (1536, 576),
            "down_proj": (576, 1536),
        }.items()
    }
    shapes = lora.factor_shapes(weights, args.rank, args.modules)
    assert len(shapes) == 2 * len(weights)
    assert 2 * sum(map(math.prod, shapes.values())) < 15 * 2**20


@pytest.mark.gpu
def test_gpus_train_with_masks(model_folder):
    """In bf16, with grouped heads and a lower layer: near what fp32 gives."""
    ids, found = windows(2, 1024), []
    drawn: dict[str, torch.Tensor] = {}
    for device in ("cpu", "cuda"):
        model = load_model(model_folder, torch.device(device))
        lora.add_lora(model, 4, 8.0)
        parameters = lora.factors(model)
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(drawn.setdefault(name, torch.randn(p.shape) * 0.05))
        anchored = Anchored(model, AnchorConfig(ENDS, True, {2: 0}))
        here = ids.to(device)
        hidden = anchored(here, torch.arange(1024, device=device)[None])
        loss = torch.nn.functional.cross_entropy(
            (hidden[:, :-1] @ model.lm_head.weight.T).float().flatten(0, 1),
            here[:, 1:].flatten(),
        )
        loss.backward()
        gradients = [p.grad.flatten().cpu() for p in parameters.values()]
        found.append((loss.item(), torch.cat(gradients)))
    assert found[1][0] == pytest.approx(found[0][0], rel=0.02)
    alike = torch.nn.functional.cosine_similarity(found[0][1], found[1][1], dim=0)
    assert alike > 0.98
