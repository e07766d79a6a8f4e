# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""What of a model's files can be checked without loading them."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

# Some folders hold the weights a second time, under a name of their own.
PATTERNS = ("model*.safetensors", "*.safetensors", "*.bin", "*.pt", "*.gguf")


def weight_files(name: str) -> list[Path] | None:
    """The files of a model's weights; None where they are not on this machine."""
    folder = Path(name)
    if not folder.is_dir():
        try:
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(name, local_files_only=True))
        except Exception:  # not downloaded yet: the question has no answer
            return None
    return next((found for p in PATTERNS if (found := sorted(folder.glob(p)))), [])


def weight_problems(name: str) -> Iterator[str]:
    """What would stop vLLM from loading a model that is on this machine."""
    folder = Path(name)
    if not folder.is_dir():
        return
    config = folder / "config.json"
    if config.is_file() and not json.loads(config.read_text()).get("architectures"):
        yield f"{config} names no architectures: vLLM would not know the model"
    files = weight_files(name) or []
    if not files:
        yield f"{folder} holds no weights ({', '.join(PATTERNS[1:])})"
    for index in folder.glob("*.safetensors.index.json"):
        shards = set(json.loads(index.read_text())["weight_map"].values())
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
        except ValueError:
            return f"{file.name} is not a safetensors file"
    header.pop("__metadata__", None)
    ends = [tensor["data_offsets"][1] for tensor in header.values()]
    expected = 8 + length + max(ends, default=0)
    if size == expected:
        return None
    return f"{file.name} has {size:,} bytes and should have {expected:,}"
