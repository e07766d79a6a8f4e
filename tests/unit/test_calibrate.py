# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Calibration without an engine: what is measured, chosen and written."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.ops.inputs import (
    filled,
    list_buffers,
    random_query,
    sparq_options,
)
from vllm_sparse.config import SparseConfig
from vllm_sparse.methods import LayerShape
from vllm_sparse.methods.sparq import Sparq
from vllm_sparse.ops import reference
from vllm_sparse.tools.calibrate import cli as command
from vllm_sparse.tools.calibrate import plot
from vllm_sparse.tools.calibrate.choose import (
    Measurements,
    dense_prefix,
    grid,
    outcome,
    propose,
)
from vllm_sparse.tools.calibrate.measure import Setting, measure_row, read_context
from vllm_sparse.tools.calibrate.report import additional_config, full_report, table
from vllm_sparse.tools.calibrate.run import CalibrationError, Plan, read_text, windows


@pytest.mark.parametrize(
    "soft_cap, group, mean_value", [(0.0, 3, False), (20.0, 1, True)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_measured_as_the_reference_serves_it(
    soft_cap, group, mean_value, dtype
):
    kv_heads, head_size, lens = 2, 64, [700, 384, 300]
    ctx = filled(lens, kv_heads, head_size, dtype)
    query = random_query(ctx, group * kv_heads, dtype)
    shape = LayerShape(group * kv_heads, kv_heads, head_size, dtype, 0.2, soft_cap)
    config = SparseConfig(min_tokens=40, local_window=16, dense_below=0)
    config = replace(config.resolve(head_size, group), mean_value=mean_value)
    settings = [Setting(rank, p) for rank in (16, 64) for p in (0.3, 0.8, 0.95)]
    found = []
    for row, length in enumerate(lens):
        context = read_context(ctx.kv_cache, ctx.block_table[row], length, shape)
        grouped = query[row].float().unflatten(0, (kv_heads, group))
        found.append(measure_row(grouped, context, shape, config, settings))
    dense = attention(ctx, query, shape, None)
    for i, setting in enumerate(settings):
        options = sparq_options(
            rank=setting.rank,
            top_p=setting.top_p,
            min_tokens=40,
            scale=0.2,
            soft_cap=soft_cap,
        )
        lists = list_buffers(ctx, query.shape[1], max(lens))
        most = torch.tensor(lens, dtype=torch.int32) - 1
        where = (query, ctx.kv_cache, ctx.block_table, ctx.seq_lens)
        reference.sparq_attend(*where, most, options, **lists)
        if not mean_value:
            lists["kept_mass"] = None
        out = attention(ctx, query, shape, lists)
        cost = Sparq(replace(config, rank=setting.rank), shape, None).score_bytes
        for row, length in enumerate(lens):
            got = found[row]
            assert got.kept[i] == lists["counts"][row].tolist()
            error = (out[row] - dense[row]).norm() / dense[row].norm()
            assert got.error[i] == pytest.approx(error.item(), rel=1e-3)
            scores = kv_heads * cost.of_row(length)
            row_bytes = shape.layout.row_bytes
            assert got.read[i] == sum(got.kept[i]) * row_bytes + scores
            assert got.dense == length * kv_heads * row_bytes
    assert min(found[0].kept[0]) < 0.9 * lens[0]  # something was left out


def attention(ctx, query, shape, lists) -> torch.Tensor:
    """[rows, num_heads, head_size] fp32, by the reference."""
    out = torch.empty(query.shape)
    lists = lists or dict(indices=None, counts=None, kept_mass=None)
    reference.attend(
        query,
        ctx.kv_cache,
        ctx.block_table,
        ctx.seq_lens,
        **lists,
        scale=shape.scale,
        soft_cap=shape.soft_cap,
        out=out,
    )
    return out


def measurements(error: list[float], share: list[list[float]]) -> Measurements:
    """Two rows of 1,000 and 2,000 tokens; per setting its error and the share that
    each layer keeps, in both of its heads. Bytes are tokens."""
    settings = [Setting(16, (80 + i) / 100) for i in range(len(error))]
    seq_lens = torch.tensor([1000.0, 2000.0], dtype=torch.float64)
    kept = (
        seq_lens[:, None, None] * torch.tensor(share, dtype=torch.float64).T
    )  # rows, layers, settings
    kept = kept[..., None].expand(-1, -1, -1, 2)
    layers = len(share[0])
    return Measurements(
        settings=settings,
        layers=list(range(layers)),
        seq_lens=seq_lens,
        kept=kept,
        error=torch.tensor(error, dtype=torch.float64).expand(2, layers, -1),
        read=kept.sum(-1),
        dense=2 * seq_lens[:, None].expand(-1, layers),
    )


def test_the_fewest_bytes_among_good_settings_win():
    found = measurements([0.10, 0.04, 0.03], [[0.1, 0.1], [0.3, 0.3], [0.2, 0.2]])
    assert propose(found, 0.05).top_p == 0.82
    assert propose(found, 0.1).top_p == 0.80
    assert propose(found, 0.02) is None
    tried = outcome(found, 1)
    assert tried.read == pytest.approx(0.3)
    assert tried.kept == pytest.approx(450)
    assert (tried.error, tried.worst_error) == pytest.approx((0.04, 0.04))


def test_leading_layers_that_keep_most_become_dense():
    found = measurements([0.04], [[0.8, 0.6, 0.2, 0.9]])
    assert dense_prefix(found, 0) == 2
    point = propose(found, 0.05)
    assert point.dense_layers == 2
    assert point.error == pytest.approx(0.02)  # two of four layers are exact
    assert point.read == pytest.approx((1 + 1 + 0.2 + 0.9) / 4)
    assert point.worst_layer == 2
    # A model whose first layers are not ours: dense_layers counts all of them.
    assert dense_prefix(replace(found, layers=[1, 3, 5, 7]), 0) == 4


def test_a_model_that_is_dense_everywhere():
    point = propose(measurements([0.0], [[0.9, 0.8]]), 0.05)
    assert (point.dense_layers, point.read, point.kept) == (2, 1.0, 0.0)


@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 256])
def test_the_grid_is_allowed(head_size):
    settings = grid(head_size)
    assert len(set(settings)) == len(settings) == 16
    for setting in settings:
        options = {"rank": setting.rank, "top_p": setting.top_p}
        config = SparseConfig.from_additional_config({"sparse": options})
        assert config.resolve(head_size, 4).rank <= head_size


