# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""What of a model's files can be checked without loading them."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

# Some folders hold the weights a second time, under a name of their own.
PATTERNS = ("model*.safetensors", "*.safetensors", "*.bin", "*.pt", "*.gguf")


# What training leaves beside weights.
TRAINING = ("training_args", "optimizer", "scheduler", "scaler", "rng_state")


def weight_files(name: str) -> list[Path] | None:
    """The files of a model's weights; None where they are not on this machine."""
    folder = model_folder(name)
    if folder is None:
        return None
    found = ([f for f in sorted(folder.glob(p)) if _is_weights(f)] for p in PATTERNS)
    return next(filter(None, found), [])


def model_folder(name: str) -> Path | None:
    """Where a model's files lie; None: not on this machine."""
    if Path(name).is_dir():
        return Path(name)
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, local_files_only=True))
    except Exception:  # not downloaded yet: the question has no answer
        return None


def _is_weights(file: Path) -> bool:
    return not file.name.startswith(TRAINING)


def weight_problems(name: str) -> Iterator[str]:
    """What would stop vLLM from loading a model that is on this machine."""
    folder = model_folder(name)
    if folder is None:
        return
    files = weight_files(name) or []
    if not files:
        yield f"{folder} holds no weights ({', '.join(PATTERNS[1:])})"
    for index in folder.glob("*.safetensors.index.json"):
        try:
            shards = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, TypeError):
            yield f"{index.name} is not an index of weights: it was not copied wholly"
            continue
        for shard in sorted(shards):
            if not (folder / shard).is_file():
                yield f"{index.name} names {shard}, which is not there"
    for file in files:
        if file.suffix == ".safetensors" and (problem := _truncated(file)):
            yield problem


def _truncated(file: Path) -> str | None:
    """A safetensors file's header says where its last tensor ends."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            return f"{file.name} ends within its header: it was not copied wholly"
        try:
            header = json.loads(opened.read(length))
            header.pop("__metadata__", None)
            ends = [tensor["data_offsets"][1] for tensor in header.values()]
        except (ValueError, KeyError, TypeError, AttributeError):
            return f"{file.name} is not a safetensors file"
    expected = 8 + length + max(ends, default=0)
    if size == expected:
        return None
    return f"{file.name} has {size:,} bytes and should have {expected:,}"
