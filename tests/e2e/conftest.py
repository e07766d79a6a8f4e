# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Fixtures of several files; vLLM is imported by those alone that need it."""

import pytest


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """English text as token ids, every prompt from another place."""
    from pydoc_data.topics import topics

    from transformers import AutoTokenizer

    from scripts.get_model import get_model

    from .engines import PROMPT_LENGTHS

    text = "\n".join(topics[name] for name in sorted(topics))[:40_000]
    ids = AutoTokenizer.from_pretrained(get_model()).encode(text)
    starts = range(0, len(ids), 1000)
    chosen = [ids[s : s + n] for s, n in zip(starts, PROMPT_LENGTHS, strict=False)]
    assert [len(p) for p in chosen] == PROMPT_LENGTHS
    return chosen
