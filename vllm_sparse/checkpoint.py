# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Trained tensors with what they belong to: safetensors, and JSON beside them.

Shared by all that is trained here. A checkpoint names its kind, the base model (by a
hash of its tensors), recipe and data, and is refused where it does not fit.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

FORMAT = 1
TENSORS = "checkpoint.safetensors"
DESCRIPTION = "checkpoint.json"


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name, and what ``checkpoint.json`` says."""

    tensors: dict[str, torch.Tensor]
    description: dict


def sha256(path: Path) -> str:
    """Of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weight_files(model: Path) -> list[Path]:
    """The safetensors of a model folder.

    Raises:
        FileNotFoundError: there are none.
    """
    files = sorted(model.glob("model*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no model*.safetensors in {model}")
    return files


def weight_shapes(model: Path) -> dict[str, torch.Size]:
    shapes: dict[str, torch.Size] = {}
    for path in weight_files(model):
        with safe_open(path, "pt") as file:
            names = file.keys()
            shapes |= {n: torch.Size(file.get_slice(n).get_shape()) for n in names}
    return shapes


def base_hash(model: Path) -> str:
    """Of names, types, shapes and values of a model's tensors; how they are spread over
    files does not count."""
    places: dict[str, Path] = {}
    for path in weight_files(model):
        with safe_open(path, "pt") as file:
            places |= dict.fromkeys(file.keys(), path)
    total = hashlib.sha256()
    for name in sorted(places):
        with safe_open(places[name], "pt") as file:
            tensor = file.get_tensor(name)
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def save(
    folder: Path,
    kind: str,
    tensors: dict[str, torch.Tensor],
    base: Path,
    config: dict,
    recipe: dict,
    data: str,
) -> None:
    """Write a checkpoint.

    Args:
        kind: what was trained: "longcontext", "less", "anchor", "anchor-control".
        base: folder of the model that it was trained with.
        config: what whoever applies it has to know, JSON.
        recipe: how it was trained, JSON.
        data: hash of the text it was trained on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    save_file(tensors, folder / TENSORS)
    description = {
        "format": FORMAT,
        "kind": kind,
        "base": {"name": base.name, "sha256": base_hash(base)},
        "config": config,
        "recipe": recipe,
        "data_sha256": data,
        "tensors_sha256": sha256(folder / TENSORS),
    }
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n")


def describe(folder: Path, *kinds: str) -> dict:
    """What ``checkpoint.json`` says.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: it is of another format, or of none of the kinds.
    """
    if not (folder / DESCRIPTION).is_file():
        raise FileNotFoundError(
            f"no checkpoint in {folder}: {DESCRIPTION} is missing; give the folder "
            "checkpoint/ that a training command has made"
        )
    description = json.loads((folder / DESCRIPTION).read_text())
    if description["format"] != FORMAT:
        raise ValueError(
            f"{folder} has checkpoint format {description['format']}, this version "
            f"reads {FORMAT}: train it again, or use the version that wrote it"
        )
    if description["kind"] not in kinds:
        raise ValueError(
            f"{folder} holds a {description['kind']} checkpoint, not "
            f"{' or '.join(kinds)}: give the folder of one made by `python -m "
            f"vllm_sparse.train {kinds[0]}`"
        )
    return description


def load(folder: Path, kind: str | tuple[str, ...], base: Path | None) -> Checkpoint:
    """Read a checkpoint of the kind, or one of the kinds.

    Args:
        base: folder of the model that it is for; None: any.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, of another format, kind or base model.
    """
    description = describe(folder, *((kind,) if isinstance(kind, str) else kind))
    if sha256(folder / TENSORS) != description["tensors_sha256"]:
        raise ValueError(f"{folder / TENSORS} is damaged: copy the folder again")
    trained = description["base"]
    if base is not None and base_hash(base) != trained["sha256"]:
        raise ValueError(
            f"{folder} was trained with {trained['name']} (tensors' sha256 "
            f"{trained['sha256'][:12]}) and {base} has other weights: give the folder "
            "of that model, unchanged"
        )
    with safe_open(folder / TENSORS, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return Checkpoint(tensors, description)


def check_shapes(checkpoint: Checkpoint, expected: dict[str, tuple[int, ...]]) -> None:
    """
    Raises:
        ValueError: tensors are missing, too many, or of other shapes.
    """
    found = {name: tuple(t.shape) for name, t in checkpoint.tensors.items()}
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise ValueError(
                f"{name} has shape {found.get(name, 'none')}, the model and the "
                f"checkpoint's config need {expected.get(name, 'none')}: the files of "
                "this checkpoint do not belong together, copy all of them again"
            )
