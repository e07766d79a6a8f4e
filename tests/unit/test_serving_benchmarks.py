# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""What the serving benchmarks compute around their engines."""

import asyncio
import io
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

pytest.importorskip("vllm")
from vllm.benchmarks import serve  # noqa: E402
from vllm.benchmarks.datasets import get_samples  # noqa: E402
from vllm.utils.argparse_utils import FlexibleArgumentParser  # noqa: E402

from benchmarks import plot  # noqa: E402
from benchmarks.environment import save  # noqa: E402
from benchmarks.serving import decode, load  # noqa: E402
from benchmarks.serving.engine import Timed, make_prompts  # noqa: E402
from benchmarks.serving.processes import running  # noqa: E402
from benchmarks.serving.texts import compare  # noqa: E402


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
    same = {"equal": 1.0, "parted": 0, "of": 1, "gap": 0.0, "rounding": 0.0}
    assert compare(want, want) == same


def test_a_token_that_one_rank_did_not_consider_is_unknown_far_away():
    found = compare([[step("z", z=0.0)]], [[step("a", a=0.0)]])
    assert found["gap"] is None


def test_rates_of_all_engines_are_shares_of_the_first_ones_limit():
    asked: list[tuple] = []

    def bench(case, *what):
        """Answers with the rate; all at once is 4 requests a second."""
        asked.append(what)
        return {"request_throughput": min(what[2], 4.0)}

    limits: dict[str, float] = {}
    text, inf = "cold:100:8", float("inf")
    args = SimpleNamespace(rates=[0.5, 1.0], output_tokens=16, documents=3)
    case = load.Case(text, args)
    rows = list(load.measured(bench, case, limits, args))
    assert limits == {text: 4.0}
    rates = [(r["share"], r["rate"]) for r in rows]
    assert rates == [(None, None), (0.5, 2.0), (1.0, 4.0)]
    # Prompts of no run were seen before; the first two warm up.
    runs = [(2, 8, inf, 16), (10, 8, 2.0, 16), (18, 8, 4.0, 16)]
    assert asked == [(0, 2, inf, 1), *runs]
    assert case.total == 26
    limits[text] = 3.0
    list(load.measured(bench, case, limits, args))
    assert [rate for _, _, rate, _ in asked[5:]] == [inf, 1.5, 3.0]
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


def test_only_rates_of_every_engine_are_plotted(tmp_path):
    rows = [
        {"case": "cold:9:2", "engine": e, "rate": r, "request_throughput": 1.0}
        for e, r in (("a", None), ("b", None), ("a", 0.5))
    ]
    (tmp_path / "in.json").write_text(json.dumps({"results": [*rows, {"metrics": {}}]}))
    source = f"cold={tmp_path / 'in.json'}"
    assert list(plot.read_load([source])) == [("cold:9:2", float("inf"))]
    with pytest.raises(SystemExit, match="no case of the kind 'shared'"):
        plot.read_load([source.replace("cold", "shared", 1)])


@pytest.mark.parametrize(
    "sources",
    [
        "decode_attention_h100.json",
        "serving_cpu.json",
        "serving_h100.json",
        "serving_fp8_h100.json",
        "shared=load_h100.json cold=load_h100.json",
    ],
)
def test_committed_results_are_plotted(sources, tmp_path, monkeypatch):
    output = tmp_path / "plot.png"
    argv = ["plot", *sources.split(), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.chdir(Path(plot.__file__).parent / "results")
    plot.main()
    assert output.stat().st_size > 1000


def test_counters_of_several_engines_add_up_and_gauges_are_left_out(monkeypatch):
    page = b"""vllm_sparse:rows_dense_total{engine="0",reason="prefill"} 3.0
vllm_sparse:rows_dense_total{engine="1",reason="prefill"} 4.0
vllm_sparse:rows_dense_created{engine="0",reason="prefill"} 1.7e9
vllm_sparse:sparse_row_share{engine="0"} 1.0
"""
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: io.BytesIO(page))
    assert load.our_metrics("") == {"vllm_sparse:rows_dense_total prefill": 7.0}


# Texts that a reader of lines, numbers or JSON could take for something else.
PROMPTS = ["a", "b", "c\u2028d\x85\x0b\n e ", '\x00\U0001f600\ufffd"<|im_end|>', "f"]


@pytest.fixture
def bench(tmp_path):
    """Runs a load with something in place of vLLM's."""

    async def none(args):
        return {"completed": 0}

    def run(main_async=none):
        loader = load.Load.__new__(load.Load)
        options = {"run_seconds": 0.2, "model": "m", "tokenizer": None}
        loader.args = SimpleNamespace(**options, rates=[], documents=1)
        case = load.Case("cold:9:2", loader.args)
        loader.folder = tmp_path
        loader.drawn = {case.text: SimpleNamespace(result=lambda: PROMPTS)}
        loader.serve = SimpleNamespace(main_async=main_async)
        loader.parser = FlexibleArgumentParser()
        serve.add_cli_args(loader.parser)
        return loader, loader.bench("http://host", case, 2, 2, 1.0, 4)

    return run


def test_a_load_sends_its_part_of_the_prompts(bench):
    sent: list[tuple] = []

    async def main_async(args):
        assert args.base_url == "http://host" and args.request_rate == 1.0
        assert args.ignore_eos
        samples = get_samples(args, lambda text: SimpleNamespace(input_ids=text))
        sent.extend((s.prompt, s.prompt_len, s.expected_output_len) for s in samples)
        return {"completed": 2, "median_itl_ms": 3.0, "input_lens": [9, 9]}

    _, result = bench(main_async)
    assert result == {"completed": 2, "median_itl_ms": 3.0}
    assert sent == [(text, len(text), 4) for text in PROMPTS[2:4]]


