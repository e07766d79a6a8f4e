# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Lossless engines, and what their tests ask of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import pytest
from vllm import LLM

from vllm_sparse.methods import Method, Phase

from .engines import EXTENSION, SPARSE, running

LOSSLESS = SPARSE | {
    "lossless": True,
    "draft_tokens": 4,
    "draft_above": 0,
    "draft_adapt": False,
}
DENSE_ENGINE = dict(dtype="float32", attention_backend="CPU_ATTN")


@cache
def _text() -> list[int]:
    from pydoc_data.topics import topics

    from transformers import AutoTokenizer

    from scripts.get_model import get_model

    words = "\n".join(topics[name] for name in sorted(topics))[:60_000]
    return AutoTokenizer.from_pretrained(get_model()).encode(words)


def text(length: int, start: int = 0) -> list[int]:
    """English text as token ids of SmolLM2's tokenizer."""
    ids = _text()
    assert len(ids) >= start + length
    return ids[start : start + length]


@contextmanager
def lossless(options: dict | None = None, **settings) -> Iterator[LLM]:
    """A lossless engine in fp32.

    Args:
        options: as under ``additional_config["sparse"]``.
    """
    own = dict(
        dtype="float32",
        attention_backend="sparq",
        worker_extension_cls=EXTENSION,
        disable_log_stats=False,
        additional_config={"sparse": LOSSLESS if options is None else options},
    )
    with running(**own | settings) as llm:
        yield llm


class Drafts:
    """Tokens drafted, and of these accepted, since :meth:`reset`: vLLM's metrics."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.reset()

    def reset(self) -> None:
        self.first = self._counts()

    def _counts(self) -> tuple[int, int]:
        found = {m.name: m for m in self.llm.get_metrics()}
        name = "vllm:spec_decode_num_{}_tokens"
        return tuple(found[name.format(n)].value for n in ("draft", "accepted"))

    @property
    def drafted(self) -> int:
        return self._counts()[0] - self.first[0]

    @property
    def accepted(self) -> int:
        return self._counts()[1] - self.first[1]

    @property
    def rate(self) -> float:
        return self.accepted / self.drafted


def said(outputs) -> list[list[tuple]]:
    """All of an answer that must be as dense attention's."""
    return [
        [
            (list(o.token_ids), o.text, o.finish_reason, o.stop_reason)
            for o in output.outputs
        ]
        for output in outputs
    ]


def runner(llm: LLM):
    """The model runner of an engine in this process."""
    core = llm.llm_engine.engine_core.engine_core
    return core.model_executor.driver_worker.worker.model_runner


@contextmanager
def verifying_sparsely(llm: LLM, options: dict) -> Iterator[None]:
    """A control: what the engine should verify densely has the drafts' budgets."""
    original = Method.__init__

    def wrong(self, *args) -> None:
        original(self, *args)
        self.dense_phases = frozenset({Phase.PREFILL})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Method, "__init__", wrong)
        llm.collective_rpc("reconfigure_sparse", args=(options,))
        yield
    llm.collective_rpc("reconfigure_sparse", args=(options,))
