# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""What the serving benchmarks compute around their engines."""

import io
import json
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")
from benchmarks.serving import load, plot_load, tensor_parallel  # noqa: E402
from benchmarks.serving.decode import Timed, make_prompts  # noqa: E402
from benchmarks.serving.processes import running  # noqa: E402
from benchmarks.serving.results import save  # noqa: E402
from benchmarks.serving.tensor_parallel import compare  # noqa: E402


def step(token: str, **best: float) -> dict:
    return {"token": token, "best": best}


def test_texts_are_compared_up_to_where_they_part():
    want = [[step("a", a=-0.1, b=-3.0), step("c", c=-0.5, d=-0.6), step("e", e=0.0)]]
    got = [[step("a", a=-0.3, b=-3.1), step("d", c=-0.7, d=-0.6), step("x", x=0.0)]]
    found = compare(got, want)
    assert found["equal"] == pytest.approx(1 / 3)
    assert (found["parted"], found["of"]) == (1, 1)
    assert found["gap"] == pytest.approx(0.1)
    assert found["rounding"] == pytest.approx(0.2)
    assert compare(want, want) == {
        "equal": 1.0,
        "parted": 0,
        "of": 1,
        "gap": 0.0,
        "rounding": 0.0,
    }


def test_a_token_that_one_rank_did_not_consider_is_unknown_far_away():
    found = compare([[step("z", z=0.0)]], [[step("a", a=0.0)]])
    assert found["gap"] is None


class FakeClient:
    """Answers with the rate it was asked for; all at once is 4 requests a second."""

    def __init__(self) -> None:
        self.asked: list[tuple] = []

    def bench(self, case, first, count, rate, output_tokens):
        self.asked.append((first, count, rate, output_tokens))
        return {"request_throughput": min(rate, 4.0)}


def test_rates_of_all_engines_are_shares_of_the_first_ones_limit():
    limits: dict[str, float] = {}
    text, inf = "cold:100:8", float("inf")
    args = SimpleNamespace(rates=[0.5, 1.0], output_tokens=16, documents=3)
    case = load.Case(text, args)
    first, second = FakeClient(), FakeClient()
    rows = list(load.measured(first, case, limits, args))
    assert limits == {text: 4.0}
    assert [(r["share"], r["rate"]) for r in rows] == [
        (None, None),
        (0.5, 2.0),
        (1.0, 4.0),
    ]
    # Prompts of no run were seen before; the first two warm up.
    runs = [(2, 8, inf, 16), (10, 8, 2.0, 16), (18, 8, 4.0, 16)]
    assert first.asked == [(0, 2, inf, 1), *runs]
    assert case.total == 26
    limits[text] = 3.0
    list(load.measured(second, case, limits, args))
    assert [rate for _, _, rate, _ in second.asked[1:]] == [inf, 1.5, 3.0]
    assert limits == {text: 3.0}


def test_documents_are_divided_evenly_and_all_read_beforehand():
    args = SimpleNamespace(rates=[0.9], documents=5)
    case = load.Case("shared:1000:8", args)
    assert (case.warm, case.first(0), case.total) == (40, 40, 60)


def test_steps_are_timed_where_all_prompts_decode(monkeypatch):
    # Prompts arrive one after the other, and end one after the other.
    outputs = [[1], [1, 2], [1, 2], [1, 2], [1], []]
    clock = iter([0.0, 1.0, 3.0, 7.0, 8.0, 9.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))

    class Engine:
        left = list(outputs)

        def add_request(self, name, prompt, params):
            assert params.max_tokens == 3

        def has_unfinished_requests(self):
            return bool(self.left)

        def step(self):
            return self.left.pop(0)

    timed = Timed.__new__(Timed)
    timed.llm = type("LLM", (), {"llm_engine": Engine()})
    assert timed.steps([[1], [2]], 3) == [2.0, 4.0]


