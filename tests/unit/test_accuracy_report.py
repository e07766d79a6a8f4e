# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Metrics of accuracy, and reports of several result files."""

import json
import math
from random import Random

import pytest

from benchmarks.accuracy import metrics, report
from benchmarks.accuracy.metrics import ForcedResult
from benchmarks.accuracy.report import joined, markdown


def test_kl_is_zero_for_itself_and_a_lower_bound_otherwise():
    rng = Random(0)

    def full():
        weights = [rng.expovariate(1) ** 3 for _ in range(100)]
        return [w / sum(weights) for w in weights]

    def top(p):
        best = sorted(range(100), key=lambda t: -p[t])[:20]
        return ForcedResult([0.0] * 2, [{t: math.log(p[t]) for t in best}] * 2)

    for _ in range(50):
        p, q = full(), full()
        true = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        assert metrics.kl_nats(top(p), top(p)) == pytest.approx(0, abs=1e-9)
        assert 0 < metrics.kl_nats(top(q), top(p)) <= true


def test_first_forced_token_does_not_count():
    top = [{1: -0.1, 2: -3.0}, {1: -0.1, 2: -3.0}]
    result = ForcedResult([-100.0, -math.log(2)], top)
    assert metrics.bits_per_char(result, 2) == pytest.approx(0.5)
    assert metrics.top1(result, [2, 1]) == 1.0


def result(
    cache: str, methods: dict[str, float], model="m", texts="t", **differ
) -> dict:
    """Two samples of a task; bits of each by method."""
    record = {"task": "code", "length": 64, "budget": None, "kv_share": 0.5} | differ
    plain = {"top1": 1.0, "agreement": 1.0, "kl": 0.0}
    records = [
        record
        | {"method": name}
        | {"samples": [plain | {"index": i, "bits_per_char": b + i} for i in range(2)]}
        for name, b in methods.items()
    ]
    header = {
        "engine": {"model": model, "dtype": "bfloat16", "kv_format": cache},
        "machine": {"cpu": "c", "cores": 2},
        "versions": {"vllm": "0"},
        "commit": "0",
        "plan": {"samples": 2},
        "texts": texts,
    }
    return {"header": header, "records": records}


FIRST = result("auto", {"dense": 1.0, "sparq": 1.5})


def test_files_are_paired_with_the_dense_records_of_the_first():
    second = result("int8", {"dense": 2.0, "sparq": 1.25})
    table = markdown(joined([FIRST, second])["records"])
    assert "| dense | – | 0.500 | 1.500 |" in table
    assert "| dense, int8 | – | 0.500 | +1.000 ± 0.000 |" in table
    assert "| sparq, int8 | – | 0.500 | +0.250 ± 0.000 |" in table


def test_methods_that_differ_in_top_p_alone_share_a_line():
    line = lambda method: report._line({"method": method, "budget": None})
    assert line("sparq:rank=16:top_p=0.8, k8v4") == "sparq:rank=16, k8v4, top_p"
    assert line("sparq:top_p=0.8:rank=16") == line("sparq:top_p=9e-1:rank=16")
    assert line("sparq:rank=16") == "sparq:rank=16"


def test_files_that_cannot_be_paired_are_refused():
    for other in ({"model": "n"}, {"texts": "u"}):
        with pytest.raises(ValueError, match="samples differ: one file is of m on t"):
            joined([FIRST, result("int8", {"dense": 2.0}, **other)])
    longer = result("int8", {"dense": 2.0}, length=128)
    with pytest.raises(ValueError, match="no dense baseline .* code at 128 tokens"):
        joined([FIRST, longer])
    assert len(joined([FIRST, longer], lengths=[64])["records"]) == 2
    more = result("int8", {"dense": 2.0})
    more["records"][0]["samples"][1]["index"] = 7
    with pytest.raises(ValueError, match="no dense baseline for all samples"):
        joined([FIRST, more])
    skipped = result("int8", {"quest": 1.0})
    del skipped["records"][0]["samples"]
    assert len(joined([FIRST, skipped])["records"]) == 3


def test_the_command_reads_several_files(tmp_path, monkeypatch, capsys):
    paths = [tmp_path / "one.json", tmp_path / "two.json"]
    for path, data in zip(paths, (FIRST, result("int8", {"sparq": 1.25}))):
        path.write_text(json.dumps(data))
    argv = ["report", *map(str, paths), "--plots", str(tmp_path), "--tasks"]
    monkeypatch.setattr("sys.argv", [*argv, "code"])
    report.main()
    assert "| sparq, int8 | – |" in capsys.readouterr().out
    assert (tmp_path / "one.png").stat().st_size > 1000
    monkeypatch.setattr("sys.argv", [*argv, "coed"])
    with pytest.raises(SystemExit):
        report.main()
    assert "no record is of these tasks and lengths" in capsys.readouterr().err
