# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""The byte layout of one KV block: the only place that describes it.

vLLM allocates the cache as ``[num_blocks, num_kv_heads, BLOCK_SIZE, C]``, head-major,
so each (block, KV head) owns one contiguous chunk of ``BLOCK_SIZE * C`` elements. For
head size D the chunk holds, in this order::

    rows         [BLOCK_SIZE][2 D]  model dtype  token-major, K then V
    codes        [D][BLOCK_SIZE/2]  uint8        4-bit K codes, channel-major
    params       [D][2]             float16      scale and minimum of each K channel
    prefix_mean  [D]                float16      mean of V, context start to block end
    padding

Codes of one channel are 16 little-endian 32-bit words; word i holds the tokens
i, i + 16, ..., i + 112 in its nibbles 0, 1, ..., 7, so a 16-lane register yields 16
consecutive tokens with one shift. A code c of channel d stands for
``minimum[d] + c * scale[d]``. Everything after the rows is the *sidecar*; it is written
when the block's last token is stored (the block is then *sealed*).

csrc/params.h repeats the offsets for the kernels; tests hold both together.
"""

from dataclasses import dataclass

BLOCK_SIZE = 128
CODE_BITS = 4
CODE_MAX = 2**CODE_BITS - 1
LANES = 16  # 32-bit words per channel; see the nibble order above
PARAM_BYTES = 2


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class BlockLayout:
    """Byte arithmetic of a (block, KV head) chunk.

    Args:
        head_size: D, a multiple of 16.
        element_size: bytes of one K or V element (2 or 4).
    """

    head_size: int
    element_size: int

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
        return BLOCK_SIZE * self.row_bytes

    @property
    def params_offset(self) -> int:
        return self.codes_offset + self.head_size * self.channel_code_bytes

    @property
    def prefix_mean_offset(self) -> int:
        return self.params_offset + self.head_size * 2 * PARAM_BYTES

    @property
    def content_bytes(self) -> int:
        """C in bytes: one token's share of the chunk, as vLLM's spec counts it."""
        used = self.prefix_mean_offset + self.head_size * PARAM_BYTES
        per_token = -(-used // BLOCK_SIZE)
        return _round_up(per_token, self.element_size)

    @property
    def overhead(self) -> float:
        """Sidecar bytes relative to the dense rows."""
        return self.content_bytes / self.row_bytes - 1

    def score_bytes(self, num_blocks: int, rank: int) -> int:
        """Bytes read to score ``num_blocks`` sealed blocks with ``rank`` channels."""
        return num_blocks * rank * (self.channel_code_bytes + 2 * PARAM_BYTES)
