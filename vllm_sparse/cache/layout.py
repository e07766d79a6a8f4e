# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""The byte layout of one KV block: the only place that describes it.

vLLM allocates the cache as ``[num_blocks, num_kv_heads, BLOCK_SIZE, C]``, head-major,
so each (block, KV head) owns one contiguous chunk of ``BLOCK_SIZE * C`` elements. For
head size D the chunk holds, in this order::

    rows         [BLOCK_SIZE][2 D]   model dtype  token-major, K then V
    codes        [D][BLOCK_SIZE/2]   uint8        4-bit K codes, channel-major
    params       [D][2]              float16      scale and minimum of each K channel
    prefix_mean  [D]                 float16      mean of V, context start to block end
    padding

Codes of one channel are 16 little-endian 32-bit words; word i holds the tokens
i, i + 16, ..., i + 112 in its nibbles 0, 1, ..., 7, so a 16-lane register yields 16
consecutive tokens with one shift. A code c of channel d stands for
``minimum[d] + c * scale[d]``. Everything after the rows is the *sidecar*; it is written
when the block's last token is stored (the block is then *sealed*).

Bare blocks have rows alone, and behind them a state that a method keeps there
(methods/less.py). Quantised formats (formats.py) have no rows; their chunk holds::

    codes         [D][BLOCK_SIZE/2]         the upper 4 bits of K's codes, as above
    low codes     [D][BLOCK_SIZE/2]         8-bit K only: the lower 4 bits, likewise
    params        [D][128/key group][2]     as above, for each group of tokens
    key rows      [BLOCK_SIZE][D]           K by token, 8 bits, where the format has it
    value codes   [BLOCK_SIZE][D * bits/8]  token-major
    value params  [BLOCK_SIZE][D/group][2]  float16, scale and minimum
    key row params [BLOCK_SIZE][2]          likewise, of a token's key row
    prefix_mean   [D]                       where the mean-value term is on
    padding

With 8-bit K the params are those of the upper bits, so that selection reads the same
bytes in every format; lower bits l add ``(l - 7.5) * scale / 16``. Of 4-bit values,
byte b of each 16 channels (8 bytes) holds channel b in its lower and b + 8 in its upper
bits.

The tokens of a block that is not full are rows in the chunks of the *next*
``lookahead_blocks`` blocks of the context, which its manager allocates early
(managers.py): the last rows in the nearest chunk, so that the next block's first rows
do not overwrite them and a block whose last tokens were rejected drafts can be sealed
again. ``tail_place`` says where a row is.

