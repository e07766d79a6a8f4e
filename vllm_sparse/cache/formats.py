# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""How a block keeps K and V: rows in the model's dtype, or quantised as in KIVI."""

from dataclasses import dataclass, replace

# A token's row of V is cut into groups of channels with a scale and minimum each.
VALUE_GROUPS = (16, 32, 64, 128)


@dataclass(frozen=True)
class KvFormat:
    """One format (KIVI, arXiv 2402.02750, section 3: K per channel, V per token).

    In quantised formats a block's tokens are quantised when its last one is stored. A
    query's own block is always read in full precision: of ``seq_len`` tokens the last 1
    to BLOCK_SIZE are exact, the *tail*, and those before them are codes.

    Attributes:
        name: as ``sparse.kv_format`` calls it.
        key_bits: 4 or 8, of K by channel; 0: rows.
        value_bits: 4 or 8; 0: rows.
        value_group: channels of V that share a scale.
        key_group: tokens of a channel of K that share a scale: the block, or 32.
        key_rows: K is kept a second time, 8 bits by token with a scale for each token.
            Selection reads the first, attention the second.
        has_mean: the block also holds the mean of V up to its end.
        bare: rows alone, without codes: nothing to choose tokens by.
        state_bytes: of a bare block, behind its rows: a method's own (LESS).
    """

    name: str
    key_bits: int = 0
    value_bits: int = 0
    value_group: int = 0
    key_group: int = 128
    key_rows: bool = False
    has_mean: bool = True
    bare: bool = False
    state_bytes: int = 0

    @property
    def quantised(self) -> bool:
        return self.key_bits > 0

    @property
    def reads_whole_keys(self) -> bool:
        """Whether attention reads all of K in a block of which it reads a token."""
        return self.quantised and not self.key_rows

    @property
    def code(self) -> int:
        """The format as the compiled ops take it."""
        if self.bare:
            return self.state_bytes | 1 << 50
        if not self.quantised:
            return 0
        groups = self.value_group << 16 | self.key_group << 32
        flags = self.has_mean << 48 | self.key_rows << 49
        return self.key_bits | self.value_bits << 8 | groups | flags

    def sealed_blocks(self, seq_len: int, block_size: int = 128) -> int:
        """Blocks of a context that are read from their codes."""
        return (seq_len - int(self.quantised)) // block_size

    def tail_tokens(self, seq_len: int, block_size: int = 128) -> int:
        """Tokens after them."""
        return seq_len - self.sealed_blocks(seq_len, block_size) * block_size


ROWS = KvFormat("auto")
BARE = KvFormat("auto", bare=True, has_mean=False)
FORMATS = {
    fmt.name: fmt
    for fmt in (
        ROWS,
        KvFormat("int8", key_bits=8, value_bits=8, value_group=64),
        KvFormat("int4", key_bits=4, value_bits=4, value_group=32, key_group=32),
        KvFormat("k4v8", key_bits=4, value_bits=8, value_group=64, key_group=32),
        KvFormat("k8v4", key_bits=4, value_bits=4, value_group=32, key_rows=True),
    )
}


def value_groups(head_size: int) -> list[int]:
    """Group sizes that fit a head size."""
    return [group for group in VALUE_GROUPS if head_size % group == 0]


def resolve_format(
    name: str, value_group: int | None, head_size: int, has_mean: bool = True
) -> KvFormat:
    """The format of a layer.

    Args:
        name: one of ``FORMATS``.
        value_group: channels of V that share a scale; None: the format's own, or the
            next smaller one that divides the head size.
        has_mean: whether the mean-value term is on; costs 2 bytes a channel and block.

    Raises:
        ValueError: the group does not divide the head size; says what would.
    """
    fmt = FORMATS[name]
    if not fmt.quantised:
        return fmt
    fitting = value_groups(head_size)
    if value_group is None:
        value_group = max(g for g in fitting if g <= fmt.value_group)
    elif value_group not in fitting:
        raise ValueError(
            f"a group of {value_group} channels does not divide the head size "
            f"{head_size}; it must be one of {fitting}"
        )
    return replace(fmt, value_group=value_group, has_mean=has_mean)
