# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""The tasks: a prompt, and the tokens forced through decoding after it.

Sample i of a task at a length is the same for every method and every run, given the
tokenizer and Python's version.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from random import Random

import numpy as np

from benchmarks.accuracy.text import PackedTexts, TextSources

TAIL_TOKENS = 128
# SparQ's repetition task begins the passage again with 256 characters.
REPETITION_CUE_TOKENS = 64
# Depth 0 fails densely at 7,500 tokens on small models.
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
ANSWER_TOKENS = 16


@dataclass(frozen=True)
class Form:
    """How values are hidden in a kind of text, and asked for."""

    header: str
    hidden: str
    question: str
    # How a token may end that a value is hidden after.
    ends: tuple[str, ...]


FORMS = {
    "prose": Form(
        header="Some special magic numbers are hidden within the following text. Make "
        "sure to memorize them. I will quiz you about the numbers afterwards.\n\n",
        hidden=" One of the special magic numbers for {key} is: {value}. ",
        question="\n\nWhat is the special magic number for {key} mentioned in the "
        "provided text? The special magic number for {key} mentioned in the provided "
        "text is",
        ends=(".", ".\n", "\n\n"),
    ),
    "code": Form(
        header="",
        hidden='\nregister("{key}", port={value})\n\n',
        question='\n\n# The port that "{key}" has been registered with is',
        ends=("\n",),
    ),
}
KEYS = ("apple", "river", "window", "guitar", "planet", "market", "forest", "bridge")


@dataclass(frozen=True)
class Sample:
    """One prompt and its continuation, as token ids."""

    prompt_ids: list[int]
    # Emitted one by one in decoding. The first token's probabilities come from the
    # prompt's (dense) prefill, so the metrics leave it out.
    forced_ids: list[int]
    # What greedy decoding has to say for a hit; None where there is no question.
    answer: str | None = None
    depth: float | None = None


def needle(
    sources: TextSources,
    length: int,
    rng: Random,
    index: int,
    num_keys: int = 1,
    kind: str = "prose",
) -> Sample:
    """``num_keys`` keys with 7-digit values hidden in ``kind``; one is asked for."""
    form = FORMS[kind]
    keys = rng.sample(KEYS, num_keys)
    values = [str(rng.randrange(1_000_000, 10_000_000)) for _ in keys]
    depths = [DEPTHS[index % len(DEPTHS)]]
    depths += rng.sample([d for d in DEPTHS if d != depths[0]], num_keys - 1)
    head = sources.encode(form.header)
    hidden = [
        sources.encode(form.hidden.format(key=key, value=value))
        for key, value in zip(keys, values, strict=True)
    ]
    question = sources.encode(form.question.format(key=keys[0]))
    room = length - sum(map(len, (head, *hidden, question)))
    if kind == "code":
        streams = sources.code
    else:
        is_long = room >= len(sources.plain_prose[0])
        streams = sources.long_prose if is_long else sources.plain_prose
    text = sources.window(streams, room, rng)
    # Deepest first, so that earlier positions stay valid.
    for depth, sentence in sorted(zip(depths, hidden, strict=True), reverse=True):
        at = sources.next_boundary(
            text, int(depth * room), lambda t: t.endswith(form.ends)
        )
        text = text[:at] + sentence + text[at:]
    return Sample(
        prompt_ids=head + text + question,
        forced_ids=sources.encode(f" {values[0]}"),
        answer=values[0],
        depth=depths[0],
    )


def repetition(sources: TextSources, length: int, rng: Random, index: int) -> Sample:
    """A passage of the context is begun again; its continuation is forced."""
    separator = sources.encode("\n\n")
    text_length = length - len(separator) - REPETITION_CUE_TOKENS
    text = sources.window(sources.prose, text_length, rng)
    span = REPETITION_CUE_TOKENS + TAIL_TOKENS
    depth = DEPTHS[index % len(DEPTHS)]
    at = int(depth * (text_length - span))
    cue_end = at + REPETITION_CUE_TOKENS
    return Sample(
        prompt_ids=text + separator + text[at:cue_end],
        forced_ids=text[cue_end : at + span],
        depth=depth,
    )


def tail(
    sources: TextSources, length: int, rng: Random, index: int, kind: str
) -> Sample:
    """A window of ``kind`` ("prose" or "code"); its last tokens are forced."""
    window = sources.window(getattr(sources, kind), length + TAIL_TOKENS, rng)
    return Sample(prompt_ids=window[:length], forced_ids=window[length:])


def fact(
    sources: PackedTexts, length: int, rng: Random, index: int, kind: str
) -> Sample:
    """The training room's held-out fact, made as its evaluation makes it (``needle``
    and ``needle_code`` there): for models of its own that are too small for other
    questions."""
    seed, depth = rng.getrandbits(64), DEPTHS[index % len(DEPTHS)]

    def made(total: int):
        draws = np.random.default_rng(seed)
        window = partial(sources.corpus.window, f"heldout-{kind}", rng=draws)
        return sources.synthetic.held_out(kind, window, total, draws, depth)

    # The room counts the answer, whose size is drawn, into the length.
    total = length + made(length).answer
    ids = made(total).ids.tolist()
    return Sample(
        prompt_ids=ids[:length],
        forced_ids=ids[length:],
        answer=sources.decode(ids[length:]).strip(),
        depth=depth,
    )


TaskBuilder = Callable[[TextSources, int, Random, int], Sample]

TASKS: dict[str, TaskBuilder] = {
    "needle": needle,
    "needle_2keys": partial(needle, num_keys=2),
    "needle_4keys": partial(needle, num_keys=4),
    "needle_code": partial(needle, kind="code"),
    "needle_code_2keys": partial(needle, num_keys=2, kind="code"),
    "needle_code_4keys": partial(needle, num_keys=4, kind="code"),
    "repetition": repetition,
    "prose": partial(tail, kind="prose"),
    "code": partial(tail, kind="code"),
}
# Only with packed text, whose held-out streams they ask in.
PACKED_TASKS = {
    "fact": partial(fact, kind="prose"),
    "fact_code": partial(fact, kind="code"),
}


def make_samples(
    task: str, sources: TextSources, length: int, count: int
) -> list[Sample]:
    """The first ``count`` samples of a task; prompts have ``length`` tokens exactly,
    the model's ``<bos>`` included.

    Raises:
        KeyError: unknown task.
        ValueError: the text sources are shorter than ``length``, or not packed text
            where the task needs it.
    """
    if task in PACKED_TASKS and not isinstance(sources, PackedTexts):
        raise ValueError(f"the task {task!r} needs packed text: give --texts")
    builder: TaskBuilder = (TASKS | PACKED_TASKS)[task]
    prefix = sources.prefix
    samples = []
    for index in range(count):
        # Seeding with a string is stable across processes, unlike hash().
        rng = Random(f"{task}/{length}/{index}")
        sample = builder(sources, length - len(prefix), rng, index)
        samples.append(replace(sample, prompt_ids=prefix + sample.prompt_ids))
    return samples
