# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""What sparse attention did: counts that add up over workers, and what they say."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from ..ops.kept import KEPT_BINS, KeptTokens, summary
from .counters import DENSE_REASONS

# Of a lossless engine's scheduler.
DRAFT_COUNTS = ("verifications", "drafted_tokens", "accepted_tokens")
# Where requests give blocks back.
HELD_COUNTS = ("blocks_given_back", "state_rows", "state_share_ppm")
HELD_NOW = ("requests_holding", "kv_bytes_held", "kv_bytes_held_most")


@dataclass(frozen=True)
class Figures:
    """Counts of an engine, or of part of its time.

    A row is a query position in one attention layer, all its heads together.

    Attributes:
        rows_sparse: decode rows that read less than everything.
        rows_dense: other rows by reason: ``prefill`` (tokens of prompts),
            ``unsupported_layer`` (vLLM's own backend serves the layer), ``dense_layer``
            (the options keep it dense), ``short_context`` (below ``dense_below``),
            ``budget_covers_context``.
        kv_bytes_read: bytes of KV cache that our layers' decode rows read, codes
            included, of all KV heads on all workers.
        kv_bytes_dense: what dense decoding reads for the same tokens in the model's
            dtype. Of lossless engines: what a dense verification reads, once for each
            token that it gives, so that :attr:`kv_fraction` is KV bytes read per token
            over those of dense decoding, drafts and verifications together.
        kept: histogram of the tokens that sparse rows kept per KV head; KEPT_BINS
            entries as in :mod:`vllm_sparse.ops.kept`.
        verifications: lossless engines: passes of one request that verified drafts.
        drafted_tokens, accepted_tokens: what they verified, and what of it became the
            answer; as vLLM counts them, with what lies beyond an answer's end.
        drafts_now: tokens that a request drafts at a time, at present; None: not a
            lossless engine.
        blocks_given_back: by requests while they ran (``streaming``, ``less``,
            ``anchor``).
        requests_holding, kv_bytes_held, kv_bytes_held_most: requests with blocks at
            present, bytes of KV cache that they hold together (blocks that several
            share count for each), and the one that holds most.
        state_rows, state_share_ppm: ``less`` on CPUs: of a sample of the rows from
            which something has left their number, and the sum of the shares of the
            attention mass that the state carried, in millionths.
    """

    rows_sparse: int
    rows_dense: Mapping[str, int]
    kv_bytes_read: int
    kv_bytes_dense: int
    kept: tuple[int, ...]
    verifications: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    drafts_now: int | None = None
    blocks_given_back: int = 0
    state_rows: int = 0
    state_share_ppm: int = 0
    requests_holding: int = 0
    kv_bytes_held: int = 0
    kv_bytes_held_most: int = 0

    @classmethod
    def of_counts(cls, counts: Mapping[str, int]) -> "Figures":
        """From counts by name: rows_*, kv_bytes_*, kept_<bin>, and those of drafts;
        absent ones are 0."""
        return cls(
            rows_sparse=counts.get("rows_sparse", 0),
            rows_dense={name: counts.get(f"rows_{name}", 0) for name in DENSE_REASONS},
            kv_bytes_read=counts.get("kv_bytes_read", 0),
            kv_bytes_dense=counts.get("kv_bytes_dense", 0),
            kept=tuple(counts.get(f"kept_{i}", 0) for i in range(KEPT_BINS)),
            drafts_now=counts.get("drafts_now"),
            **{n: counts.get(n, 0) for n in (*DRAFT_COUNTS, *HELD_COUNTS, *HELD_NOW)},
        )

    def __sub__(self, earlier: "Figures") -> "Figures":
        """What was counted after ``earlier``, of the same engine."""
        return Figures(
            rows_sparse=self.rows_sparse - earlier.rows_sparse,
            rows_dense={
                name: count - earlier.rows_dense[name]
                for name, count in self.rows_dense.items()
            },
            kv_bytes_read=self.kv_bytes_read - earlier.kv_bytes_read,
            kv_bytes_dense=self.kv_bytes_dense - earlier.kv_bytes_dense,
            kept=tuple(now - then for now, then in zip(self.kept, earlier.kept)),
            drafts_now=self.drafts_now,
            **{n: getattr(self, n) for n in HELD_NOW},
            **{
                n: getattr(self, n) - getattr(earlier, n)
                for n in (*DRAFT_COUNTS, *HELD_COUNTS)
            },
        )

    @property
    def decode_rows(self) -> int:
        """Rows of decoded tokens: all but those of prompts."""
        dense = sum(self.rows_dense.values()) - self.rows_dense["prefill"]
        return self.rows_sparse + dense

    @property
    def sparse_share(self) -> float | None:
        """Share of the decode rows served sparse; None before the first."""
        return self.rows_sparse / self.decode_rows if self.decode_rows else None

    @property
    def kv_fraction(self) -> float | None:
        """Fraction of the KV bytes that decoding read; None before the first."""
        return self.kv_bytes_read / self.kv_bytes_dense if self.kv_bytes_dense else None

    @property
    def kv_bytes_saved(self) -> int:
        """Negative where codes cost more than they save."""
        return self.kv_bytes_dense - self.kv_bytes_read

    @property
    def accepted_length(self) -> float | None:
        """Tokens that a verification of drafts gives; None before the first."""
        if not self.verifications:
            return None
        return 1 + self.accepted_tokens / self.verifications

    @property
    def draft_acceptance(self) -> float | None:
        """Share of the drafted tokens that were accepted; None before the first."""
        if not self.drafted_tokens:
            return None
        return self.accepted_tokens / self.drafted_tokens

    @property
    def kv_bytes_held_mean(self) -> float | None:
        """Of the requests that hold some at present; None: there are none."""
        if not self.requests_holding:
            return None
        return self.kv_bytes_held / self.requests_holding

    @property
    def state_share(self) -> float | None:
        """Mean share of the attention mass that states carried; None: no sample."""
        return self.state_share_ppm / 1e6 / self.state_rows if self.state_rows else None

    @cached_property
    def kept_tokens(self) -> KeptTokens:
        """Tokens per sparse row and KV head: number, mean, p50 and p99."""
        return summary(torch.tensor(self.kept))

    def __str__(self) -> str:
        dense = ", ".join(f"{n} {r}" for r, n in self.rows_dense.items() if n)
        if not self.decode_rows:
            return f"no decode rows yet; rows served dense: {dense or 'none'}"
        parts = [f"{self.sparse_share:.1%} of {self.decode_rows} decode rows sparse"]
        if self.kv_bytes_dense:
            saved = self.kv_bytes_saved / 2**20
            parts.append(
                f"{self.kv_fraction:.1%} of the KV bytes read ({saved:.1f} MiB saved)"
            )
        if self.kept_tokens.rows:
            kept = self.kept_tokens
            parts.append(
                f"sparse rows keep {kept.mean:.0f} tokens per KV head in the mean "
                f"(p50 {kept.p50:.0f}, p99 {kept.p99:.0f})"
            )
        if self.accepted_length:
            parts.append(
                f"{self.accepted_length:.2f} tokens per verification "
                f"({self.draft_acceptance or 0:.1%} of {self.drafted_tokens} drafted "
                f"tokens accepted; {self.drafts_now} drafts at a time now)"
            )
        if self.blocks_given_back:
            parts.append(f"{self.blocks_given_back} blocks given back")
        if self.requests_holding:
            mean, most = (
                self.kv_bytes_held_mean / 2**20,
                self.kv_bytes_held_most / 2**20,
            )
            parts.append(
                f"{self.requests_holding} requests hold {mean:.1f} MiB in the mean, "
                f"{most:.1f} at most"
            )
        if self.state_share is not None:
            parts.append(f"states carry {self.state_share:.1%} of the attention mass")
        return f"{', '.join(parts)}; rows served dense: {dense or 'none'}"


def add_up(replies: Iterable[Mapping[str, int]]) -> Counter[str]:
    """Counts of an engine from those of its workers.

    Ranks of tensor parallelism have the same rows and different heads: bytes and kept
    tokens are summed over all workers, rows over those of one rank of each pipeline
    stage.

    Args:
        replies: of :func:`vllm_sparse.stats.reader.report`.
    """
    replies = list(replies)
    first = min(reply["tp_rank"] for reply in replies)
    total: Counter[str] = Counter()
    for reply in replies:
        for name, count in reply.items():
            rows = name.startswith("rows_") and reply["tp_rank"] == first
            if rows or name.startswith(("k", "state_")):
                total[name] += count
    return total