csrc/params.h repeats the offsets for the kernels; tests hold both together.
"""

from dataclasses import dataclass

from .formats import ROWS, KvFormat

BLOCK_SIZE = 128
CODE_BITS = 4
CODE_MAX = 2**CODE_BITS - 1
LANES = 16  # 32-bit words per channel; see the nibble order above
PARAM_BYTES = 2


# Numbers of a state's features (R of LESS, arXiv 2402.09398).
STATE_RANK = 8


def state_bytes(head_size: int) -> int:
    """One KV head's state of LESS: fp32 sums of features times V, and of features."""
    return 4 * STATE_RANK * (head_size + 1)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class BlockLayout:
    """Byte arithmetic of a (block, KV head) chunk.

    Args:
        head_size: D, a multiple of 16.
        element_size: bytes of one K or V element (2 or 4).
        fmt: how K and V are kept.
    """

    head_size: int
    element_size: int
    fmt: KvFormat = ROWS

    def __post_init__(self) -> None:
        if self.head_size % 16:
            raise ValueError(
                f"head_size must be a multiple of 16, got {self.head_size}"
            )

    @property
    def row_bytes(self) -> int:
        """K and V of one token."""
        return 2 * self.head_size * self.element_size

    @property
    def channel_code_bytes(self) -> int:
        """The codes of one channel over a block."""
        return BLOCK_SIZE * CODE_BITS // 8

    @property
    def codes_offset(self) -> int:
        return 0 if self.fmt.quantised else BLOCK_SIZE * self.row_bytes

    @property
    def low_codes_offset(self) -> int:
        """With 8-bit K; else where they would be."""
        return self.codes_offset + self.head_size * self.channel_code_bytes

    @property
    def params_offset(self) -> int:
        planes = 2 if self.fmt.key_bits == 8 else 1
        return self.codes_offset + planes * self.head_size * self.channel_code_bytes

    @property
    def key_groups(self) -> int:
        """Groups of tokens of a channel of K that share a scale."""
        return BLOCK_SIZE // self.fmt.key_group

    @property
    def channel_param_bytes(self) -> int:
        """Scales and minima of one channel of K over a block."""
        return self.key_groups * 2 * PARAM_BYTES

    @property
    def key_rows_offset(self) -> int:
        """With K by token; else where it would be."""
        return self.params_offset + self.head_size * self.channel_param_bytes

    @property
    def value_codes_offset(self) -> int:
        key_rows = BLOCK_SIZE * self.head_size if self.fmt.key_rows else 0
        return self.key_rows_offset + key_rows

    @property
    def value_code_bytes(self) -> int:
        """Codes of one token's V."""
        return self.head_size * self.fmt.value_bits // 8

    @property
    def value_params_offset(self) -> int:
        return self.value_codes_offset + BLOCK_SIZE * self.value_code_bytes

    @property
    def value_param_bytes(self) -> int:
        """Scales and minima of one token's V."""
        if not self.fmt.quantised:
            return 0
        return self.head_size // self.fmt.value_group * 2 * PARAM_BYTES

    @property
    def key_row_params_offset(self) -> int:
        """With K by token; else where they would be."""
        return self.value_params_offset + BLOCK_SIZE * self.value_param_bytes

    @property
    def prefix_mean_offset(self) -> int:
        params = BLOCK_SIZE * 2 * PARAM_BYTES if self.fmt.key_rows else 0
        return self.key_row_params_offset + params

    @property
    def content_bytes(self) -> int:
        """C in bytes: one token's share of the chunk, as vLLM's spec counts it."""
        used = self.prefix_mean_offset
        if self.fmt.bare:
            used = BLOCK_SIZE * self.row_bytes + self.fmt.state_bytes
        if self.fmt.has_mean:
            used += self.head_size * PARAM_BYTES
        per_token = -(-used // BLOCK_SIZE)
        return _round_up(per_token, self.element_size)

    @property
    def overhead(self) -> float:
        """Bytes of a block relative to the dense rows, less 1."""
        return self.content_bytes / self.row_bytes - 1

    def score_bytes(self, num_blocks: int, rank: int) -> int:
        """Bytes read to score ``num_blocks`` sealed blocks with ``rank`` channels."""
        channel = self.channel_code_bytes + self.channel_param_bytes
        return num_blocks * rank * channel

    @property
    def key_block_bytes(self) -> int:
        """A sealed block's K that is read whole where one token of it is."""
        return 0 if self.fmt.key_rows else self.value_codes_offset

    @property
    def token_bytes(self) -> int:
        """What a sealed token has to itself, quantised formats: V, and K by token."""
        key = self.head_size + 2 * PARAM_BYTES if self.fmt.key_rows else 0
        return key + self.value_code_bytes + self.value_param_bytes

    def attended_bytes(
        self, tokens: int, sealed_tokens: int = 0, sealed_blocks: int = 0
    ) -> int:
        """Bytes that attention to listed tokens reads of one KV head.

        Args:
            sealed_tokens: those of them in sealed blocks.
            sealed_blocks: these blocks, whose K by channel is read whole where there
                is no other.
        """
        if not self.fmt.quantised:
            return tokens * self.row_bytes
        rows = (tokens - sealed_tokens) * self.row_bytes
        codes = sealed_tokens * self.token_bytes
        return rows + codes + sealed_blocks * self.key_block_bytes

    @property
    def rows_per_block(self) -> int:
        """Rows of an unfilled block that the chunk of a block to come can hold."""
        return BLOCK_SIZE * self.content_bytes // self.row_bytes

    @property
    def lookahead_blocks(self) -> int:
        """Blocks that a request holds beyond those of its tokens."""
        return -(-BLOCK_SIZE // self.rows_per_block) if self.fmt.quantised else 0

    def tail_place(self, block_index: int, offset: int) -> tuple[int, int]:
        """Where the row of a token lies whose block is not sealed.

        Args:
            block_index: the block's place in the context.
            offset: the token's place in the block.

        Returns:
            place in the context of the block that holds the row, and the row's number
            in that block's chunk.
        """
        if not self.fmt.quantised:
            return block_index, offset
        ahead = self.lookahead_blocks - offset // self.rows_per_block
        return block_index + ahead, offset % self.rows_per_block
