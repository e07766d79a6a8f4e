// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// The end of attention to an item: results of warps, then of thread blocks that share it.
#pragma once

#include "attend/accumulate.cuh"
#include "attend/shares.cuh"

namespace vllm_sparse::cuda {

// Tiles [begin, end) of the item that `here` is at, whose warps are storing [warps][kHeads][kSize +
// 4] sums to `merge` and (top, total) to `ends`. Calls finish(head, element, merged, sum) for words
// of four elements, in the last thread block that has a part of the item.
template <int kHeads, int kSize, int kWarps, class Items, class Finish>
__device__ void merge_item(const AttendArgs& p,
                           const Share& share,
                           const Items& here,
                           int begin,
                           int end,
                           int heads,
                           const float* merge,
                           const float2 (&ends)[kWarps][kHeads],
                           const Finish& finish) {
  constexpr int kPitch = kSize + 4;
  __shared__ bool is_last;
  const int warps = blockDim.x / 32;
  const bool whole = begin == here.first && end == here.first + here.tiles;
  const int starter = share.block_of(here.first);
  const int64_t partial = partial_floats(p.group, kSize);
  float* mine = p.partials + (2 * int64_t{blockIdx.x} + (blockIdx.x == starter)) * partial;
  __syncthreads();
  for (int i = threadIdx.x; i * 4 < heads * kSize; i += blockDim.x) {
    const int h = i * 4 / kSize, d = i * 4 % kSize;
    Merged merged;
    float4 sum = {};
    for (int w = 0; w < warps; ++w) {
      const float* from = merge + (w * kHeads + h) * kPitch + d;
      merged.add(ends[w][h].x, ends[w][h].y, *reinterpret_cast<const float4*>(from), sum);
    }
    if (whole) {
      finish(h, d, merged, sum);
    } else {
      float* to = mine + h * kPitch;
      reinterpret_cast<float4*>(to)[0] = make_float4(merged.top, merged.total, 0, 0);
      *reinterpret_cast<float4*>(to + 4 + d) = sum;
    }
  }
  if (whole) return;
  const int last = share.block_of(here.first + here.tiles - 1);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    // Wraps to zero with the last arrival, for the next launch.
    const uint32_t others = last - starter;
    is_last = atomicInc(p.arrivals + starter, others) == others;
  }
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  for (int i = threadIdx.x; i * 4 < heads * kSize; i += blockDim.x) {
    const int h = i * 4 / kSize, d = i * 4 % kSize;
    Merged merged;
    float4 sum = {};
#pragma unroll 4
    for (int b = starter; b <= last; ++b) {
      const float* from = p.partials + (2 * int64_t{b} + (b == starter)) * partial + h * kPitch;
      const float4 head = __ldcg(reinterpret_cast<const float4*>(from));
      merged.add(head.x, head.y, __ldcg(reinterpret_cast<const float4*>(from + 4 + d)), sum);
    }
    finish(h, d, merged, sum);
  }
}

}  // namespace vllm_sparse::cuda