def test_the_json_is_what_the_options_parser_takes():
    point = propose(measurements([0.04], [[0.8, 0.2]]), 0.05)
    text = additional_config(point)
    assert json.loads(text) == {"sparse": {"top_p": 0.8, "rank": 16, "dense_layers": 1}}
    config = SparseConfig.from_additional_config(json.loads(text))
    assert (config.top_p, config.rank, config.dense_layers) == (0.8, 16, 1)


def test_the_report_holds_the_run():
    found = measurements([0.04, 0.01], [[0.8, 0.2], [0.9, 0.9]])
    report = full_report({"model": "m"}, found, propose(found, 0.05), 0.05)
    assert report["proposal"]["top_p"] == 0.8
    assert len(report["tried"]) == 2 and report["header"]["model"] == "m"
    assert report["kept_share"] == [[0.8, 0.8], [0.2, 0.2]]
    assert report["error_by_layer"] == [0.04, 0.04]
    json.dumps(report)
    assert "proposed:" in table(found, propose(found, 0.05))


def test_lengths_lie_all_over_the_window_and_are_never_dense():
    (lengths,) = Plan(4096, 1, 16).lengths(512)
    assert lengths == sorted(lengths) and len(set(n % 128 for n in lengths)) > 8
    assert 1024 <= lengths[0] < 1300 and 3900 < lengths[-1] <= 4094
    assert min(Plan(1024, 1, 4).lengths(512)[0]) >= 512
    with pytest.raises(CalibrationError, match="6144.*--max-model-len"):
        Plan(4096).lengths(6144)


def test_windows_cover_the_text():
    ids = list(range(100))
    assert [w[0] for w in windows(ids, 40, 3)] == [0, 30, 60]
    assert all(len(w) == 40 for w in windows(ids, 40, 3))
    assert windows(ids, 100, 1) == [ids]
    with pytest.raises(CalibrationError, match="100 tokens, fewer .* 101"):
        windows(ids, 101, 1)


def test_data_that_is_no_text_is_named(tmp_path):
    (tmp_path / "a").write_text("x")
    (tmp_path / "b").write_text("y")
    assert read_text([tmp_path / "a", tmp_path / "b"]) == "x\n\ny"
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for name in ("binary", "missing"):
        with pytest.raises(CalibrationError, match=name):
            read_text([tmp_path / name])


@pytest.fixture
def run(monkeypatch, tmp_path):
    """The command with measured figures instead of an engine; what it returns."""

    def result(*arguments: str) -> int:
        found = measurements([0.04], [[0.8, 0.2]])
        monkeypatch.setattr(command, "measure_model", lambda *_: (found, {}))
        monkeypatch.chdir(tmp_path)
        Path("text").write_text("x")
        return command.main(["model", "--data", "text", *arguments])

    return result


def test_the_command_writes_and_says_how_to_serve(run, capsys):
    pytest.importorskip("matplotlib")
    assert run("--plot", "kept.png", "--report", "report.json") == 0
    assert json.loads(Path("sparse.json").read_text())["sparse"]["rank"] == 16
    assert Path("kept.png").stat().st_size > 0
    assert json.loads(Path("report.json").read_text())["target_error"] == 0.05
    assert '--additional-config "$(cat sparse.json)"' in capsys.readouterr().out


def test_no_good_setting_fails_and_writes_nothing(run, capsys, tmp_path):
    options = ("--target-error", "0.01", "--report", "report.json")
    assert run(*options) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["text"]
    assert "0.040" in capsys.readouterr().err


def test_errors_come_before_the_long_part(run, capsys, monkeypatch):
    assert run("--output", "nowhere/sparse.json") == 2
    assert "nowhere" in capsys.readouterr().err
    monkeypatch.setattr(plot.importlib.util, "find_spec", lambda name: None)
    assert run("--plot", "kept.png") == 2
    assert "bench" in capsys.readouterr().err
    for bad in (("--target-error", "1.5"), ("--samples", "0")):
        with pytest.raises(SystemExit):
            run(*bad)