def test_a_load_that_hangs_or_fails_is_given_up(bench):
    async def hanging(args):
        print("so far")
        await asyncio.sleep(99)

    with pytest.raises(RuntimeError, match="more than --run-seconds 0.2\nso far"):
        bench(hanging)
    with pytest.raises(RuntimeError, match="the load failed"):
        bench()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engines", "sparq:four"], "--engines sparq:four: expected backend:ranks"),
        (["--engines", "sparq:mp", "--load-format", "dummy"], "need --layers"),
    ],
)
def test_ranks_are_checked_before_anything_starts(
    options, message, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["decode", "--model", "none", *options])
    with pytest.raises(SystemExit):
        decode.main()
    assert message in capsys.readouterr().err


class FakeLLM:
    """Generates in a second per token, in half of that with sparse options."""

    now = 0.0

    def __init__(self, **settings):
        self.ranks = settings["tensor_parallel_size"]
        self.sparse = settings.get("additional_config", {}).get("sparse")
        config = MagicMock(cache_config=SimpleNamespace(num_gpu_blocks=3, block_size=8))
        config.model_config.get_vocab_size.return_value = 2000
        self.llm_engine = SimpleNamespace(vllm_config=config)

    def generate(self, inputs, params, use_tqdm):
        FakeLLM.now += (0.5 if self.sparse else 1.0) * params.max_tokens

    def collective_rpc(self, method, args=()):
        if method == "reconfigure_sparse":
            (self.sparse,) = args
        return self.ranks * [{"kv_bytes_read": 1, "kv_bytes_dense": 4}]


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Runs ``decode`` with options, on fake engines; returns the saved results."""
    monkeypatch.setattr("vllm.LLM", FakeLLM)
    monkeypatch.setattr("time.perf_counter", lambda: FakeLLM.now)
    output = tmp_path / "out.json"

    def run(*options, platform="cpu"):
        argv = ["decode", "--model", "m", "--output", str(output), *options]
        monkeypatch.setattr(sys, "argv", argv)
        is_cpu = staticmethod(lambda: platform == "cpu")
        monkeypatch.setattr("vllm.platforms.current_platform.is_cpu", is_cpu)
        decode.main()
        return json.loads(output.read_text())["results"]

    return run


SPARSE = ["--sparse", "{}", '{"top_k": 0.1}']


def test_engines_are_timed_side_by_side(fake, capsys):
    cases = ["--cases", "2x30", "1x9", "--ttft-lengths", "20", "--repeats", "2"]
    results = fake("--engines", "cpu_attn", "sparq", *SPARSE, *cases)
    names = [r["engine"] for r in results]
    assert names == ["cpu_attn", "sparq {}", 'sparq {"top_k": 0.1}']
    for result, ms in zip(results, (1000, 1000, 500), strict=True):
        assert result["kv_capacity_tokens"] == 24
        rows = [(r["kind"], r["batch"], r["context"]) for r in result["rows"]]
        assert rows == [("ttft", 1, 20), ("decode", 2, 30), ("decode", 1, 9)]
        assert all(r["all_ms"] == 2 * [ms] and r["ms"] == ms for r in result["rows"])
        share = {r.get("kv_share") for r in result["rows"]}
        assert share == ({None} if "cpu" in result["engine"] else {None, 0.25})
    assert '| decode | 30 | 2 | sparq {"top_k": 0.1} | 500.00 | 2.00x | 25.0%' in (
        capsys.readouterr().out
    )


def test_on_a_gpu_engines_run_in_processes_of_their_own(fake, monkeypatch):
    def child(args, part, extra):
        if part == "weights":
            return None
        label, name, options = decode.jobs_of(args)[int(part)]
        if label == "broken":
            return "exit status 1"
        results = json.loads(args.output.read_text())["results"]
        texts = [[step("a", a=-0.1)]]
        monkeypatch.setattr(decode, "greedy_texts", lambda engine: texts)
        decode.measure(args, [(label, name, options)], results)

    monkeypatch.setattr(decode, "run_part", child)
    engines = ["--engines", "sparq", "broken", "sparq:mp", "--layers", "1"]
    with pytest.raises(SystemExit):
        fake(*engines, "--cases", "2x30", *SPARSE[:2], platform="gpu")
    output = sys.argv[sys.argv.index("--output") + 1]
    with open(output) as file:
        one, broken, two = json.load(file)["results"]
    assert broken == {"engine": "broken", "error": "exit status 1", "rows": []}
    assert (one["rows"][0]["batch"], two["rows"][0]["batch"]) == (2, 4)
    assert two["rows"][0]["kv_bytes_read_by_rank"] == [1, 1]
    assert two["compared"]["equal"] == 1 and "compared" not in one
    assert "texts" not in one and "texts" not in two


def test_a_second_signal_leaves_no_process(tmp_path, monkeypatch):
    text = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    command = [sys.executable, "-c", text + "print(1, flush=True); time.sleep(99)"]
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
    args = SimpleNamespace(output=output, model=tmp_path / "m", tokenizer=None)
    save(args, [{"ms": 1.0}])
    found = json.loads(output.read_text())
    assert found["header"]["options"] == {"model": "m", "tokenizer": "None"}
    assert found["header"]["versions"]["vllm"] != "none"
    assert found["results"] == [{"ms": 1.0}]
    assert str(tmp_path) not in output.read_text()
    args.output = None
    save(args, [])
