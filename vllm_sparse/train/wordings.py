# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Samples in thousands of wordings.

A model trained on a few fixed forms learns those forms: what it is asked in other words
it answers in words of its own. Here keys are any words of the vocabulary, sentences are
put together at random and asked for in other words than they were stated in. For models
from random weights whole windows repeat random tokens, too, which is what makes heads
that look back appear early.
"""

from collections.abc import Callable

import numpy as np

from .synthetic import Fact, Sample, Synthetic, join

NOUNS = (
    "code weight price age label count date size page seat room password total height "
    "address reference score rate distance balance sum amount year volume"
)
LINKS = (
    "of the {key}",
    "of {key}",
    "on the {key}",
    "belonging to {key}",
    "under {key}",
    "that the {key} has",
)
TELL = ("is", "was", "equals", "=", "came to", "reads", "has been", "turned out as")
OPENINGS = ("The", "Note: the", "(The", "As all knew, the", "It says here that the")
CLOSINGS = (".", ")", "!", " and nothing else.", "", ";")
ASK = (
    "\n\nThe",
    "\n\nQ: the {noun} {link}?\nA: the",
    "\n\nName the {noun} {link}. The",
    "\n\nOnce again: the",
)
MEANWHILE = ("", "", " again", ", as stated earlier,", " given in this document")
CODE = (
    "{name}.{noun} = {value}",
    "{name}_{noun} = {value}",
    '{call}({noun}={value}, name="{name}")',
    '"{name}": {{"{noun}": {value}}},',
    '{call}.{noun}["{name}"] = {value}',
)
CODE_ASK = (
    ("assert {name}.{noun} ==", " {value}"),
    ("print({name}.{noun})  # prints", " {value}"),
    ('# {noun} of "{name}" is', " {value}"),
    ('# What {call} knows as {noun} of "{name}":', " {value}"),
    ("{name}_{noun} =", " {value}"),
)
# How a comment names what it asks about.
NAMES = ("{name}", "`{name}`")
# Never a key: what benchmarks/accuracy asks for, which a test compares.
NOT_KEYS = "apple river window guitar planet market forest bridge"


class Wordings(Synthetic):
    """Facts in random wordings, fixed forms, copies and repeated random tokens.

    Args:
        decode: one token id to its text; its words are the keys.
        reserved: that many ids at the vocabulary's start are no text.
        repeats: share of samples that are random tokens again and again.
        forms: most wordings in a window. Answers to the first question of a wording
            cannot follow the form of those before.
        comments: share of questions in code that are asked in words, as a comment,
            where no syntax says that a number follows.
    """

    def __init__(
        self,
        encode: Callable[[str], list[int]],
        decode: Callable[[int], str],
        vocabulary: int,
        answer_weight: float = 10.0,
        reserved: int = 32,
        repeats: float = 0.15,
        forms: int = 1,
        comments: float = 0.0,
    ):
        super().__init__(encode, decode, vocabulary, answer_weight)
        texts = [decode(i) for i in range(vocabulary)]
        words = [t[1:] for t in texts if t[:1] == " " and t[1:].isalpha()]
        plain = (w for w in words if len(w) > 2 and w.isascii() and w.islower())
        self.words = sorted(set(plain) - set(NOT_KEYS.split()))
        self.tokens = (reserved, vocabulary)
        self.repeated, self.forms, self.comments = repeats, forms, comments
        if len(self.words) < 32:
            raise ValueError(
                f"the tokenizer has {len(self.words)} whole words, keys need 32 or more"
            )

    def sample(self, kind: str, window, length: int, rng) -> Sample:
        """Random tokens again and again, and of the rest copies (29 %), facts in fixed
        forms (24 %; a third of them copies, too) or random wordings (47 %); as
        ``Synthetic.sample``."""
        # More to look up in longer windows, or it would count less and less.
        times = max(1, length // 2048)
        which = (rng.random() - self.repeated) / (1 - self.repeated)
        if which < 0:
            return self.repeats(length, rng)
        if which < 0.25 / 0.85:
            # Copied tokens are many and soon easy: not beyond what 8K windows have.
            return self.copies(kind, window(length), rng, 3 * min(times, 4))
        if which < 0.45 / 0.85:
            return super().sample(kind, window, length, rng)
        number = int(rng.choice([1, 2, 4, 8, 16])) * times
        number = min(number, max(1, length // 256), len(self.words) // 2)
        most = min(number, self.forms)
        forms = [self.wording(kind, rng) for _ in range(rng.integers(1, most + 1))]
        return self.facts(forms, window, length, rng, number)

    def wording(self, kind: str, rng) -> Fact:
        """A form of this sample's own."""

        def one(choices):
            return choices[rng.integers(len(choices))]

        noun = one(NOUNS.split())
        if kind == "code":
            asked, answer = one(CODE_ASK)
            if self.comments and rng.random() < self.comments:
                question = self._question(noun, one(LINKS), one(TELL), one)
                asked = "# " + question.strip().replace("\n", "\n# ")
                asked = asked.replace("{key}", one(NAMES))
            parts = [one(CODE), asked, answer]
            call = self.words[rng.integers(len(self.words))]
            fixed = [p.replace("{noun}", noun).replace("{call}", call) for p in parts]
            return fixed[0], fixed[1], fixed[2]
        link, tell = one(LINKS), one(TELL)
        again = tell if rng.random() < 0.5 else one(TELL)
        stated = f"{one(OPENINGS)} {noun} {link} {tell} {{value}}{one(CLOSINGS)}"
        return stated, self._question(noun, link, again, one), " {value}"

    @staticmethod
    def _question(noun: str, link: str, tell: str, one) -> str:
        ask = one(ASK).replace("{noun}", noun).replace("{link}", link)
        return f"{ask} {noun} {link}{one(MEANWHILE)} {tell}"

    def repeats(self, length: int, rng) -> Sample:
        """A run of random tokens over and over; repetitions count, half as answers do.

        Once they are learnt they add next to nothing to the loss. Short periods are as
        frequent as long ones.
        """
        period = int(np.exp(rng.uniform(np.log(8), np.log(length // 2))))
        run = rng.integers(*self.tokens, period)
        whole = np.tile(run, -(-length // period))[:length]
        return join([(whole[:period], 0.0), (whole[period:], self.answer_weight / 2)])

    def keys(self, rng, number: int) -> list[dict[str, str]]:
        """One or two words of the vocabulary each, all different."""
        size = int(rng.integers(1, 3))
        drawn = rng.choice(len(self.words), (number, size), replace=False)
        words = [[self.words[i] for i in row] for row in drawn]
        return [{"key": " ".join(w), "name": "_".join(w)} for w in words]
