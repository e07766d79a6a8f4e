# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""What the doctor says of models and machines; no engine is started."""

import json
import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from vllm_sparse.anchor_config import AnchorConfig
from vllm_sparse.cache.lines import NEAR_BLOCKS
from vllm_sparse.config import SparseConfig
from vllm_sparse.tools.doctor import cli, environment, gain
from vllm_sparse.tools.doctor.environment import OK, Check
from vllm_sparse.tools.doctor.model import (
    DoctorError,
    inspect_model,
    parse_config,
    why_slow,
)
from vllm_sparse.tools.doctor.weights import weight_problems

FULL, SLIDING = "full attention", "sliding-window attention"

LLAMA = dict(
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    hidden_size=1024,
    intermediate_size=2048,
    num_attention_heads=8,
    num_key_value_heads=2,
    num_hidden_layers=4,
    max_position_embeddings=65536,
    vocab_size=512,
    torch_dtype="bfloat16",
)
GEMMA = LLAMA | dict(
    architectures=["Gemma3ForCausalLM"],
    model_type="gemma3_text",
    head_dim=256,
    sliding_window=512,
    layer_types=["sliding_attention"] * 3 + ["full_attention"],
)
MISTRAL = LLAMA | dict(
    architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=4096
)
MLA = LLAMA | dict(
    architectures=["DeepseekV2ForCausalLM"],
    model_type="deepseek_v2",
    kv_lora_rank=512,
    q_lora_rank=None,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    num_key_value_heads=8,
)


@pytest.fixture
def folder(tmp_path):
    def write(config: dict) -> str:
        (tmp_path / "config.json").write_text(json.dumps(config))
        return str(tmp_path)

    return write


def save_weights(folder: str, size: int = 16) -> Path:
    """A file of one tensor of ``size`` bytes."""
    import torch
    from safetensors.torch import save_file

    file = Path(folder) / "model.safetensors"
    save_file({"weight": torch.zeros(size, dtype=torch.uint8)}, file)
    return file


def inspect(name: str, **options):
    return inspect_model(name, "sparq", SparseConfig(**options))


def kinds(model) -> list[tuple]:
    return [(k.kind, k.count, k.ours, k.dense) for k in model.layers]


def test_every_layer_of_a_plain_model_is_sparse(folder):
    model = inspect(folder(LLAMA))
    assert kinds(model) == [(FULL, 4, True, None)]
    assert (model.head_size, model.num_heads, model.num_kv_heads) == (128, 8, 2)
    assert model.max_model_len == 65536 and model.refusal is None
    split = inspect_model(folder(LLAMA), "sparq", SparseConfig(), 2)
    assert (split.num_heads, split.num_kv_heads) == (4, 1)


def test_memory_where_old_lines_leave_anchors(folder):
    name = folder(LLAMA)
    config = parse_config("anchor", {})
    assert "no anchors.json" in inspect_model(name, "anchor", config).refusal
    AnchorConfig((5,)).write(Path(name))
    model = inspect_model(name, "anchor", config)
    assert kinds(model) == [(FULL, 4, True, None)] and model.refusal is None
    got = gain.memory(model, config)
    assert 7.5 < got.bytes_per_token_dense / got.bytes_per_token <= 8
    assert got.held_bytes >= (NEAR_BLOCKS + 2) * 128 * got.bytes_per_token_dense
    expected = gain.expected_gain(model, config, "cpu", 65536, 1)
    assert expected.tokens_kept == 384 + (65536 - 384) // 8


def test_later_models_of_the_process_get_real_rotary_tables(folder):
    """vLLM keeps them for the whole process, and the doctor's have no data."""
    from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT

    before = dict(_ROPE_DICT)
    inspect(folder(LLAMA | {"rope_theta": 12345.0}))
    assert before == _ROPE_DICT


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            dict(dense_layers=3),
            [(FULL, 3, True, "sparse.dense_layers"), (FULL, 1, True, None)],
        ),
        (dict(selector="dense"), [(FULL, 4, True, "sparse.selector")]),
    ],
)
def test_layers_that_options_make_dense(folder, options, expected):
    assert kinds(inspect(folder(LLAMA), **options)) == expected


def test_sliding_window_layers_stay_vllms(folder):
    model = inspect(folder(GEMMA))
    assert kinds(model) == [(SLIDING, 3, False, "CPU_ATTN"), (FULL, 1, True, None)]
    model = inspect(folder(MISTRAL))
    assert kinds(model) == [(SLIDING, 4, False, "CPU_ATTN")]
    assert "serves 0 of 4 attention layers" in model.refusal


