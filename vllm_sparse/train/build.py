# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""``data``: fetch packages, split them, drop duplicates, tokenise, pack.

Needs apt-get and pip with their registries, 240 MB of downloads, 1 GB of disk and 3 GB
of memory; for 50 million tokens three minutes of two CPU cores. What it writes,
``corpus.py`` reads.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..checkpoint import sha256
from .corpus import FORMAT, MANIFEST, PART_TOKENS, tokenizer_hash
from .fetch import documents, fetch, matches
from .shingles import Shingles
from .sources import KINDS, SOURCES, Source, evaluated_texts

# A text of which more was seen before is a near-duplicate ...
MAX_SEEN = 0.5
# ... and one of which more is in held-out text would train on it.
MAX_HELD_OUT = 0.05
SOURCE_MEGABYTES = 12


@dataclass
class Gathered:
    """Token ids of one source's documents, and what became of the others."""

    source: Source
    train: list[np.ndarray] = field(default_factory=list)
    held_out: list[np.ndarray] = field(default_factory=list)
    held_out_paths: list[str] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)
    package: dict[str, str] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return sum(map(len, self.train))


def gather(
    source: Source,
    texts: Iterable[tuple[str, str]],
    encode: Callable[[list[str]], list[list[int]]],
    seen: Shingles,
    held_out: Shingles,
    end: int,
) -> Gathered:
    """Split and tokenise a source's documents; each ends in the token ``end``.

    Args:
        texts: (path, text).
        encode: texts to token ids, without special tokens.
        seen, held_out: shingles of all sources before, grown here.
    """
    gathered = Gathered(source, dropped={"duplicate": 0, "held out": 0})
    kept: dict[bool, list[str]] = {True: [], False: []}
    room = SOURCE_MEGABYTES * 1e6
    for path, text in texts:
        shingles = Shingles.of(text)
        is_held_out = matches(path, source.held_out)
        if is_held_out:
            held_out.seen |= shingles
            gathered.held_out_paths.append(path)
        if seen.share(shingles) > MAX_SEEN:
            gathered.dropped["duplicate"] += 1
        elif not is_held_out and held_out.share(shingles) > MAX_HELD_OUT:
            gathered.dropped["held out"] += 1
        elif (room := room - len(text)) > 0:
            kept[is_held_out].append(text)
        seen.seen |= shingles
    for is_held_out, ids in ((False, gathered.train), (True, gathered.held_out)):
        encoded = encode(kept[is_held_out])
        ids += [np.array([*i, end], dtype=np.uint16) for i in encoded]
    return gathered


def level(sizes: list[int], budget: int) -> int:
    """The most that each may give so that all together give the budget at most."""
    left = sorted(sizes)
    while left and left[0] * len(left) <= budget:
        budget -= left.pop(0)
    return budget // len(left) if left else max(sizes, default=0)


def take(documents: list[np.ndarray], limit: int) -> list[np.ndarray]:
    """The first documents, ``limit`` tokens at most, for which the last one is cut."""
    taken = []
    for ids in documents:
        if limit <= 0:
            break
        taken.append(ids[:limit])
        limit -= len(ids)
    return taken


def write_stream(folder: Path, name: str, documents: list[np.ndarray]) -> dict:
    """Parts of a stream (uint16, end to end) and the offsets of its documents, as an
    entry of the manifest. A part ends where a document does, if documents are short."""
    parts: list[list[np.ndarray]] = [[]]
    for ids in documents:
        for piece in np.split(ids, range(PART_TOKENS, len(ids), PART_TOKENS)):
            if sum(map(len, parts[-1])) + len(piece) > PART_TOKENS:
                parts.append([])
            parts[-1].append(piece)
    entries = []
    for i, pieces in enumerate(parts if documents else []):
        path = folder / f"{name}-{i:03d}.bin"
        np.concatenate(pieces).tofile(path)
        tokens = int(sum(map(len, pieces)))
        entry = {"file": path.name, "tokens": tokens, "sha256": sha256(path)}
        entries.append(entry)
    offsets = folder / f"{name}-offsets.npy"
    np.save(offsets, np.cumsum([0, *map(len, documents)]).astype(np.uint32))
    return {
        "tokens": sum(entry["tokens"] for entry in entries),
        "documents": len(documents),
        "parts": entries,
        "offsets": {"file": offsets.name, "sha256": sha256(offsets)},
    }


