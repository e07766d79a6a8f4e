# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""The whole command on a toy model, its checkpoint, and the model made of it."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from scripts import get_model
from vllm_sparse import checkpoint
from vllm_sparse.train import longcontext, lora
from vllm_sparse.train.__main__ import COMMANDS
from vllm_sparse.train.forward import hidden_states, load_model
from vllm_sparse.train.loop import STATE
from vllm_sparse.train.merge import KIND, merge

STEPS = 12
CPU = torch.device("cpu")


def command(model: Path, data: Path, out: Path, *more: str) -> list[str]:
    options = f"""--data {data} --out {out} --context 2560 --window 256 --steps {STEPS}
    --batch-tokens 512 --micro-tokens 256 --full-share 0.1 --warmup 2 --rank 4 --alpha 8
    --learning-rate 0.01 --synthetic 0.2 --evaluate-lengths 512 256 --evaluate-samples 2
    --evaluate-every 0 --save-every 4 --device cpu"""
    return [str(model), *options.split(), *more]


@pytest.fixture(scope="module")
def trained(model_folder, data_folder, tmp_path_factory) -> Path:
    """In two parts."""
    out = tmp_path_factory.mktemp("trained")
    longcontext.main(command(model_folder, data_folder, out, "--minutes", "0.01"))
    longcontext.main(command(model_folder, data_folder, out))
    return out


def report_of(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


def test_the_run_says_what_it_did(trained, model_folder):
    report = report_of(trained)
    assert report["finished"] and report["step"] == STEPS
    losses = [loss for _, loss, _ in report["losses"]]
    assert sum(losses[-4:]) < 0.97 * sum(losses[:4])
    before, after = report["evaluations"][0], report["evaluations"][-1]
    for kind in ("code", "prose"):
        assert after["perplexity"][kind]["256"] < before["perplexity"][kind]["256"]
    for needle in ("needle", "needle_code"):
        assert after[needle]["512"]["samples"] == 2
    recipe = report["recipe"]
    assert recipe["base_sha256"] == checkpoint.base_hash(model_folder)
    assert recipe["rope_theta"] > 10_000 and len(recipe["data_sha256"]) == 64


def test_other_options_do_not_go_on(trained, model_folder, data_folder, tmp_path):
    shutil.copy(trained / STATE, tmp_path)
    arguments = command(model_folder, data_folder, tmp_path, "--replay", "0.5")
    with pytest.raises(ValueError, match="differs in replay"):
        longcontext.main(arguments)


def test_a_run_can_begin_where_another_ended(
    trained, model_folder, data_folder, tmp_path
):
    start = trained / "checkpoint"
    given = (model_folder, data_folder, tmp_path / "on", "--start", str(start))
    longcontext.main([*command(*given), "--minutes", "0"])
    before, after = report_of(trained), report_of(tmp_path / "on")
    made = json.loads((start / checkpoint.DESCRIPTION).read_text())
    assert after["recipe"]["start_sha256"] == made["tensors_sha256"]
    assert after["step"] == 0 and "start_sha256" not in before["recipe"]
    # Factors are kept in 16 bits.
    ended, begun = (
        entry["perplexity"]["code"]["256"]
        for entry in (before["evaluations"][-1], after["evaluations"][0])
    )
    assert begun == pytest.approx(ended, rel=0.01)
    with pytest.raises(ValueError, match="made with other rank, alpha"):
        longcontext.main([*command(*given), "--rank", "2", "--alpha", "4"])


def test_merged_model_computes_what_was_trained(trained, model_folder, tmp_path):
    out = merge(trained / "checkpoint", model_folder, tmp_path / "merged")
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained(out)
    assert merged.config.max_position_embeddings == 2560
    theta = report_of(trained)["recipe"]["rope_theta"]
    rope = merged.config.rope_parameters
    assert rope == {"rope_type": "default", "rope_theta": theta} and theta > 10_000
    tuned = load_model(model_folder, CPU, theta)
    lora.add_lora(tuned, 4, 8.0)
    saved = load_file(trained / "checkpoint" / checkpoint.TENSORS)
    with torch.no_grad():
        for name, parameter in lora.factors(tuned).items():
            assert saved[name].dtype == torch.bfloat16
            parameter.copy_(saved[name])
    ids = torch.randint(0, 512, (1, 300))
    positions = torch.arange(300)[None] + 2000 * (torch.arange(300) > 200)
    logits = [
        hidden_states(m, ids, positions) @ m.lm_head.weight.T for m in (merged, tuned)
    ]
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)
    base = load_model(model_folder, CPU)
    untrained = hidden_states(base, ids, positions) @ base.lm_head.weight.T
    assert (untrained - logits[0]).abs().max() > 0.1
    described = json.loads((out / "tokenizer_config.json").read_text())
    assert described["model_max_length"] == 2560
    with pytest.raises(ValueError, match="merged exists: give another --out"):
        merge(trained / "checkpoint", model_folder, out)


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def test_configs_of_older_transformers_are_edited_where_they_say_it(
    trained, model_folder, tmp_path
):
    old = Path(shutil.copytree(model_folder, tmp_path / "old"))
    edit_config(old, rope_parameters=None, rope_theta=10_000.0)
    out = merge(trained / "checkpoint", old, tmp_path / "merged")
    config = json.loads((out / "config.json").read_text())
    assert config["rope_theta"] == report_of(trained)["recipe"]["rope_theta"]
    assert "rope_parameters" not in config


