# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Examples as a reader runs them (those with Ray: test_ray_llm.py)."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")
from transformers import AutoTokenizer  # noqa: E402

from scripts.get_model import get_model  # noqa: E402
from vllm_sparse.anchor_config import AnchorConfig  # noqa: E402
from vllm_sparse.cache.layout import BLOCK_SIZE  # noqa: E402
from vllm_sparse.cache.lines import NEAR_BLOCKS  # noqa: E402
from vllm_sparse.train.anchored import line_ends  # noqa: E402

from .tiny import save_llama  # noqa: E402

pytestmark = pytest.mark.engine
EXAMPLES = Path(__file__).parents[2] / "examples"
FIGURES = re.compile(
    r"--- (\d+) tokens read in \S+ s, then \S+ ms a token \(\S+ tokens/s\); "
    r"(\S+) MiB of KV held(?:, (\d+) blocks given back)?\n"
)


def complete_code(anchor, control, *options) -> subprocess.CompletedProcess:
    script = EXAMPLES / "anchor_code_completion.py"
    command = [sys.executable, script, "--anchor", anchor, "--control", control]
    return subprocess.run(
        [*command, *options], capture_output=True, text=True, timeout=400
    )


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Some 1,500 tokens before the cut."""
    path = tmp_path_factory.mktemp("code") / "module.py"
    path.write_text("".join(f"def f{i}(a, b):\n    return a\n" for i in range(160)))
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model for anchors and its control; tiny, with a tokenizer for code."""
    root, source = tmp_path_factory.mktemp("arms"), get_model()
    tokenizer = AutoTokenizer.from_pretrained(source)
    control, anchor = root / "control", root / "anchor"
    save_llama(control, vocabulary=len(tokenizer))
    tokenizer.save_pretrained(control)
    shutil.copytree(control, anchor)
    AnchorConfig(line_ends(tokenizer)).write(anchor)
    return anchor, control


@pytest.mark.slow
def test_both_arms_complete_a_file(folders, file):
    done = complete_code(*folders, "--file", file, "--tokens", "8")
    assert done.returncode == 0, done.stderr[-4000:]
    assert "goes on:\ndef f120(a, b):" in done.stdout
    (n, held, back), (same, dense, none) = FIGURES.findall(done.stdout)
    assert n == same and int(n) > 1024 and not none
    # Three layers' K and V of two heads in bf16, in whole blocks.
    blocks = -(-(int(n) + 7) // BLOCK_SIZE)
    page = 3 * 2 * 2 * 64 * 2 * BLOCK_SIZE / 2**20
    assert float(dense) == pytest.approx(blocks * page, rel=0.02)
    assert float(held) < float(dense) / 2 and int(back) >= blocks - NEAR_BLOCKS - 2


def test_a_folder_that_is_not_served_is_named(folders, file):
    _, control = folders
    done = complete_code(control, control, "--file", file)
    assert done.returncode == 1
    assert "serves models that were trained with anchors" in done.stderr
    assert done.stderr.endswith(f"{control} is not served, for the reason above\n")


def test_times_need_steps():
    done = complete_code("a", "b", "--tokens", "1")
    assert done.returncode == 2 and "--tokens must be at least 2" in done.stderr
