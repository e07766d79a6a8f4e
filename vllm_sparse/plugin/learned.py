# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Whether a checkpoint that a method has learnt fits the engine."""

import json
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from .. import checkpoint
from ..config import SparseConfig, SparseConfigError
from ..methods.less import KIND, described, tensor_shapes
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
    base = _weights(vllm_config)
    try:
        read = checkpoint.load(folder, KIND, base)
    except (FileNotFoundError, ValueError) as error:
        raise SparseConfigError(f"sparse.checkpoint: {error}") from error
    found = read.description
    if base is None:
        logger.warning_once(
            "sparse.checkpoint was made with %s; whether %s has the same weights is "
            "not checked, as no safetensors of it are on this machine yet.",
            found["base"]["name"],
            model.model,
        )
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
    try:
        checkpoint.check_shapes(read, tensor_shapes(here))
    except ValueError as error:
        raise SparseConfigError(f"sparse.checkpoint: {error}") from error


def _weights(vllm_config) -> Path | None:
    """The folder of a model's safetensors, where all of them are there: what was given,
    or what an earlier start has downloaded."""
    model = vllm_config.model_config
    folder = Path(model.model)
    if not folder.is_dir():
        cached = try_to_load_from_cache(
            model.model,
            "config.json",
            cache_dir=vllm_config.load_config.download_dir,
            revision=model.revision,
        )
        if not isinstance(cached, str):
            return None
        folder = Path(cached).parent
    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.is_file():
        names = set(json.loads(index.read_text())["weight_map"].values())
    elif not (folder / "model.safetensors").is_file():
        names = {file.name for file in folder.glob("model*.safetensors")}
    there = names and all((folder / name).is_file() for name in names)
    return folder if there else None
