# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""The block's byte layout: arithmetic, and that Python and C++ agree on it."""

import re
from pathlib import Path

import pytest
import torch

from vllm_sparse import ops
from vllm_sparse.cache import layout
from vllm_sparse.cache.layout import BLOCK_SIZE, BlockLayout

PARAMS_H = Path(__file__).parents[2] / "csrc" / "params.h"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HEAD_SIZES = [16, 64, 80, 96, 128, 256]


def empty(*shape, dtype=torch.int32):
    return torch.empty(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("head_size", "element_size", "codes", "params", "mean", "content"),
    [
        (64, 2, 32768, 36864, 37120, 292),  # 37248 / 128 = 291, made even
        (64, 4, 65536, 69632, 69888, 548),  # 547, made a multiple of 4
        (80, 2, 40960, 46080, 46400, 364),
        (96, 2, 49152, 55296, 55680, 438),
        (128, 2, 65536, 73728, 74240, 582),
        (128, 4, 131072, 139264, 139776, 1096),
        (256, 2, 131072, 147456, 148480, 1164),
    ],
)
def test_offsets_spelled_out(head_size, element_size, codes, params, mean, content):
    lay = BlockLayout(head_size, element_size)
    assert lay.codes_offset == codes
    assert lay.params_offset == params
    assert lay.prefix_mean_offset == mean
    assert lay.content_bytes == content


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_regions_follow_one_another_and_fit(head_size, dtype):
    lay = BlockLayout(head_size, dtype.itemsize)
    assert lay.codes_offset == BLOCK_SIZE * 2 * head_size * dtype.itemsize
    assert lay.params_offset - lay.codes_offset == head_size * BLOCK_SIZE // 2
    assert lay.prefix_mean_offset - lay.params_offset == head_size * 2 * 2
    used = lay.prefix_mean_offset + head_size * 2
    assert lay.content_bytes % dtype.itemsize == 0
    # Nothing smaller would do: C is what one token of 128 needs, in whole elements.
    assert used <= BLOCK_SIZE * lay.content_bytes
    assert used > BLOCK_SIZE * (lay.content_bytes - dtype.itemsize)
    # Vector loads of codes and fp16 values stay aligned.
    assert lay.codes_offset % 64 == lay.params_offset % 64 == 0


def test_overhead_of_the_common_model_shape():
    overhead = BlockLayout(128, 2).overhead
    assert overhead == pytest.approx(582 / 512 - 1)
    assert overhead <= 0.14


@pytest.mark.parametrize("head_size", [8, 60, 65, 127, 72])
def test_head_sizes_that_are_no_multiple_of_16_are_refused(head_size):
    with pytest.raises(ValueError, match=f"multiple of 16, got {head_size}"):
        BlockLayout(head_size, 2)


def test_score_bytes():
    # A channel of a block: 64 bytes of codes, scale and minimum in fp16.
    assert BlockLayout(64, 2).score_bytes(num_blocks=1, rank=1) == 68
    assert BlockLayout(128, 4).score_bytes(num_blocks=7, rank=32) == 7 * 32 * 68
    assert BlockLayout(128, 2).score_bytes(num_blocks=0, rank=32) == 0


def test_constants_equal_those_of_the_kernels():
    text = PARAMS_H.read_text()

    def constant(name):
        return re.search(rf"constexpr int {name} = ([^;]+);", text).group(1)

    assert int(constant("kBlockSize")) == BLOCK_SIZE
    assert int(constant("kLanes")) == layout.LANES
    assert constant("kCodeBytes") == "kBlockSize / 2"
    assert BlockLayout(64, 2).channel_code_bytes == BLOCK_SIZE // 2
    assert int(constant("kMaxHeadSize")) == max(HEAD_SIZES)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_ops_take_exactly_the_content_bytes_of_the_layout(head_size, dtype):
    content = BlockLayout(head_size, dtype.itemsize).content_bytes // dtype.itemsize

    def store_nothing(elements):
        cache = empty(1, 1, BLOCK_SIZE, elements, dtype=dtype)
        new = empty(0, 1, head_size, dtype=dtype)
        no_slots = empty(0, dtype=torch.int64)
        ops.store(new, new, cache, no_slots, empty(0, 1), empty(0), empty(1))

    store_nothing(content)
    for wrong in (content - 1, content + 1, 2 * head_size):
        with pytest.raises(
            RuntimeError,
            match=rf"kv_cache has {wrong * dtype.itemsize} bytes per token and head, "
            rf"expected {content * dtype.itemsize} for head size {head_size}",
        ):
            store_nothing(wrong)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_a_sealed_block_holds_every_region_at_its_offset(head_size, dtype):
    """Values whose bytes can be written down, without the reference's help."""
    lay = BlockLayout(head_size, dtype.itemsize)
    size = BLOCK_SIZE * lay.content_bytes
    cache = torch.full((2, 1, size), 0xFF, dtype=torch.uint8).view(dtype)
    cache = cache.view(2, 1, BLOCK_SIZE, -1)
    token, channel = torch.arange(BLOCK_SIZE), torch.arange(head_size)
    # Channel d takes the values d, d + 1, ..., d + 15 in an order of its own, all exact
    # in fp16 and, up to 256, in bf16; hence scale 1, minimum d, and these codes:
    codes = (token[:, None] * 7 + token[:, None] // 16 + channel) % 16
    base = channel % 128
    key = (codes + base).to(dtype)
    value = (channel % 8).to(dtype).expand(BLOCK_SIZE, -1)
    new = (key[:, None], value[:, None].contiguous())
    lists = ([[1]], [BLOCK_SIZE], [0, BLOCK_SIZE])
    where = (torch.tensor(ints, dtype=torch.int32) for ints in lists)
    ops.store(*new, cache, BLOCK_SIZE + token, *where)

    chunk = cache[1].flatten().view(torch.uint8)
    rows = chunk[: lay.codes_offset].view(dtype).view(BLOCK_SIZE, 2 * head_size)
    assert torch.equal(rows, torch.cat([key, value], dim=1))
    words = chunk[lay.codes_offset : lay.params_offset].view(torch.int32)
    words = words.view(head_size, layout.LANES)
    for t in (0, 1, 15, 16, 17, 77, 127):
        nibble = words[:, t % 16] >> (4 * (t // 16)) & 15
        assert torch.equal(nibble, codes[t].int())
    params = chunk[lay.params_offset : lay.prefix_mean_offset].view(torch.float16)
    params = params.view(head_size, 2)
    assert (params[:, 0] == 1).all()
    assert torch.equal(params[:, 1], base.half())
    end = lay.prefix_mean_offset + 2 * head_size
    mean = chunk[lay.prefix_mean_offset : end].view(torch.float16)
    assert torch.equal(mean, value[0].half())
    assert (chunk[end:] == 0xFF).all()
