# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Texts as token streams to cut windows from: what is on every machine with Python, or
what the training room packed and trains nothing on."""

import importlib.util
from collections.abc import Callable
from functools import cached_property
from itertools import chain
from pathlib import Path
from pydoc_data.topics import topics
from random import Random
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from vllm_sparse.train.synthetic import Synthetic

CODE_MODULES = ("argparse", "ast", "zipfile", "tarfile", "inspect", "typing")


class Tokenizer(Protocol):
    """What the tasks need of a Hugging Face tokenizer."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, token_ids: list[int]) -> str: ...

    def __len__(self) -> int: ...


class TextSources:
    """Prose and code of Python's own distribution, tokenized once.

    The text changes with Python's version, so figures compare only within one
    (the result header records it).
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    @cached_property
    def prefix(self) -> list[int]:
        """What the model expects before any text: ``<bos>``, or nothing."""
        return self.tokenizer.encode("")

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids)

    @cached_property
    def prose(self) -> list[list[int]]:
        """The language reference, one stream."""
        return [self.encode("\n\n".join(_paragraphs()))]

    @cached_property
    def plain_prose(self) -> list[list[int]]:
        """Its running text alone, one stream of 28,000 tokens: values hidden between
        code, grammar and tables are hard to find for small models even densely."""
        return [self._running_text(0.93)]

    @cached_property
    def long_prose(self) -> list[list[int]]:
        """The same, less strictly: 33,000 tokens."""
        return [self._running_text(0.88)]

    def _running_text(self, share: float) -> list[int]:
        """Paragraphs of which more than ``share`` are letters and plain punctuation."""
        paragraphs = (p for p in _paragraphs() if _is_plain(p, share))
        return self.encode("\n\n".join(paragraphs))

    @cached_property
    def code(self) -> list[list[int]]:
        """Standard-library modules, one stream each (15,000 tokens and more)."""
        paths = [importlib.util.find_spec(name).origin for name in CODE_MODULES]
        return [self.encode(Path(path).read_text("utf-8")) for path in paths]

    @property
    def origin(self) -> str:
        """For the result's header."""
        return "Python's own distribution"

    def window(self, streams: list[list[int]], length: int, rng: Random) -> list[int]:
        """``length`` consecutive tokens of one stream, starting at a line's start.

        Raises:
            ValueError: no stream is that long.
        """
        fitting = [stream for stream in streams if len(stream) > length]
        if not fitting:
            raise ValueError(f"no text of {length} tokens to cut a window from")
        stream = rng.choice(fitting)
        start = rng.randrange(len(stream) - length)
        start = self.next_boundary(stream, start, lambda text: text.endswith("\n"))
        start = min(start, len(stream) - length)
        return stream[start : start + length]

    def next_boundary(
        self, stream: list[int], start: int, ends: Callable[[str], bool], reach=200
    ) -> int:
        """First index from ``start`` on whose previous token ends as asked; ``start``
        itself when there is none within ``reach`` tokens."""
        for index in range(max(start, 1), min(start + reach, len(stream))):
            if ends(self.decode([stream[index - 1]])):
                return index
        return start


class PackedTexts(TextSources):
    """The held-out streams of packed text (``vllm_sparse.train data``): 0.36 million
    tokens of prose and 3.1 million of code, so that windows of 32K tokens come from
    many places. The same on every machine, whatever its Python.

    Raises:
        ValueError: the text was tokenised for another model than ``model``.
    """

    def __init__(self, tokenizer: Tokenizer, folder: Path, model: Path):
        from vllm_sparse.train.corpus import Corpus

        super().__init__(tokenizer)
        self.corpus = Corpus(folder, model)

    @property
    def origin(self) -> str:
        return f"held-out streams of packed text, sha256 {self.corpus.digest}"

    @cached_property
    def synthetic(self) -> "Synthetic":
        """The training room's maker of samples, to ask as it does."""
        from vllm_sparse.train.wordings import Wordings

        return Wordings.of(self.tokenizer)

    @cached_property
    def prose(self) -> list[list[int]]:
        return [self._stream("heldout-prose")]

    @cached_property
    def plain_prose(self) -> list[list[int]]:
        return self.prose

    @cached_property
    def long_prose(self) -> list[list[int]]:
        return self.prose

    @cached_property
    def code(self) -> list[list[int]]:
        return [self._stream("heldout-code")]

    def _stream(self, name: str) -> list[int]:
        """Documents end to end, as one text: ends of documents become empty lines."""
        ids = chain.from_iterable(part.tolist() for part in self.corpus.parts[name])
        line = self.encode("\n\n")
        pieces = (line if i == self.corpus.end else [i] for i in ids)
        return list(chain.from_iterable(pieces))


def _paragraphs() -> list[str]:
    """Topics share sections: one copy is kept, or "continue this passage" would have
    two right answers."""
    split = (topics[name].split("\n\n") for name in sorted(topics))
    return list(dict.fromkeys(chain.from_iterable(split)))


def _is_plain(paragraph: str, share: float) -> bool:
    letters = sum(char.isalpha() or char in " \n,." for char in paragraph)
    return (
        len(paragraph) > 100
        and paragraph[0].isalpha()
        and letters > share * len(paragraph)
    )
