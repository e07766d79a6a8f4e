// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// The threshold that enough tokens reach, from the histograms of a cluster's thread blocks. In two
// steps, 32 bins at a time and then one, so that little of the others' shared memory is read.
#pragma once

#include "listing.cuh"

namespace vllm_sparse::cuda {

#ifdef __CUDACC__

constexpr int kFineBins = 32, kCoarseBins = kBins / kFineBins;

// Tokens in a bin: of the whole cluster, and of the thread blocks before this one.
struct Count {
  uint32_t all, before;
  __device__ void operator+=(const Count& x) { all += x.all, before += x.before; }
};

// The first of a warp's bins, lane 0 the highest, at which `wanted` are reached; 32 if none. `seen`
// are those above the lane's bin, and are returned for that bin.
__device__ inline int find_bin(const Count& mine, uint32_t wanted, Count& seen) {
  const int lane = threadIdx.x % 32;
  Count sum = mine;
  for (int i = 1; i < 32; i *= 2) {
    const Count x = {__shfl_up_sync(kFullMask, sum.all, i),
                     __shfl_up_sync(kFullMask, sum.before, i)};
    if (lane >= i) sum += x;
  }
  const uint32_t reached = __ballot_sync(kFullMask, seen.all + sum.all >= wanted);
  const int bin = reached ? __ffs(reached) - 1 : 32;
  const Count above = {sum.all - mine.all, sum.before - mine.before};
  seen +=
      {__shfl_sync(kFullMask, above.all, bin % 32), __shfl_sync(kFullMask, above.before, bin % 32)};
  return bin;
}

// Sums of 32 bins each into every thread block's coarse[rank], before the cluster meets.
template <int kThreads>
__device__ void send_sums(const uint32_t* histogram,
                          uint32_t (*coarse)[kCoarseBins],
                          int rank,
                          int C) {
  constexpr int kEach = kBins / kThreads, kLanes = kFineBins / kEach;
  const uint4* from = reinterpret_cast<const uint4*>(histogram + threadIdx.x * kEach);
  uint32_t sum = 0;
#pragma unroll
  for (int i = 0; i < kEach / 4; ++i) sum += from[i].x + from[i].y + from[i].z + from[i].w;
#pragma unroll
  for (int i = 1; i < kLanes; i *= 2) sum += __shfl_xor_sync(kFullMask, sum, i);
  uint32_t* to = &coarse[rank][threadIdx.x / kLanes];
#pragma unroll 1
  for (int r = threadIdx.x % kLanes; r < C; r += kLanes) *cluster_at(to, r, C) = sum;
}

// After the cluster has met.
template <int kThreads>
__device__ Threshold cluster_threshold(const uint32_t* histogram,
                                       const uint32_t (*coarse)[kCoarseBins],
                                       uint32_t wanted,
                                       int rank,
                                       int C) {
  constexpr int kWarps = kThreads / 32;
  __shared__ Count fine_of[kWarps][kFineBins];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (wanted == 0) return {kNothing, 0, 0, 0};
  // Every warp looks for itself. A lane has two coarse bins, from the top.
  Count pair[2] = {};
#pragma unroll 2
  for (int r = 0; r < C; ++r) {
    const uint2 x = reinterpret_cast<const uint2*>(coarse[r])[kCoarseBins / 2 - 1 - lane];
    pair[0] += {x.y, r < rank ? x.y : 0};
    pair[1] += {x.x, r < rank ? x.x : 0};
  }
  static_assert(kCoarseBins == 64);
  Count seen = {}, both = pair[0];
  both += pair[1];
  const int found = find_bin(both, wanted, seen);
  if (found == 32) return {kNothing, 0, 0, 0};  // there are not that many
  const Count upper = {__shfl_sync(kFullMask, pair[0].all, found),
                       __shfl_sync(kFullMask, pair[0].before, found)};
  int group = kCoarseBins - 1 - 2 * found;
  if (seen.all + upper.all < wanted) {
    seen += upper;
    --group;
  }
  Count part = {};
#pragma unroll 1
  for (int r = warp; r < C; r += kWarps) {
    const uint32_t x = *cluster_at(histogram + group * kFineBins + lane, r, C);
    part += {x, r < rank ? x : 0};
  }
  fine_of[warp][lane] = part;
  __syncthreads();
  Count mine = {};
#pragma unroll
  for (int w = 0; w < kWarps; ++w) mine += fine_of[w][kFineBins - 1 - lane];
  const int last = find_bin(mine, wanted, seen);
  return {static_cast<uint32_t>(group * kFineBins + kFineBins - 1 - last),
          wanted - seen.all,
          seen.before,
          __shfl_sync(kFullMask, mine.before, last)};
}

#endif  // __CUDACC__

}  // namespace vllm_sparse::cuda
