# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""What texts share, by hashes of their runs of words."""

import re
from zlib import crc32

WORDS = 10
# One hash in this many is kept, by its value, hence the same ones in every text.
SAMPLING = 8


class Shingles:
    """A set of the runs of ``WORDS`` words seen so far, sampled."""

    def __init__(self):
        self.seen: set[int] = set()

    @staticmethod
    def of(text: str) -> set[int]:
        """Sampled hashes of a text's runs, whatever their case, spacing and marks."""
        words = re.findall(r"\w+", text.lower())
        runs = (" ".join(words[i : i + WORDS]) for i in range(len(words) - WORDS + 1))
        hashes = (crc32(run.encode()) for run in runs)
        return {value for value in hashes if value % SAMPLING == 0}

    def share(self, shingles: set[int]) -> float:
        """Which part of a text's shingles were seen, 0 to 1."""
        return len(shingles & self.seen) / max(1, len(shingles))