def test_few_layers_of_ours_are_a_warning(folder, monkeypatch):
    from vllm_sparse.plugin import served

    said: list[str] = []
    monkeypatch.setattr(served.logger, "warning", lambda s, *a: said.append(s % a))
    inspect(folder(LLAMA))
    assert not said
    inspect(folder(GEMMA), top_p=0.9)
    others = "dense are 3 x sliding-window attention: CPU_ATTN"
    assert said == [f"sparq serves 1 of 4 attention layers ({others})"]


@pytest.mark.parametrize(
    ("config", "options", "says"),
    [
        (MLA, {}, "MLA"),
        (LLAMA | dict(head_dim=112), {}, "head size 112, which is not one of"),
        (LLAMA, dict(rank=200), "rank = 200 exceeds"),
        (LLAMA, dict(kv_format="int4", kv_group_size=48), "kv_group_size = 48"),
    ],
)
def test_refusals_are_those_of_the_engine(folder, config, options, says):
    model = inspect(folder(config), **options)
    assert says in model.refusal


def test_questions_without_an_answer(folder):
    with pytest.raises(DoctorError, match="cannot be split"):
        inspect_model(folder(LLAMA), "sparq", SparseConfig(), 3)
    with pytest.raises(DoctorError, match="Did you mean 'top_k'"):
        parse_config("sparq", {"sparse": {"topk": 1}})
    assert parse_config("twilight", {}).top_p == 0.9


def test_contexts_that_the_model_does_not_take(folder, capsys):
    assert cli.main(["--model", folder(LLAMA), "--context", "8192", "999999"]) == 1
    assert "tokens at most" in capsys.readouterr().out


def test_gain_is_the_ratio_of_bytes(folder):
    model = inspect(folder(LLAMA))
    config = SparseConfig(rank=32, top_k=1024, dense_below=4096)
    got = gain.expected_gain(model, config, "cpu", 32768, 16)
    items = 16 * 2 * 4  # rows, KV heads, layers
    assert got.tokens_kept == got.tokens_kept_most == 1024
    assert got.kv_bytes_dense == items * 32768 * 512
    codes = 256 * 32 * (64 + 4)  # sealed blocks, channels, bytes of one
    assert got.kv_bytes_sparse == items * (codes + 1024 * 512)
    assert got.attention_gain == got.kv_bytes_dense / got.kv_bytes_sparse
    assert got.step_gain is None
    short = gain.expected_gain(model, config, "cpu", 4000, 1)
    assert short.tokens_kept == 4000 and short.attention_gain == 1


def test_gain_with_weights_and_adaptive_budgets(folder):
    name = folder(LLAMA)
    save_weights(name, 1000)
    model = inspect(name)
    config = parse_config("twilight", {"sparse": {"max_tokens": 2048}})
    got = gain.expected_gain(model, config, "cuda", 32768, 1)
    assert (got.tokens_kept, got.tokens_kept_most) == (128, 2048)
    assert got.kv_bytes_sparse < got.kv_bytes_sparse_most
    both = (model.weight_bytes + got.kv_bytes_dense) / (
        model.weight_bytes + got.kv_bytes_sparse
    )
    assert got.step_gain == both


def test_budgets_of_a_model_with_qk_norm(folder, monkeypatch, capsys):
    monkeypatch.setattr(cli, "check_environment", lambda: [Check("vLLM", OK, "0")])
    monkeypatch.setattr(logging, "disable", lambda level: None)
    qwen = dict(architectures=["Qwen3ForCausalLM"], model_type="qwen3")
    given = ["--additional-config", '{"sparse": {"top_k": 0.125}}']

    def shown(config: dict, *argv: str) -> str:
        save_weights(folder(config))
        command = ["--model", folder(config), "--context", "8192", *argv]
        assert cli.main(command) == 0
        return capsys.readouterr().out

    def report(config: dict, *argv: str) -> dict:
        text = shown(config, "--json", *argv)
        return json.loads(text[text.index('{\n "checks"') :])

    normed = report(LLAMA | qwen)
    assert normed["adapts_by_itself"] and normed["options"]["top_p"] == 0.9
    kept = normed["gains"][0]
    assert (kept["tokens_kept"], kept["tokens_kept_most"]) == (128, 8191)
    worst, best = (
        kept["kv_bytes_dense"] / kept[name]
        for name in ("kv_bytes_sparse_most", "kv_bytes_sparse")
    )
    said = shown(LLAMA | qwen)
    assert worst < 1 < best and f" {worst:.2f} to {best:.2f} x " in said
    said = " ".join(said.split())
    assert "budgets adapt (top_p 0.9)" in said and "sparse.rank = 128" in said
    said = " ".join(shown(LLAMA | qwen, *given).split())
    assert "4 of 4 sparse layers norm" in said and "have a fixed budget" in said
    assert " to " not in said[said.index("with weights") : said.index("Serve it")]
    assert "QK-norm" not in shown(LLAMA)
    for other in (report(LLAMA | qwen, *given), report(LLAMA)):
        assert not other["adapts_by_itself"]
        assert (other["options"]["top_k"], other["options"]["top_p"]) == (0.125, None)
        kept = other["gains"][0]
        assert kept["tokens_kept"] == kept["tokens_kept_most"] == 1024


