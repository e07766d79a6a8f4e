# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""``merge``: a model folder with a checkpoint's changes, for stock vLLM.

Of ``longcontext`` or ``anchor``; a model of the latter's anchors gets
``anchors.json``. Needs memory for the model twice, and no GPU.
"""

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file

from .. import checkpoint
from ..anchor_config import FILE, AnchorConfig
from .lora import factor_shapes

KIND = "longcontext"
# Of the command anchor, by --arm.
ANCHOR_KINDS = {"anchor": "anchor", "control": "anchor-control"}


def merge(folder: Path, base: Path, out: Path) -> Path:
    """Write ``base`` with the changes in ``folder`` to ``out``, which is returned.

    Raises:
        FileNotFoundError, ValueError: as ``checkpoint.load`` and ``check_shapes``;
            ``out`` exists.
    """
    if out.exists():
        raise ValueError(f"{out} exists: give another --out, or remove it")
    trained = checkpoint.load(folder, (KIND, *ANCHOR_KINDS.values()), base)
    kind, config = trained.description["kind"], trained.description["config"]
    shapes: dict = checkpoint.weight_shapes(base)
    if not config.get("full"):
        shapes = factor_shapes(shapes, config["rank"], config["modules"])
    checkpoint.check_shapes(trained, {n: tuple(size) for n, size in shapes.items()})
    out.mkdir(parents=True)
    for file in base.iterdir():
        # What a base with anchors says of itself holds for it alone.
        if file.is_file() and file.suffix != ".safetensors" and file.name != FILE:
            shutil.copy(file, out)
    for path in checkpoint.weight_files(base):
        weights = load_file(path)
        for key, weight in weights.items():
            weights[key] = _changed(key, weight, trained.tensors, config)
        save_file(weights, out / path.name, metadata={"format": "pt"})
    if kind == KIND:
        _lengthen(out, config)
    elif kind == ANCHOR_KINDS["anchor"]:
        how = trained.description["recipe"] | {"base": trained.description["base"]}
        AnchorConfig.from_json(config | {"recipe": how}).write(out)
    return out


def _changed(key: str, weight, tensors: dict, config: dict):
    """A weight with its change; itself, if there is none."""
    if config.get("full"):
        return tensors[key].to(weight.dtype)
    name = key.removesuffix(".weight")
    if f"{name}.A" not in tensors:
        return weight
    low = tensors[f"{name}.B"].float() @ tensors[f"{name}.A"].float()
    return (weight.float() + config["alpha"] / config["rank"] * low).to(weight.dtype)


def _lengthen(out: Path, config: dict) -> None:
    edit_json(out / "config.json", lambda content: _longer(content, config))
    if (out / "tokenizer_config.json").exists():
        length = config["max_position_embeddings"]
        edit = lambda content: content | {"model_max_length": length}
        edit_json(out / "tokenizer_config.json", edit)


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