def test_scaled_rope_and_other_architectures_are_refused(model_folder, tmp_path):
    other = Path(shutil.copytree(model_folder, tmp_path / "other"))
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    edit_config(other, rope_parameters=scaled)
    with pytest.raises(ValueError, match="has linear RoPE; only plain RoPE"):
        load_model(other, CPU, 1e5)
    edit_config(other, model_type="qwen2")
    with pytest.raises(ValueError, match="is a qwen2; only llama and qwen3"):
        load_model(other, CPU)


def test_get_model_merges_a_shipped_checkpoint(
    trained, model_folder, tmp_path, monkeypatch
):
    """The newest one; and says so where none is shipped."""
    name = "smollm2-135m-32k"
    monkeypatch.setattr(get_model, "CHECKPOINTS", tmp_path)
    monkeypatch.setenv("VLLM_SPARSE_CACHE", str(tmp_path))
    with pytest.raises(RuntimeError, match="is not shipped yet: .*docs/training.md"):
        get_model.get_model(name)
    shutil.copytree(model_folder, tmp_path / "SmolLM2-135M-Instruct")
    shutil.copytree(trained / "checkpoint", tmp_path / name)
    made = get_model.get_model(name)
    config = json.loads((made / "config.json").read_text())
    assert config["max_position_embeddings"] == 2560 and made.parent == tmp_path
    stamp = (made / "config.json").stat().st_mtime_ns
    assert get_model.get_model(name) == made
    assert (made / "config.json").stat().st_mtime_ns == stamp
    edit(tmp_path / name, tensors_sha256="1" * 64)
    with pytest.raises(ValueError, match="is damaged"):
        get_model.get_model(name)


@pytest.fixture
def copied(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained / "checkpoint", tmp_path / "copied"))


def edit(folder: Path, **changes) -> None:
    path = folder / checkpoint.DESCRIPTION
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(folder: Path, model: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        merge(folder, model, folder / "out")
    assert not (folder / "out").exists()


def test_other_kinds_and_formats_are_refused(copied, model_folder):
    edit(copied, kind="less")
    refused(copied, model_folder, "holds a less checkpoint, not longcontext")
    edit(copied, format=2, kind=KIND)
    refused(copied, model_folder, "has checkpoint format 2, this version reads 1")


def test_other_bases_are_refused(copied, model_folder, tmp_path):
    """One changed weight is enough; files split otherwise are the same model."""
    other = Path(shutil.copytree(model_folder, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    names = sorted(weights)
    (other / "model.safetensors").unlink()
    for i, part in enumerate((names[::2], names[1::2])):
        save_file({n: weights[n] for n in part}, other / f"model-{i}.safetensors")
    assert checkpoint.base_hash(other) == checkpoint.base_hash(model_folder)
    weights[names[0]][0] += 1
    save_file({n: weights[n] for n in names[::2]}, other / "model-0.safetensors")
    refused(copied, other, "other weights: give the folder of that model")


def test_damaged_or_mixed_up_files_are_refused(copied, model_folder):
    path = copied / checkpoint.TENSORS
    tensors = load_file(path)
    changed = {name: tensor[:2].contiguous() for name, tensor in tensors.items()}
    save_file(changed, path)
    refused(copied, model_folder, "is damaged: copy the folder again")
    edit(copied, tensors_sha256=checkpoint.sha256(path))
    refused(copied, model_folder, r"has shape \(2, .*copy all of them again")
    del tensors[next(iter(tensors))]
    save_file(tensors, path)
    edit(copied, tensors_sha256=checkpoint.sha256(path))
    refused(copied, model_folder, r"has shape none")


def test_no_checkpoint_is_an_error(model_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        merge(tmp_path, model_folder, tmp_path / "out")


def test_every_command_has_help(capsys):
    from importlib import import_module

    for module in COMMANDS.values():
        with pytest.raises(SystemExit) as end:
            import_module(f"vllm_sparse.train.{module}").main(["--help"])
        assert end.value.code == 0
        assert "needs" in capsys.readouterr().out.lower()


@pytest.mark.slow
def test_three_parts_from_one_command(model_folder, data_folder, tmp_path):
    """As the shipped model was trained, at toy size."""
    script = Path(__file__).parents[2] / "scripts" / "train_32k.sh"
    given = command(model_folder, data_folder, tmp_path, "--steps", "2")
    options = given[given.index("--context") :]
    for name in ("--full-share", "--synthetic"):  # the parts' own
        at = options.index(name)
        del options[at : at + 2]
    environment = os.environ | {
        "OPTIONS": " ".join(options),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    folders = [str(folder) for folder in (model_folder, data_folder, tmp_path)]
    run = partial(subprocess.run, [script, *folders], timeout=300)
    stopped = {"OPTIONS": environment["OPTIONS"] + " --minutes 0"}
    assert run(env=environment | stopped).returncode == 1
    assert not (tmp_path / "long").exists()
    run(check=True, env=environment)
    parts = [tmp_path / name / "checkpoint" for name in ("short", "long", "full")]
    found = [json.loads((p / checkpoint.DESCRIPTION).read_text()) for p in parts]
    assert [part["recipe"]["full_share"] for part in found] == [0.15, 0.6, 0.8]
    for before, after in pairwise(found):
        assert after["recipe"]["start_sha256"] == before["tensors_sha256"]