def test_a_request_of_less_holds_its_states(folder):
    """8 x (D + 1) numbers in fp32 behind each block's rows, in every KV head."""
    model = inspect(folder(LLAMA))
    sparse = {"sparse": {"local_window": 256}}
    less = {"sparse": {"local_window": 256, "checkpoint": "/somewhere"}}
    plain = gain.memory(model, parse_config("streaming", sparse))
    held = gain.memory(model, parse_config("less", less))
    (layers,) = model.served
    blocks = 1 + 2 + 1 + 1  # sinks, window, the current one, the one behind
    states = blocks * layers.count * layers.num_kv_heads * 4 * 8
    states *= layers.head_size + 1
    more = held.most_bytes - plain.most_bytes
    assert states <= more < 1.1 * states


def test_gain_of_lossless_speculation(folder):
    """One request at 32K of an 8B model: weights are read too often; 16 pay."""
    model = inspect(folder(LLAMA | dict(num_hidden_layers=64, num_key_value_heads=4)))
    model = replace(model, weight_bytes=16 * 2**30)
    config = SparseConfig(lossless=True, top_k=1024, dense_below=4096)
    one, many = (
        gain.lossless_gain(model, config, "cuda", 32768, batch) for batch in (1, 16)
    )
    step = gain.expected_gain(model, config, "cuda", 32768, 16)
    assert many.draft_bytes == model.weight_bytes + step.kv_bytes_sparse
    assert many.verify_bytes == model.weight_bytes + step.kv_bytes_dense
    assert many.tokens == pytest.approx(1 + 0.95 + 0.95**2 + 0.95**3 + 0.95**4)
    cycle = 4 * many.draft_bytes + many.verify_bytes
    assert many.gain == many.tokens * many.verify_bytes / cycle
    assert many.verdict == "pays" and many.gain > 2
    assert one.verdict == "does not pay" and one.gain < gain.PAYS_FROM
    copied = replace(config, draft_weights="fp8")
    less = gain.lossless_gain(model, copied, "cuda", 32768, 1)
    assert less.draft_bytes < one.draft_bytes and less.gain > one.gain
    assert less.verify_bytes == one.verify_bytes
    short = gain.lossless_gain(model, config, "cuda", 8000, 16)
    assert short.verdict == "no drafts below 8,192"
    unknown = replace(model, weight_bytes=None)
    unknown = gain.lossless_gain(unknown, config, "cuda", 32768, 16)
    assert unknown.gain is None and unknown.verdict == "unknown"


def test_verifications_read_quantised_blocks(folder):
    model = replace(inspect(folder(LLAMA)), weight_bytes=2**20)
    config = SparseConfig(lossless=True, kv_format="int8")
    got = gain.lossless_gain(model, config, "cpu", 32768, 16)
    dense = gain.expected_gain(model, config, "cpu", 32768, 16).kv_bytes_dense
    assert 0.5 < (got.verify_bytes - 2**20) / dense < 0.6


@pytest.mark.parametrize(("kv_format", "least"), [("auto", 0.8), ("int4", 3.0)])
def test_memory_is_what_the_engine_allocates(folder, kv_format, least):
    model = inspect(folder(LLAMA))
    got = gain.memory(model, SparseConfig(kv_format=kv_format))
    assert got.bytes_per_token_dense == 4 * 2 * 512
    assert got.bytes_per_token_dense / got.bytes_per_token > least
    assert (got.held_bytes > 0) == (kv_format == "int4")


