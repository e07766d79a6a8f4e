// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// SparQ's channels (arXiv 2312.04985, section 3) of one (row, KV head), and its queries
// restricted to them.
#pragma once

#include "scores.cuh"

namespace vllm_sparse::cuda {

#ifdef __CUDACC__

// All threads of the block call this. `query`: the item's [group, head_size].
template <class T, int kThreads>
__device__ void choose_channels(const SelectArgs& p, const T* query, const PreparedItem& out) {
  constexpr int kWarps = kThreads / 32;
  __shared__ __align__(16) float magnitude[kMaxHeadSize];
  __shared__ uint32_t selected[kMaxHeadSize / 32];
  __shared__ float factor[kWarps];
  const int size = p.cache.head_size, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (threadIdx.x < size) {
    float sum = 0;
#pragma unroll 4
    for (int g = 0; g < p.group; ++g) sum += fabsf(to_float(query[g * size + threadIdx.x]));
    magnitude[threadIdx.x] = sum >= 0 ? sum : 0;  // NaN compares with nothing
  }
  if (threadIdx.x < kMaxHeadSize / 32) selected[threadIdx.x] = 0;
  __syncthreads();
  // Rank by counting who is larger; neighbouring threads share a channel.
  const int parts = kThreads / (size <= 64 ? 64 : size <= 128 ? 128 : 256);
  const int d = threadIdx.x / parts, part = threadIdx.x % parts;
  int place = 0;
  if (d < size) {
    const float mine = magnitude[d];
#pragma unroll 2
    for (int e = 4 * part; e < size; e += 4 * parts) {
      const float4 m = *reinterpret_cast<const float4*>(magnitude + e);
      place += (m.x > mine || (m.x == mine && e < d)) + (m.y > mine || (m.y == mine && e + 1 < d)) +
               (m.z > mine || (m.z == mine && e + 2 < d)) +
               (m.w > mine || (m.w == mine && e + 3 < d));
    }
  }
  for (int i = 1; i < parts; i *= 2) place += __shfl_xor_sync(kFullMask, place, i);
  const bool mine = d < size && place < p.rank;
  if (mine && part == 0) atomicOr(&selected[d / 32], 1u << d % 32);
  __syncthreads();
  // Channels are kept in ascending order, which keeps their codes in few lines of memory.
  int at = 0;
  if (mine) {
    for (int w = 0; w < d / 32; ++w) at += __popc(selected[w]);
    at += __popc(selected[d / 32] & ((1u << d % 32) - 1));
    if (part == 0) out.channel[at] = d;
  }
  for (int c = p.rank + threadIdx.x; c < out.padded_rank; c += kThreads) out.channel[c] = 0;
  for (int first = 0; first < out.padded_group; first += kWarps) {
    if (first + warp < p.group) {
      float all = 0, read = 0;
      for (int e = lane; e < size; e += 32) {
        const float x = fabsf(to_float(query[(first + warp) * size + e]));
        all += x;
        read += selected[e / 32] >> e % 32 & 1 ? x : 0;
      }
      all = warp_sum(all);
      read = warp_sum(read);
      const float unit = p.soft_cap > 0 ? 1 << kQueryShift : kLog2e * (1 << kQueryShift);
      if (lane == 0) factor[warp] = read > 0 ? unit * p.scale * sqrtf(all / read) : 0;
    }
    __syncthreads();
    const int end = min(out.padded_group, first + kWarps);
    for (int g = first + part; mine && g < end; g += parts) {
      const float x = g < p.group ? factor[g - first] * to_float(query[g * size + d]) : 0;
      out.query[g * out.padded_rank + at] = __float2half_rn(fminf(fmaxf(x, -65504.0f), 65504.0f));
    }
    const int padding = out.padded_rank - p.rank;
    for (int i = threadIdx.x; i < (end - first) * padding; i += kThreads) {
      const int g = first + i / padding, c = p.rank + i % padding;
      out.query[g * out.padded_rank + c] = __float2half_rn(0);
    }
    __syncthreads();
  }
}

#endif  // __CUDACC__

}  // namespace vllm_sparse::cuda
