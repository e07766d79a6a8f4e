# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Every op on a device against its reference, on one small ragged batch."""

import torch

from ..cache.layout import BLOCK_SIZE, BlockLayout
from . import SparqOptions, bound, reference

LENS, BUDGETS = [700, 129, 300], [200, 129, 90]
HEADS, KV_HEADS, SIZE, DTYPE = 8, 2, 128, torch.bfloat16
TOLERANCE = 8e-3  # relative error (norm) that rounding to DTYPE explains


def check_ops(kernels: str, device: torch.device) -> None:
    """Run the ops with a choice of kernels (``sparse.kernels``).

    Raises:
        AssertionError: an op differs from its reference; the message names it.
        KernelsError: the choice cannot serve ``device``.
    """
    ops, generator = bound(kernels, device), torch.Generator().manual_seed(0)

    def both(name: str, **given) -> dict:
        """An op on the device, and its reference in place: the device's results."""
        moved = {
            key: t.to(device, copy=True) if isinstance(t, torch.Tensor) else t
            for key, t in given.items()
        }
        getattr(ops, name)(**moved)
        getattr(reference, name)(**given)
        return {k: t.cpu() for k, t in moved.items() if isinstance(t, torch.Tensor)}

    def check_close(name: str, got: torch.Tensor, want: torch.Tensor) -> None:
        error = (got.float() - want.float()).norm() / want.float().norm()
        assert error <= TOLERANCE, f"{name}: relative error {error:.3g}"

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(DTYPE)

    lay, rows = BlockLayout(SIZE, DTYPE.itemsize), len(LENS)
    blocks = -(-max(LENS) // BLOCK_SIZE)
    table = torch.randperm(rows * blocks, generator=generator).int().view(rows, -1) + 1
    shape = (1 + rows * blocks, KV_HEADS, BLOCK_SIZE, lay.content_bytes)
    cache = torch.full(shape, 0xFF, dtype=torch.uint8).view(DTYPE)  # NaN
    where = dict(kv_cache=cache, block_table=table, seq_lens=torch.tensor(LENS).int())
    starts = torch.tensor([0, *LENS]).cumsum(0)
    position = torch.arange(blocks * BLOCK_SIZE)
    slots = table[:, position // BLOCK_SIZE].long() * BLOCK_SIZE + position % BLOCK_SIZE
    slots = torch.cat([slot[:length] for slot, length in zip(slots, LENS)])

    tokens = dict(key=random(sum(LENS), KV_HEADS, SIZE))
    tokens["value"] = random(sum(LENS), KV_HEADS, SIZE)
    step = dict(slot_mapping=slots, query_start_loc=starts.int())
    stored = both("store", **tokens, **where, **step)["kv_cache"]
    same = (t.view(torch.uint8).flatten(2) for t in (stored, cache))
    same = (t[..., : lay.prefix_mean_offset] for t in same)  # then means, rounded
    assert torch.equal(*same), "store: blocks differ"

    empty = {name: torch.zeros_like(t) for name, t in tokens.items()}
    gathered = both("gather_kv", **where, out_start=starts[:-1], **empty)
    for name, t in tokens.items():
        assert torch.equal(gathered[name], t), f"gather_kv: {name} differs"

    where["query"], out = random(rows, HEADS, SIZE), torch.empty(rows, HEADS, SIZE)
    given = dict(budgets=torch.tensor(BUDGETS).int(), out=out.to(DTYPE))
    counts = torch.zeros(rows, KV_HEADS).int()
    lists = dict(indices=counts.new_zeros(rows, KV_HEADS, max(LENS)), counts=counts)
    options = SparqOptions(3 * SIZE // 8, 32, 4, SIZE**-0.5)
    got = both("sparq_attend", **where, **given, **lists, options=options)
    assert torch.equal(got["counts"], counts), "sparq_attend: counts differ"
    # Tokens of nearly equal score may change places.
    chosen = {name: got[name] for name in lists}
    reference.attend(**where, **chosen, scale=options.scale, out=out)
    check_close("sparq_attend", got["out"], out)

    got = both("attend", **where, scale=options.scale, out=given["out"])
    check_close("attend", got["out"], given["out"])
