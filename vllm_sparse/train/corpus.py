# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Packed text: streams of 16-bit token ids in parts, mapped into memory.

A folder holds ``manifest.json`` and for each stream (``train-prose``, ``train-code``,
``heldout-prose``, ``heldout-code``) parts ``NAME-000.bin`` (uint16, documents end to
end, each with its end-of-document token) and ``NAME-offsets.npy`` (uint32, where
documents begin, and the stream's end). Parts have at most 32 MB, to be moved singly.
"""

import hashlib
import json
from pathlib import Path

import numpy as np

from ..checkpoint import sha256

FORMAT = 2
MANIFEST = "manifest.json"
PART_TOKENS = 16_000_000


# What tokenizers treat differently, though their vocabulary be the same: forms of one
# character, kinds of white space, digits, scripts, special tokens.
PROBE = """Don't  naïve nai\u0308ve ﬁ ① \u00a0x 3.14159 日本語 🙂 <|endoftext|> <s>\r
\tdef f(x):\n\n    return 12345 != x  # \u200b\x07 \n"""


def tokenizer_hash(folder: str | Path) -> str:
    """Of what turns text into ids: vocabulary, merges, special tokens, and the ids of a
    probe. Versions of transformers write ``tokenizer.json`` differently."""
    from tokenizers import Tokenizer

    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"no {path}: give a model's folder (transformers' format)"
        )
    content = json.loads(path.read_text())
    model = content.get("model", {})
    merges = [m if isinstance(m, str) else " ".join(m) for m in model.get("merges", ())]
    added = [
        (token["id"], token["content"]) for token in content.get("added_tokens", ())
    ]
    try:
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        ids = tokenizer.encode(PROBE, add_special_tokens=False).ids
    except Exception as error:  # tokenizers has no class of its own for these
        raise ValueError(f"{path} cannot be read: {error}") from error
    parts = [model.get("vocab"), merges, added, ids]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class Corpus:
    """The streams of a folder, checked against their hashes.

    Raises:
        FileNotFoundError: a part is missing.
        ValueError: another format, a damaged part, ids of another tokenizer.
    """

    def __init__(self, folder: Path, tokenizer: str | Path | None = None):
        if not (folder / MANIFEST).is_file():
            make = f"python -m vllm_sparse.train data --out {folder} --tokenizer MODEL"
            raise FileNotFoundError(f"no {MANIFEST} in {folder}; make it with {make}")
        self.manifest = json.loads((folder / MANIFEST).read_text())
        if self.manifest["format"] != FORMAT:
            raise ValueError(f"{folder} has another format; build it again")
        if tokenizer and tokenizer_hash(tokenizer) != self.manifest["tokenizer"]:
            raise ValueError(
                f"{folder} was tokenised for another model than {tokenizer}; build it "
                "again with --tokenizer of this one"
            )
        self.end = self.manifest["end_of_document"]
        self.parts: dict[str, list[np.ndarray]] = {}
        for name, stream in self.manifest["streams"].items():
            for entry in stream["parts"]:
                if sha256(folder / entry["file"]) != entry["sha256"]:
                    raise ValueError(f"{entry['file']} differs from {MANIFEST}")
            self.parts[name] = [
                np.memmap(folder / entry["file"], dtype=np.uint16, mode="r")
                for entry in stream["parts"]
            ]

    @property
    def digest(self) -> str:
        """One hash for all of the text, for checkpoints and reports."""
        streams = json.dumps(self.manifest["streams"], sort_keys=True)
        return hashlib.sha256(streams.encode()).hexdigest()

    def tokens(self, name: str) -> int:
        return sum(map(len, self.parts[name]))

    def window(self, name: str, length: int, rng: np.random.Generator) -> np.ndarray:
        """``length`` consecutive tokens from anywhere in a stream: [length] int64.

        Raises:
            ValueError: no part is that long.
        """
        room = np.array([max(0, len(part) - length + 1) for part in self.parts[name]])
        if not room.sum():
            raise ValueError(f"no {length} tokens in {name}: use shorter windows")
        at = int(rng.integers(room.sum()))
        index = int(np.searchsorted(np.cumsum(room), at, side="right"))
        start = at - int(room[:index].sum())
        return self.parts[name][index][start : start + length].astype(np.int64)
