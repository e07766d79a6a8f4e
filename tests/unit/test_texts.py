# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""What no linter sees in docs and other texts."""

import re
from pathlib import Path

import vllm_sparse

ROOT = Path(vllm_sparse.__file__).parents[1]
TEXTS = ("*.md", "docs/*.md", "scripts/*", "examples/**/*", "csrc/**/*")


def test_no_merge_is_half_done():
    marker = re.compile(r"^(<{7}|>{7}) ", re.MULTILINE)
    files = [file for texts in TEXTS for file in ROOT.glob(texts) if file.is_file()]
    assert len(files) > 50
    for file in files:
        assert not marker.search(file.read_text(errors="replace")), file
