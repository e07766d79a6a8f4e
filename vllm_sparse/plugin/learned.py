# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Whether a checkpoint that a method has learnt fits the engine."""

import json
from pathlib import Path

from .. import checkpoint
from ..config import SparseConfig, SparseConfigError
from ..methods.less import KIND, described
from .versions import init_logger

logger = init_logger(__name__)


def check_checkpoint(config: SparseConfig, vllm_config) -> None:
    """Raise where a checkpoint was made for something else.

    Raises:
        SparseConfigError: saying what differs, and what to give instead.
    """
    if config.checkpoint is None or vllm_config.model_config is None:
        return
    folder, model = Path(config.checkpoint), vllm_config.model_config
    base = Path(model.model)
    try:
        if base.is_dir() and list(base.glob("model*.safetensors")):
            found = checkpoint.load(folder, KIND, base).description
        else:
            found = checkpoint.describe(folder, KIND)
            logger.warning_once(
                "sparse.checkpoint was made with %s; whether %s has the same weights "
                "is not checked, as it is no folder with safetensors.",
                found["base"]["name"],
                model.model,
            )
    except (FileNotFoundError, ValueError) as error:
        raise SparseConfigError(f"sparse.checkpoint: {error}") from error
    made_for = found["config"]
    options = (made_for["hidden"], config.sink_tokens, config.local_window)
    here = json.loads(json.dumps(described(model.hf_text_config, *options)))
    differing = [
        f"{name} {made_for.get(name)}, not {value}"
        for name, value in here.items()
        if made_for.get(name) != value
    ]
    if differing:
        raise SparseConfigError(
            f"sparse.checkpoint {folder} was made for {'; '.join(differing)}: change "
            "the options, or give a checkpoint that was made for them"
        )
    ranks = vllm_config.parallel_config.tensor_parallel_size
    if ranks > 1:
        raise SparseConfigError(
            f"--attention-backend less serves one rank, not {ranks}: leave "
            "--tensor-parallel-size out, or choose --attention-backend streaming"
        )