def test_prompts_of_another_length_begin_otherwise():
    (short,), (long,) = make_prompts(1, 20, 7), make_prompts(1, 40, 7)
    assert short != long[:20]
    assert make_prompts(1, 20, 7) == [short] != make_prompts(1, 20, 8)


def test_only_rates_of_every_engine_are_plotted(tmp_path, monkeypatch):
    rows = [
        {"case": "cold:9:2", "engine": e, "rate": r, "request_throughput": 1.0}
        | {"median_tpot_ms": 2.0}
        for e, r in (("a", None), ("b", None), ("a", 0.5))
    ]
    (tmp_path / "in.json").write_text(json.dumps({"results": [*rows, {"metrics": {}}]}))
    source = f"cold={tmp_path / 'in.json'}"
    assert list(plot_load.read([source])) == [("cold:9:2", float("inf"))]
    with pytest.raises(SystemExit, match="no case of the kind 'shared'"):
        plot_load.read([source.replace("cold", "shared", 1)])
    output = tmp_path / "plot.png"
    monkeypatch.setattr(sys, "argv", ["plot", source, "--output", str(output)])
    plot_load.main()
    assert output.stat().st_size > 1000


def test_counters_of_several_engines_add_up_and_gauges_are_left_out(monkeypatch):
    page = b"""# HELP vllm_sparse:rows_dense_total rows
vllm_sparse:rows_dense_total{engine="0",reason="prefill"} 3.0
vllm_sparse:rows_dense_total{engine="1",reason="prefill"} 4.0
vllm_sparse:rows_dense_created{engine="0",reason="prefill"} 1.7e9
vllm_sparse:sparse_row_share{engine="0"} 1.0
vllm:num_requests_running{engine="0"} 2.0
"""
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: io.BytesIO(page))
    assert load.our_metrics("") == {"vllm_sparse:rows_dense_total prefill": 7.0}


def test_a_run_that_takes_too_long_is_given_up():
    hanging = "import time; print('so far', flush=True); time.sleep(99)"
    pipe, start = subprocess.PIPE, time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-c", hanging], stdin=pipe, stdout=pipe, text=True
    )
    client = load.Client.__new__(load.Client)
    client.url, client.process, client._unread = "", process, 0
    client.args = SimpleNamespace(run_seconds=2, model="m", tokenizer=None)
    case = SimpleNamespace(text="cold:9:2", dataset=[])
    with pytest.raises(RuntimeError, match="more than --run-seconds 2:\nso far"):
        client.bench(case, 0, 2, 1.0, 4)
    process.wait()
    assert time.monotonic() - start < 60


def test_unknown_ranks_are_refused_before_anything_starts(monkeypatch, capsys):
    argv = ["tp", "--model", "none", "--engines", "sparq:four"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit):
        tensor_parallel.main()
    assert "--engines sparq:four: expected backend:ranks" in capsys.readouterr().err


def test_a_second_signal_leaves_no_process(tmp_path, monkeypatch):
    stubborn = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN)"
    command = [
        sys.executable,
        "-c",
        f"{stubborn}; print(1, flush=True); time.sleep(99)",
    ]
    log = tmp_path / "log"
    with pytest.raises(SystemExit), running(command, log) as process:
        deadline = time.monotonic() + 20
        while not log.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        wait = process.wait

        def interrupted(timeout=None):
            if timeout:
                raise SystemExit(143)
            return wait()

        monkeypatch.setattr(process, "wait", interrupted)
    assert process.poll() is not None


def test_results_tell_the_names_of_folders_alone(tmp_path):
    output = tmp_path / "out.json"
    args = SimpleNamespace(
        output=output, model=tmp_path / "m", tokens=3, tokenizer=None
    )
    save(args, [{"ms": 1.0}])
    found = json.loads(output.read_text())
    assert found["header"]["options"] == {
        "model": "m",
        "tokens": "3",
        "tokenizer": "None",
    }
    assert found["header"]["versions"]["vllm"] and found["results"] == [{"ms": 1.0}]
    assert str(tmp_path) not in output.read_text()
    args.output = None
    save(args, [])
