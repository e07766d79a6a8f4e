# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Calibration in an engine: it predicts what the proposed options then read."""

import json
from argparse import Namespace
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from vllm import SamplingParams  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.utils.argparse_utils import FlexibleArgumentParser  # noqa: E402

from tests.e2e.engines import running  # noqa: E402
from vllm_sparse.tools.calibrate import cli as command  # noqa: E402
from vllm_sparse.tools.calibrate.run import ENGINE_OPTIONS, NEW_TOKENS, Plan, measure

pytestmark = pytest.mark.engine

PLAN = Plan(max_model_len=900, samples=1, tokens=3)


def test_the_engine_reads_what_calibration_says(tmp_path):
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))[:20_000]
    options = ENGINE_OPTIONS | dict(max_model_len=900, max_num_batched_tokens=900)
    # A worker class takes one extension in a process's life: not the other tests' own.
    with running(in_process=False, dtype="float32", **options) as llm:
        lengths = PLAN.lengths(512)
        found = measure(llm, text, lengths)
        assert found.layers == list(range(30)) and found.kept.shape[2:] == (16, 3)
        assert [int(n) - 1 for n in found.seq_lens] == lengths[0]
        assert 0 < found.error.mean() < 0.2

        args = Namespace(output=tmp_path / "sparse.json", target_error=0.1)
        args.plot = args.report = None
        proposal = command.finish(args, found, {})
        served = arguments_of_vllm(args.output).additional_config["sparse"]
        assert served == proposal.options

        # The same prompts with the proposed options and no layer dense: layer 0 sees
        # the same queries, later ones nearly the same.
        served |= {"dense_layers": 0, "dense_below": 0}
        llm.collective_rpc("reconfigure_sparse", args=(served,))
        llm.collective_rpc("reset_sparse_stats")
        ids = llm.get_tokenizer().encode(text)
        params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
        for length in lengths[0]:
            prompt = {"prompt_token_ids": ids[:length]}
            llm.generate(prompt, params, use_tqdm=False)
        (stats,) = llm.collective_rpc("sparse_stats")
        (kept,) = llm.collective_rpc("sparse_kept_tokens")

    index = found.index(proposal)
    assert stats["sparse_rows"] == 30 * 3
    assert stats["kv_bytes_dense"] == found.dense.sum()
    assert stats["kv_bytes_read"] == pytest.approx(
        float(found.read[:, :, index].sum()), rel=0.05
    )
    means = [head["mean"] for head in kept["model.layers.0.self_attn.attn"]]
    assert means == pytest.approx(found.kept[:, 0, index].mean(0).tolist(), rel=0.01)


def arguments_of_vllm(path: Path):
    """How vLLM reads ``--additional-config "$(cat FILE)"``."""
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    text = path.read_text().rstrip("\n")  # as the shell does
    assert json.loads(text)
    return parser.parse_args(["--additional-config", text])
