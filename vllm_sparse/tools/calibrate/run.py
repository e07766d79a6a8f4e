# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Runs the model over windows of text and measures one decode row at many places."""

import os
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from ...config import DENSE_BELOW
from .choose import Measurements, grid

if TYPE_CHECKING:
    from vllm import LLM

ENGINE_OPTIONS: dict[str, Any] = dict(
    attention_backend="sparq",
    # top_p lets rows be sparse at every length; its value is the probe's to vary.
    additional_config={"sparse": {"top_p": 0.9, "dense_below": 0}},
    worker_extension_cls="vllm_sparse.tools.calibrate.probe.ProbeExtension",
    max_num_seqs=1,
    # Longer prompts of a window hit the shorter ones' blocks.
    enable_prefix_caching=True,
    enforce_eager=True,
    # Steps ahead of a request's end would be measured.
    async_scheduling=False,
    disable_log_stats=True,
)
# A prompt's last position is dense; the token after it is a decode row.
NEW_TOKENS = 2


class CalibrationError(ValueError):
    """What was asked for cannot be measured; the message says what to change."""


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        max_model_len: tokens of the longest context; the shortest is a quarter of it.
        samples: windows of the text.
        tokens: decode rows measured in each window, at lengths all over it.
    """

    max_model_len: int = 4096
    samples: int = 4
    tokens: int = 16

    def lengths(self, shortest: int) -> list[list[int]]:
        """Prompt lengths in each window, ascending: a random one of every stratum.

        Args:
            shortest: contexts below it are never sparse.

        Raises:
            CalibrationError: nothing is left between the two.
        """
        low = max(self.max_model_len // 4, shortest)
        high = self.max_model_len - NEW_TOKENS + 1
        if high - low < self.tokens:
            raise CalibrationError(
                f"--max-model-len {self.max_model_len} leaves no {self.tokens} lengths "
                f"to measure: contexts below {shortest} tokens are attended densely "
                f"here. Example: --max-model-len {4 * max(shortest, self.tokens)}"
            )
        edges = [low + (high - low) * i // self.tokens for i in range(self.tokens + 1)]
        rng = Random(0)
        return [
            [rng.randrange(*pair) for pair in zip(edges, edges[1:])]
            for _ in range(self.samples)
        ]


def read_text(paths: list[Path]) -> str:
    """The files, one after the other.

    Raises:
        CalibrationError: naming the file that is no text.
    """
    texts = []
    for path in paths:
        try:
            texts.append(path.read_text("utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise CalibrationError(f"--data {path}: {error}") from error
    return "\n\n".join(texts)


def windows(ids: list[int], length: int, count: int) -> list[list[int]]:
    """``count`` windows at even distances; they overlap where the text is short.

    Raises:
        CalibrationError: the text is shorter than one window.
    """
    if len(ids) < length:
        raise CalibrationError(
            f"--data has {len(ids)} tokens, fewer than one context of {length}: add "
            "files, or choose a smaller --max-model-len"
        )
    last = len(ids) - length
    starts = [last * i // max(1, count - 1) for i in range(count)]
    return [ids[start : start + length] for start in starts]


def measure_model(model: str, text: str, plan: Plan) -> tuple[Measurements, dict]:
    """Start an engine and measure the grid.

    Returns:
        the figures, and what they depend on besides the plan: device and dtype.

    Raises:
        CalibrationError: too little text, or contexts that are too short.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm import LLM
    from vllm.platforms import current_platform

    device = current_platform.device_type
    lengths = plan.lengths(DENSE_BELOW[device])
    llm = LLM(model=model, max_model_len=plan.max_model_len, **ENGINE_OPTIONS)
    dtype = str(llm.llm_engine.model_config.dtype).removeprefix("torch.")
    return measure(llm, text, lengths), {"device": device, "dtype": dtype}


def measure(llm: "LLM", text: str, lengths: list[list[int]]) -> Measurements:
    """Decode one row after each prompt.

    Args:
        llm: made with ENGINE_OPTIONS; its decode rows are dense from here on.
        lengths: of the prompts in each window.

    Raises:
        CalibrationError: the text is shorter than a window.
    """
    from vllm import SamplingParams

    config = llm.llm_engine.model_config
    tokenizer = llm.get_tokenizer()
    start = tokenizer.encode("")[:1]  # the model's BOS, if it wants one
    ids = tokenizer.encode(text, add_special_tokens=False)
    texts = windows(ids, config.max_model_len - len(start), len(lengths))
    settings = grid(config.get_head_size())
    points = [(setting.rank, setting.top_p) for setting in settings]
    llm.collective_rpc("start_probe", args=(points,))
    params = SamplingParams(
        temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False
    )
    with tqdm(total=sum(map(len, lengths)), unit="row", desc="measuring") as bar:
        for window, prompts in zip(texts, lengths):
            for length in prompts:
                prompt = {"prompt_token_ids": (start + window)[:length]}
                llm.generate(prompt, params, use_tqdm=False)
                bar.update()
    (notes,) = llm.collective_rpc("take_probe")
    return Measurements.from_notes(settings, notes)
