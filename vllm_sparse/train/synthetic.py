# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Samples made on the spot: facts to look up and passages to copy, in prose and code.

Their wording differs from that of benchmarks/accuracy on purpose: what those measure is
the ability, not this format. ``HELD_OUT_FACT`` and ``HELD_OUT_CODE`` are never trained
on either.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Self

import numpy as np

# What a text says, how it is asked for, and what answers.
Fact = tuple[str, str, str]
FACTS: dict[str, tuple[Fact, ...]] = {
    "prose": (
        (
            "The courier left the {key}; its label read {value}.",
            "The label on the {key} read",
            " {value}.",
        ),
        (
            "(In the catalogue the {key} has shelf mark {value}.)",
            "Shelf mark of the {key}, as given above:",
            " {value}.",
        ),
        (
            "Keep in mind that the {key} is locked, and {value} opens it.",
            "Q: What opens the {key}?\nA:",
            " {value}",
        ),
        (
            "They paid {value} for the {key}, which everyone thought too much.",
            "For the {key} they paid",
            " {value}.",
        ),
    ),
    "code": (
        ("{name} = {value}", "assert {name} ==", " {value}"),
        (
            "def {name}():\n    return {value}",
            ">>> {name}()\n",
            "{value}",
        ),
        (
            'settings["{name}"] = {value}',
            'print(settings["{name}"])  # prints',
            " {value}",
        ),
    ),
}
HELD_OUT_FACT: Fact = (
    "According to the visitors' book, the number of the {key} was {value}.",
    "The visitors' book says that the number of the {key} was",
    " {value}",
)
HELD_OUT_CODE: Fact = (
    'tickets.issue("{name}", serial={value})',
    '# Serial on the ticket that was issued to "{name}" is',
    " {value}",
)
AGAIN = {"prose": "Once more, from above:\n", "code": "# The same lines again:\n"}
# What is asked for: one word of each.
QUALITIES = (
    "copper broken painted heavy folded silver narrow borrowed wooden empty "
    "striped ancient velvet rusty polished crooked hollow woven marble frozen"
)
THINGS = (
    "lantern trunk ladder violin barrel mirror saddle kettle anchor cabinet "
    "carpet compass telescope basket clock ledger statue drum curtain plough"
)


@dataclass(frozen=True)
class Sample:
    """A window of text.

    Attributes:
        ids: [length] int64.
        weights: [length] float32, how much the prediction of each token counts.
        answer: how many tokens at the end are the last answer.
    """

    ids: np.ndarray
    weights: np.ndarray
    answer: int = 0