def test_a_plugin_left_out_is_a_problem(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "something_else")
    found = {check.name: check for check in environment.check_environment()}
    assert found["vllm.general_plugins"].status == environment.PROBLEM
    assert "VLLM_PLUGINS" in found["vllm.general_plugins"].detail
    assert found["kernels' results"].status == environment.OK


def test_weights_that_cannot_be_loaded(folder):
    name = folder(LLAMA)
    assert "holds no weights" in "".join(weight_problems(name))
    file = save_weights(name)
    assert not list(weight_problems(name))
    whole = file.read_bytes()
    for kept, says in ((len(whole) - 1, "should have"), (20, "within its header")):
        file.write_bytes(whole[:kept])
        assert says in "".join(weight_problems(name))
    file.write_bytes(whole)
    index = {"weight_map": {"a": "model.safetensors", "b": "other.safetensors"}}
    (Path(name) / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "names other.safetensors" in "".join(weight_problems(name))
    for broken in ("[]", '{"weight_map'):
        (Path(name) / "model.safetensors.index.json").write_text(broken)
        assert "not an index" in "".join(weight_problems(name))
    (Path(name) / "model.safetensors.index.json").unlink()
    file.write_bytes((2).to_bytes(8, "little") + b"[]")
    assert "not a safetensors file" in "".join(weight_problems(name))
    file.rename(Path(name) / "training_args.bin")
    assert "holds no weights" in "".join(weight_problems(name))
    assert not list(weight_problems("some/model-of-the-hub"))


def test_the_command(folder):
    command = [sys.executable, "-m", "vllm_sparse", "doctor", "--json", "--model"]
    command += [folder(LLAMA), "--context", "8192", "--batch", "4"]
    save_weights(command[-5])
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert all(check["status"] != "problem" for check in report["checks"])
    assert report["arguments"] == ["--attention-backend", "sparq"]
    assert report["refused"] is None and len(report["gains"]) == 1


def test_the_table_of_lossless_speculation(folder, monkeypatch, capsys):
    monkeypatch.setattr(cli, "check_environment", lambda: [Check("vLLM", OK, "0")])
    monkeypatch.setattr(logging, "disable", lambda level: None)
    name = folder(LLAMA)
    save_weights(name, 2**25)
    command = ["--model", name, "--context", "4096", "32768"]
    for lossless in (False, True):
        options = json.dumps({"sparse": {"lossless": lossless}})
        assert cli.main([*command, "--additional-config", options]) == 0
        shown = capsys.readouterr().out
        assert ("draft step  verification  gain by bytes" in shown) == lossless
    assert "4 drafts, then a dense verification, which gives 4.52 tokens" in shown
    assert "bytes promise too much" in shown
    assert [line.split()[-1] for line in shown.splitlines() if " x  " in line][-2:] == [
        "unknown",
        "unknown",
    ]


@pytest.mark.parametrize(
    ("changes", "options", "said"),
    [
        ({}, {}, None),
        ({}, {"kv_format": "k8v4"}, None),
        ({"head_dim": 256}, {}, "head size 256"),
        ({"num_attention_heads": 32, "head_dim": 64}, {}, "16 query heads"),
        ({}, {"kv_format": "int4"}, "kv_format int4"),
        ({"head_dim": 256}, {"selector": "dense"}, None),
        ({"head_dim": 80}, {"kv_format": "k8v4"}, "kv_format k8v4 with head size 80"),
        ({"num_attention_heads": 2, "head_dim": 64}, {}, "mean_value"),
    ],
    ids=str,
)
def test_what_gpus_serve_by_slower_kernels(folder, changes, options, said):
    config = parse_config("sparq", {"sparse": options})
    model = inspect_model(str(folder(LLAMA | changes)), "sparq", config)
    found = {why_slow(layers, config) for layers in model.layers} - {None}
    assert len(found) == (said is not None)
    assert said is None or said in found.pop()


@pytest.mark.parametrize("config", [MLA, LLAMA | dict(num_attention_heads=3)])
def test_status_of_what_would_not_start(folder, config, monkeypatch, capsys):
    monkeypatch.setattr(cli, "check_environment", lambda: [Check("vLLM", OK, "0")])
    monkeypatch.setattr(logging, "disable", lambda level: None)
    assert cli.main(["--model", folder(config), "-tp", "2"]) == 1
    shown = capsys.readouterr().out
    assert "REFUSED" in shown or "PROBLEM" in shown
    assert "Serve it with" not in shown
