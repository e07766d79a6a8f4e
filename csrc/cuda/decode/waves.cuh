// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// Many items: whether two thread blocks serve each, or one. Lengths decide, which the host does not
// know, so a launch has two for each item. If one serves it, the first half of them do, while the
// others end at once.
#pragma once

#include "common/token_lists.cuh"
#include "decode/parts.cuh"

namespace vllm_sparse::cuda {

// What an item of a row takes, in tiles of attention. Two blocks are scored in the time of one
// (rank 32; at 16 x 32K attention to 1,024 tokens took 12 us, scores 28).
__device__ inline unsigned cost_of(const RowPlan& row) {
  if (row.all) return tiles_of(row.length);
  return tiles_of(row.sinks + row.wanted + row.length - row.recent) + row.sealed / 2;
}

// Whether a thread block serves an item by itself. All work is counted in items of the longest row
// and dealt in waves of two items a multiprocessor: it does where the last wave is more than half
// full. Halves of items would then take as long, and their thread blocks meet besides. Where a row
// is long beside the others, all work is few such items, so that it stays with two thread blocks.
// All threads of a launch find the same.
__device__ inline bool serves_alone(const DecodeArgs& p) {
  if (p.num_sms == 0) return false;
  __shared__ uint2 of_warp[kWarps];  // (longest, sum)
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint2 all = {};
#pragma unroll 1
  for (int64_t row = threadIdx.x; row < p.num_rows; row += kThreads) {
    const unsigned cost = cost_of(plan_row(p, row));
    all = {max(all.x, cost), all.y + cost};
  }
  all = {__reduce_max_sync(kFullMask, all.x), __reduce_add_sync(kFullMask, all.y)};
  if (lane == 0) of_warp[warp] = all;
  __syncthreads();
  all = of_warp[lane % kWarps];
  const unsigned half_wave = p.num_sms * __reduce_max_sync(kFullMask, all.x);
  const unsigned sum = p.cache.num_kv_heads * (__reduce_add_sync(kFullMask, all.y) / (32 / kWarps));
  return sum > 0 && (sum - 1) % (2 * half_wave) >= half_wave;
}

}  // namespace vllm_sparse::cuda