class Synthetic:
    """Makes samples out of windows of text.

    Args:
        encode: text to token ids, without special tokens.
        decode: one token id to its text.
        vocabulary: token ids there are.
        answer_weight: how much a token of an answer or of a copy counts.
    """

    def __init__(
        self,
        encode: Callable[[str], list[int]],
        decode: Callable[[int], str],
        vocabulary: int,
        answer_weight: float = 20.0,
    ):
        self.encode = encode
        self.answer_weight = answer_weight
        # [vocabulary] bool
        self.ends_line = np.array([decode(i).endswith("\n") for i in range(vocabulary)])

    @classmethod
    def of(cls, tokenizer, **options) -> Self:
        """From a tokenizer of transformers'."""
        return cls(
            lambda text: tokenizer.encode(text, add_special_tokens=False),
            token_text(tokenizer),
            len(tokenizer),
            **options,
        )

    def sample(self, kind: str, window, length: int, rng) -> Sample:
        """Facts or, one time in three, copies.

        Args:
            kind: "prose" or "code".
            window: a function that gives that many tokens of text.
        """
        if rng.random() < 1 / 3:
            return self.copies(kind, window(length), rng)
        facts = min(int(rng.choice([1, 2, 4, 8, 16])), max(1, length // 128))
        form = FACTS[kind][rng.integers(len(FACTS[kind]))]
        return self.facts([form], window, length, rng, facts)

    def facts(
        self,
        forms: Sequence[Fact],
        window,
        length: int,
        rng,
        number: int = 1,
        depth: float | None = None,
    ) -> Sample:
        """``number`` facts in a text, all asked for at its end in any order.

        Args:
            forms: what they are stated in, one after the other, and again.
            depth: where the only fact stands, 0 to 1; by itself anywhere.
        """
        facts = [{"value": self.value(rng)} | key for key in self.keys(rng, number)]
        said = [
            [part.format(**fact) for part in forms[i % len(forms)]]
            for i, fact in enumerate(facts)
        ]
        stated = [self.encode(f"\n{fact}\n") for fact, _, _ in said]
        asked: list[tuple[list[int], float]] = []
        for i in rng.permutation(number):
            asked.append((self.encode("\n\n" + said[i][1]), 1.0))
            asked.append((self.encode(said[i][2]), self.answer_weight))
        room = length - sum(map(len, stated)) - sum(len(ids) for ids, _ in asked)
        if room < 1:
            raise ValueError(f"{number} facts do not fit into {length} tokens")
        text = window(room)
        places = rng.integers(0, room, number) if depth is None else [int(depth * room)]
        pieces, start = [], 0
        for place, statement in zip(np.sort(places), stated, strict=True):
            place = max(start, self._line_end(text, int(place)))
            pieces += [text[start:place], statement]
            start = place
        return join([(p, 1.0) for p in [*pieces, text[start:]]] + asked)

    def held_out(self, kind: str, window, length: int, rng, depth: float) -> Sample:
        """One fact in a form that is never trained on, for evaluation; ``sample``'s
        ``kind`` and ``window``."""
        form = HELD_OUT_CODE if kind == "code" else HELD_OUT_FACT
        return self.facts([form], window, length, rng, depth=depth)

    def copies(self, kind: str, text: np.ndarray, rng, most: int = 3) -> Sample:
        """One to ``most`` passages of the text begun again at its end and continued."""
        length, again = len(text), self.encode("\n\n" + AGAIN[kind])
        # Tokens of the cue, and of what follows it, of each copy.
        sizes = [
            (int(rng.integers(8, 49)), int(rng.integers(24, 161)))
            for _ in range(int(rng.integers(1, most + 1)))
        ]
        while sizes and self._copied(sizes, again) > length // 2:
            sizes.pop()
        text = text[: length - self._copied(sizes, again)]
        pieces: list[tuple[np.ndarray | list[int], float]] = [(text, 1.0)]
        for cue, span in sizes:
            last = len(text) - cue - span
            at = min(self._line_end(text, int(rng.integers(last + 1))), last)
            middle = at + cue
            pieces += [(again, 1.0), (text[at:middle], 1.0)]
            pieces.append((text[middle : middle + span], self.answer_weight))
        return join(pieces)

    def keys(self, rng, number: int) -> list[dict[str, str]]:
        """Different things, as prose and as code name them."""
        pairs = list(product(QUALITIES.split(), THINGS.split()))
        pairs = [pairs[i] for i in rng.choice(len(pairs), number, replace=False)]
        return [{"key": " ".join(pair), "name": "_".join(pair)} for pair in pairs]

    def value(self, rng) -> str:
        """A number of four to nine digits."""
        digits = int(rng.integers(4, 10))
        return str(rng.integers(10 ** (digits - 1), 10**digits))

    @staticmethod
    def _copied(sizes: list[tuple[int, int]], again: list[int]) -> int:
        return sum(len(again) + cue + span for cue, span in sizes)

    def _line_end(self, text: np.ndarray, start: int, reach: int = 200) -> int:
        """The first place from ``start`` on behind a line's end, or ``start``."""
        ends = np.flatnonzero(self.ends_line[text[start : start + reach]])
        return start + 1 + int(ends[0]) if len(ends) else start


def token_text(tokenizer) -> Callable[[int], str]:
    """Text of a token within a text: alone, some tokenizers drop the space before."""
    first = tokenizer.encode("a", add_special_tokens=False)
    before = tokenizer.decode(first)
    return lambda token: str(tokenizer.decode([*first, token])).removeprefix(before)


def join(pieces) -> Sample:
    ids = np.concatenate([np.asarray(ids, dtype=np.int64) for ids, _ in pieces])
    weights = np.repeat([w for _, w in pieces], [len(ids) for ids, _ in pieces])
    return Sample(ids, weights.astype(np.float32), len(pieces[-1][0]))
