# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Compile the Triton kernels for GPUs that need not be there.

    python -m scripts.compile_triton 80 90 100 [--quick]

The interpreter accepts much that the compiler refuses (a variable that changes its type
in a loop, say). Kernels are compiled down to machine code and never launched. Prints
each kernel's shared memory; exits with 1 where that is more than LIMIT.
"""

import argparse
import sys
from dataclasses import replace

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from vllm_sparse.cache.formats import BARE
from vllm_sparse.cache.layout import BLOCK_SIZE, STATE_RANK, BlockLayout, state_bytes
from vllm_sparse.kernels import triton as ops
from vllm_sparse.kernels.triton.less import add_states, seal_states
from vllm_sparse.methods.less import LEAST, Kernels

# Bytes that a program may have on every architecture from sm_80 on (sm_86 has least).
LIMIT = 99 * 1024
# The usual one, and the one that needs most shared memory.
INPUTS = [((32, 8, 128), torch.bfloat16), ((4, 1, 256), torch.float32)]


class NoDevice:
    """What triton.runtime.jit asks of a driver to compile (triton 3.6 and 3.9)."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0


def call_every_op(num_heads: int, num_kv_heads: int, head_size: int, dtype) -> None:
    """With arguments on the CPU, which nothing reads."""
    elements = BlockLayout(head_size, dtype.itemsize).content_bytes // dtype.itemsize
    kv_cache = torch.zeros(4, num_kv_heads, BLOCK_SIZE, elements, dtype=dtype)
    key = torch.zeros(300, num_kv_heads, head_size, dtype=dtype)
    ints = torch.zeros(2, dtype=torch.int32)
    where = (kv_cache, torch.zeros(1, 3, dtype=torch.int32), ints[:1])
    for tokens in (1, 300):  # one for each row, and more
        slots = torch.zeros(tokens, dtype=torch.int64)
        ops.store(key, key, kv_cache, slots, *where[1:], ints)
    ops.gather_kv(*where, torch.zeros(1, dtype=torch.int64), key, key)
    query = torch.zeros(1, num_heads, head_size, dtype=dtype)
    indices = torch.zeros(1, num_kv_heads, 192, dtype=torch.int32)
    counts = torch.zeros(1, num_kv_heads, dtype=torch.int32)
    for mass, top_p in ((None, 1.0), (torch.zeros(1, num_heads), 0.9)):
        options = ([3 * head_size // 8, 32, 4, 0], [0.1, 20.0, top_p])
        lists = (indices, counts, mass)
        ops.sparq_attend(query, *where, ints[:1], *options, *lists, query)
    ops.attend(query, *where, None, None, None, 0.1, 0.0, query)


def call_states(num_heads: int, num_kv_heads: int, head_size: int, dtype) -> None:
    """Likewise, the states of LESS."""
    fmt = replace(BARE, state_bytes=state_bytes(head_size))
    lay = BlockLayout(head_size, dtype.itemsize, fmt)
    elements = lay.content_bytes // dtype.itemsize
    kv_cache = torch.zeros(4, num_kv_heads, BLOCK_SIZE, elements, dtype=dtype)
    hidden = 64
    kernels = Kernels(
        q1=torch.zeros(num_heads, head_size, hidden),
        q2=torch.zeros(num_heads, hidden, STATE_RANK),
        k1=torch.zeros(num_kv_heads, head_size, hidden),
        k2=torch.zeros(num_kv_heads, hidden, STATE_RANK),
        k3=torch.zeros(num_kv_heads, STATE_RANK, STATE_RANK),
        s1=torch.zeros(num_kv_heads, STATE_RANK),
        s2=torch.zeros(num_kv_heads, STATE_RANK),
    )
    ints = torch.zeros(1, dtype=torch.int32)
    seal_states(kv_cache, kernels, (ints, ints, ints), 1, lay)
    query = torch.zeros(1, num_heads, head_size, dtype=dtype)
    lse = torch.zeros(1, num_heads)
    where = (ints, ints[:, None], kv_cache)
    add_states(query, query, lse, *where, kernels, 1, LEAST, lay)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("capabilities", nargs="+", type=int)
    parser.add_argument("--quick", action="store_true", help="the usual shape only")
    options = parser.parse_args()
    launch = JITFunction.run
    too_large = []

    def compile_only(self, *args, grid, warmup, **keywords):
        compiled = launch(self, *args, grid=grid, warmup=True, **keywords)
        name, shared = self.fn.__name__, compiled.metadata.shared
        print(f"sm_{capability} {name:20} {shared:6} bytes", flush=True)
        if shared > LIMIT:
            too_large.append(name)
        return compiled

    JITFunction.run = compile_only
    for capability in options.capabilities:
        driver.set_active(NoDevice(capability))
        for shape, dtype in INPUTS[:1] if options.quick else INPUTS:
            call_every_op(*shape, dtype)
            call_states(*shape, dtype)
    if too_large:
        print(f"more than {LIMIT} bytes of shared memory: {', '.join(too_large)}")
    return 1 if too_large else 0


if __name__ == "__main__":
    sys.exit(main())
