// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// Token lists by blocks, ahead of attention over quantised blocks: K of a block is read whole where
// any of its tokens is listed.
#include "attend/block_lists.cuh"
#include "common/instructions.cuh"
#include "common/launch.cuh"
#include "common/token_lists.cuh"

namespace vllm_sparse::cuda {

namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;

// One thread block per (row, KV head): a bit for each token, then the blocks in order.
__global__ void __launch_bounds__(kThreads) block_lists_kernel(AttendArgs p) {
  extern __shared__ __align__(16) uint32_t bits[];
  __shared__ int found[kWarps];
  const int list = blockIdx.x, row = list / p.cache.num_kv_heads;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int i = threadIdx.x; i < p.max_blocks; i += kThreads) {
    reinterpret_cast<uint4*>(bits)[i] = make_uint4(0, 0, 0, 0);
  }
  __syncthreads();
  wait_for_previous();
  let_next_begin();
  const TokenList tokens = token_list(p, row, list);
  const BlockList out(p, list);
  if (tokens.all) {
    if (threadIdx.x == 0) out.head->blocks = -1;
    return;
  }
  const int32_t* from = p.indices + int64_t{list} * p.max_kept;
  for (int i = threadIdx.x; i < tokens.count; i += kThreads) {
    const int t = min(max(from[i], 0), max(tokens.length - 1, 0));
    atomicOr(bits + t / 32, 1u << t % 32);
  }
  __syncthreads();
  const int sealed = p.cache.sealed_blocks(tokens.length);
  const int32_t* table = p.table(row);
  if (threadIdx.x < 4) out.head->tail[threadIdx.x] = bits[4 * sealed + threadIdx.x];
  int place = 0;
  for (int first = 0; first < sealed; first += kThreads) {
    const int block = first + threadIdx.x;
    uint4 mask = {};
    if (block < sealed) mask = reinterpret_cast<const uint4*>(bits)[block];
    const bool any = (mask.x | mask.y | mask.z | mask.w) != 0;
    const uint32_t ballot = __ballot_sync(kFullMask, any);
    if (lane == 0) found[warp] = __popc(ballot);
    __syncthreads();
    int at = place + __popc(ballot & ((1u << lane) - 1));
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) at += found[w];
      place += found[w];
    }
    if (any) {
      out.masks[at] = mask;
      out.ids[at] = static_cast<int32_t>(safe_block(p.cache, table[block]));
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) out.head->blocks = place;
}

}  // namespace

void launch_block_lists(const Device& device, const AttendArgs& p) {
  const dim3 grid(p.num_rows * p.cache.num_kv_heads);
  launch(device, block_lists_kernel, 1, grid, kThreads, p.max_blocks * 16, p, true);
}

}  // namespace vllm_sparse::cuda
