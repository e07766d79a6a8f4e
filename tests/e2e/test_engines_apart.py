# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Engines of their own: other options, errors, and two in one process."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("vllm")

from .engines import EXTENSION, generate, greedy, running  # noqa: E402
from .family_runs import FULL, family, together  # noqa: E402

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("in_process", [True, False])
def test_bad_option_is_an_error_in_the_callers_process(in_process):
    with (
        pytest.raises(ValueError, match=r"unknown option sparse\.topk.*'top_k'"),
        running(
            in_process,
            attention_backend="sparq",
            additional_config={"sparse": {"topk": 0.5}},
        ),
    ):
        pass


def test_twilight_is_sparq_with_adaptive_budgets(prompts):
    with running(
        attention_backend="twilight",
        worker_extension_cls=EXTENSION,
        additional_config={"sparse": {"dense_below": 64}},
    ) as llm:
        llm.collective_rpc("reset_sparse_stats")  # what engines before it counted
        generate(llm, prompts[4:], greedy(4))
        (report,) = llm.collective_rpc("sparse_kept_tokens")
    kept = [head["mean"] for layer in report.values() for head in layer]
    assert 128 <= min(kept) < max(kept) < 460  # min_tokens, and not all


def test_two_engines_of_one_process_keep_their_formats_and_kernels():
    """What one chooses is not the other's, whichever was made last."""

    def page(llm) -> int:
        core = llm.llm_engine.engine_core.engine_core
        (group,) = core.scheduler.kv_cache_config.kv_cache_groups
        return group.kv_cache_spec.page_size_bytes

    with family("Qwen3", FULL) as rows:
        alone = together(rows, "Qwen3")
        with family("Qwen3", FULL | {"kv_format": "int8", "kernels": "cpu"}) as codes:
            assert page(codes) < 0.8 * page(rows)
            of_codes = together(codes, "Qwen3")
            assert together(rows, "Qwen3") == alone
            assert together(codes, "Qwen3") == of_codes


def test_importing_the_engine_tests_left_the_threads_alone():
    """Engines in this process must not bind later tests to fewer cores."""
    count = "import os; print(len(os.sched_getaffinity(0)))"
    output = subprocess.run([sys.executable, "-c", count], capture_output=True)
    assert int(output.stdout) == len(os.sched_getaffinity(0))
