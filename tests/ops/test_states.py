# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""States of what has left: Triton's kernels against methods/less.py."""

from dataclasses import replace

import pytest
import torch

from vllm_sparse.cache.formats import BARE
from vllm_sparse.cache.layout import STATE_RANK, BlockLayout, state_bytes
from vllm_sparse.methods.less import LEAST, Kernels, add_state, seal, state_of_blocks

from .inputs import BF16, F32, GPU, INTERPRETED, generator

pytest.importorskip("triton")
SINKS = 1
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [] if INTERPRETED else [*GPU]
# Query and KV heads, head size, numbers between a feature's layers.
SHAPES = [(4, 2, 64, 64), (6, 1, 80, 24), (2, 2, 128, 16)]


def random_kernels(heads: int, kv_heads: int, size: int, hidden: int) -> Kernels:
    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator(sum(shape))) * 0.4

    return Kernels(
        q1=random(heads, size, hidden),
        q2=random(heads, hidden, STATE_RANK),
        k1=random(kv_heads, size, hidden),
        k2=random(kv_heads, hidden, STATE_RANK),
        k3=random(kv_heads, STATE_RANK, STATE_RANK),
        s1=random(kv_heads, STATE_RANK),
        s2=random(kv_heads, STATE_RANK),
    )


def on(device: str, kernels: Kernels) -> Kernels:
    return Kernels(**{n: t.to(device) for n, t in vars(kernels).items()})


@pytest.mark.parametrize("dtype", [F32, BF16] if INTERPRETED else [BF16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_states_and_what_they_answer(shape, dtype):
    from vllm_sparse.kernels.triton.less import add_states, seal_states

    heads, kv_heads, size, hidden = shape
    fmt = replace(BARE, state_bytes=state_bytes(size))
    lay = BlockLayout(size, dtype.itemsize, fmt)
    room = lay.content_bytes // dtype.itemsize
    cache = torch.randn(9, kv_heads, 128, room, generator=generator(1)).to(dtype)
    kernels = random_kernels(*shape)
    # A chain through blocks 5, 3, 7, 8, in which another request joins at 3; no job.
    jobs = [(0, 5, 0), (1, 3, 5), (2, 7, 3), (2, 6, 3), (3, 8, 7)]
    expected = cache.clone()
    seal(kernels, expected, jobs, SINKS, size)
    place, block, before = torch.tensor([*jobs, (-1, -1, -1)]).int().unbind(1)
    found = cache.to(DEVICE)
    columns = [t.contiguous().to(DEVICE) for t in (block, before, place)]
    seal_states(found, on(DEVICE, kernels), columns, SINKS, lay)
    states = state_of_blocks(expected, size)[[5, 3, 7, 6, 8]]
    assert (states[0] == 0).all() and (states[1:] != 0).any((1, 2, 3)).all()
    got = state_of_blocks(found.cpu(), size)[[5, 3, 7, 6, 8]]
    torch.testing.assert_close(got, states, atol=2e-2, rtol=2e-3)

    rows = 3
    query, out = (
        torch.randn(rows, heads, size, generator=generator(n)).to(dtype) for n in (2, 3)
    )
    lse = torch.randn(rows, heads, generator=generator(4)) + 2
    skipped = torch.tensor([0, 1, 3], dtype=torch.int32)
    table = torch.tensor([[5, 3, 7, 8]] * rows, dtype=torch.int32)
    left = torch.tensor([3, 8])  # the blocks of rows 1 and 2
    want = out.clone()
    state = state_of_blocks(expected, size)[left]
    want[1:] = add_state(kernels, query[1:], state, lse[1:], out[1:])[0].to(dtype)
    there = [t.to(DEVICE) for t in (query, out, lse, skipped, table)]
    add_states(*there, found, on(DEVICE, kernels), SINKS, LEAST, lay)
    close = dict(atol=2e-2 if dtype == BF16 else 1e-4, rtol=1e-2)
    torch.testing.assert_close(there[1].cpu().float(), want.float(), **close)
    assert torch.equal(there[1].cpu()[0], out[0])