def write(folder: Path, gathered: list[Gathered], tokens: int, **extra) -> dict:
    """All streams and the manifest, which is returned.

    Args:
        tokens: of training at most, half of them prose if there is enough.
        extra: further entries of the manifest.
    """
    folder.mkdir(parents=True, exist_ok=True)
    streams, sources = {}, []
    budget = tokens
    for kind in KINDS:
        # Prose is what is short: code gets what it leaves.
        mine = [g for g in gathered if g.source.kind == kind]
        share = budget // 2 if kind == "prose" else budget
        limit = level([g.tokens for g in mine], share)
        taken = [take(g.train, limit) for g in mine]
        for name, chosen in {
            f"train-{kind}": list(chain.from_iterable(taken)),
            f"heldout-{kind}": [ids for g in mine for ids in g.held_out],
        }.items():
            streams[name] = write_stream(folder, name, chosen)
        budget -= streams[f"train-{kind}"]["tokens"]
        for g, chosen in zip(mine, taken, strict=True):
            entry = asdict(g.source) | g.package | {"dropped": g.dropped}
            entry["tokens"] = int(sum(map(len, chosen)))
            entry["held_out_tokens"] = int(sum(map(len, g.held_out)))
            sources.append(entry | {"held_out_paths": g.held_out_paths})
    manifest = {"format": FORMAT, **extra, "streams": streams, "sources": sources}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def main(arguments: list[str]) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m vllm_sparse.train data", description=__doc__
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokenizer", required=True, help="folder of the model")
    parser.add_argument("--million-tokens", type=float, default=50.0)
    parser.add_argument("--packages", type=Path, help="default: OUT/packages")
    parser.add_argument("--skip", nargs="+", default=[], metavar="SOURCE")
    args = parser.parse_args(arguments)
    if unknown := set(args.skip) - {source.name for source in SOURCES}:
        raise ValueError(f"--skip {' '.join(unknown)}: no such source in sources.py")

    from transformers import AutoTokenizer

    hashed = tokenizer_hash(args.tokenizer)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    if len(tokenizer) > 2**16:
        raise ValueError("token ids are stored in 16 bits; this vocabulary has more")
    end = end_of_document(tokenizer)

    def encode(texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    # Held-out text first, whatever its place in the table, so that what is like it is
    # dropped from training and not the other way round.
    order = sorted(SOURCES, key=lambda source: not source.held_out)
    chosen = [source for source in order if source.name not in args.skip]
    seen, held_out = Shingles(), Shingles()
    evaluated = evaluated_texts()
    for text in evaluated.values():
        held_out.seen |= Shingles.of(text)
    gathered = []
    for source in tqdm(chosen, file=sys.stderr):
        archive = fetch(source, args.packages or args.out / "packages")
        texts = list(documents(source, archive))
        texts.sort(key=lambda text: not matches(text[0], source.held_out))
        gathered.append(gather(source, texts, encode, seen, held_out, end))
        gathered[-1].package = {"archive": archive.name, "sha256": sha256(archive)}
        if not texts:
            raise RuntimeError(f"{archive.name} has none of {source.files}")
    manifest = write(
        args.out,
        gathered,
        int(args.million_tokens * 1e6),
        tokenizer=hashed,
        end_of_document=end,
        held_out_texts=sorted(evaluated),
        held_out_packages=[s.name for s in chosen if s.held_out == ("*",)],
        skipped=sorted(args.skip),
    )
    for name, stream in manifest["streams"].items():
        print(f"{name}: {stream['tokens'] / 1e6:.2f}M tokens, {stream['documents']}")


def end_of_document(tokenizer) -> int:
    """The token between documents of pre-training, or else the end of a turn."""
    token = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    known = token is not None and token != tokenizer.unk_token_id
    # SmolLM2's unknown token is this one.
    if known or tokenizer.unk_token == "<|endoftext|>":
        return token
    return tokenizer.eos_token_id
