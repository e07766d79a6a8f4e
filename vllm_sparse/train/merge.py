# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""``merge``: a model folder with a long-context checkpoint's changes, for stock vLLM.

Needs memory for the model twice, and no GPU.
"""

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file

from .. import checkpoint
from .lora import factor_shapes

KIND = "longcontext"


def merge(folder: Path, base: Path, out: Path) -> Path:
    """Write ``base`` with the changes in ``folder`` to ``out``, which is returned.

    Raises:
        FileNotFoundError, ValueError: as ``checkpoint.load`` and ``check_shapes``;
            ``out`` exists.
    """
    if out.exists():
        raise ValueError(f"{out} exists: give another --out, or remove it")
    trained = checkpoint.load(folder, KIND, base)
    config = trained.description["config"]
    shapes = factor_shapes(
        checkpoint.weight_shapes(base), config["rank"], config["modules"]
    )
    checkpoint.check_shapes(trained, shapes)
    out.mkdir(parents=True)
    for file in base.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            shutil.copy(file, out)
    scale = config["alpha"] / config["rank"]
    for path in checkpoint.weight_files(base):
        weights = load_file(path)
        for key, weight in weights.items():
            name = key.removesuffix(".weight")
            if f"{name}.A" not in shapes:
                continue
            low = (
                trained.tensors[f"{name}.B"].float()
                @ trained.tensors[f"{name}.A"].float()
            )
            weights[key] = (weight.float() + scale * low).to(weight.dtype)
        save_file(weights, out / path.name, metadata={"format": "pt"})
    edit_json(out / "config.json", lambda content: _longer(content, config))
    if (out / "tokenizer_config.json").exists():
        length = config["max_position_embeddings"]
        edit = lambda content: content | {"model_max_length": length}
        edit_json(out / "tokenizer_config.json", edit)
    return out


def _longer(content: dict, trained: dict) -> dict:
    theta = {"rope_theta": trained["rope_theta"]}
    length = trained["max_position_embeddings"]
    if "rope_parameters" in content:
        theta = {"rope_parameters": content["rope_parameters"] | theta}
    # Before 5, transformers wrote it among the other fields.
    return content | theta | {"max_position_embeddings": length}


def edit_json(path: Path, edit: Callable[[dict], dict]) -> None:
    content = edit(json.loads(path.read_text()))
    path.write_text(json.dumps(content, indent=2) + "\n")


def main(arguments: list[str]) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m vllm_sparse.train merge", description=__doc__
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("base", type=Path, help="folder of the model it belongs to")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    print(merge(args.checkpoint, args.base, args.out))
