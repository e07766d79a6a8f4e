// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// SparQ's channels (arXiv 2312.04985, section 3) of one (row, KV head), and its queries
// restricted to them.
#pragma once

#include "select/score_format.cuh"

namespace vllm_sparse::cuda {

// All threads of the block call this; they meet at its end. `query`: the item's [group, head_size].
template <class T, int kThreads, int kMaxSize>
__device__ void choose_channels(const SelectArgs& p, const T* query, const PreparedItem& out) {
  constexpr int kWarps = kThreads / 32, kEach = kMaxSize / 32;
  // As integers, which sort like the numbers they are made of; the lowest bits hold the channel, so
  // that all differ and of equal ones the first is larger.
  __shared__ __align__(16) uint32_t magnitude[kMaxSize];
  __shared__ uint32_t selected[kMaxSize / 32];
  const int size = p.cache.head_size;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  // A warp prepares a head: its lanes have neighbouring channels.
  const int each = pad_to(size, 64) / 32, mine = lane * each;
  float x[kEach], all = 0;
  const auto load_head = [&](int g) {
    all = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      x[i] = i < each && mine + i < size && g < p.group ? to_float(query[g * size + mine + i]) : 0;
      all += fabsf(x[i]);
    }
  };
  load_head(warp);
  if (threadIdx.x < kMaxSize) {
    float sum = 0;
    if (threadIdx.x < size) {
#pragma unroll 4
      for (int g = 0; g < p.group; ++g) sum += fabsf(to_float(query[g * size + threadIdx.x]));
    }
    const uint32_t bits = sum >= 0 ? __float_as_uint(sum) : 0;  // NaN compares with nothing
    magnitude[threadIdx.x] = (bits & ~(kMaxSize - 1u)) | (kMaxSize - 1 - threadIdx.x);
    if (threadIdx.x < kMaxSize / 32) selected[threadIdx.x] = 0;
  }
  __syncthreads();
  // Rank by counting who is larger; neighbouring threads share a channel.
  const int parts = kThreads / (size <= 64 ? 64 : size <= 128 ? 128 : 256);
  const int d = threadIdx.x / parts, part = threadIdx.x % parts;
  int place = 0;
  if (d < size) {
    const uint32_t own = magnitude[d];
#pragma unroll 2
    for (int e = 4 * part; e < size; e += 4 * parts) {
      const uint4 m = *reinterpret_cast<const uint4*>(magnitude + e);
      place += (m.x > own) + (m.y > own) + (m.z > own) + (m.w > own);
    }
  }
  for (int i = 1; i < parts; i *= 2) place += __shfl_xor_sync(kFullMask, place, i);
  const bool chosen = d < size && place < p.rank;
  const uint32_t bits = __reduce_or_sync(kFullMask, chosen ? 1u << d % 32 : 0);
  if (lane == 0 && bits) atomicOr(&selected[d / 32], bits);
  __syncthreads();
  // Channels are kept in ascending order, which keeps their codes in few lines of memory.
  const auto is_selected = [&](int channel) { return selected[channel / 32] >> channel % 32 & 1; };
  int place_of_mine = 0;
#pragma unroll
  for (int w = 0; w < kMaxSize / 32; ++w) {
    const int before = mine - 32 * w;
    const uint32_t mask = before >= 32 ? kFullMask : before <= 0 ? 0 : (1u << before) - 1;
    place_of_mine += __popc(selected[w] & mask);
  }
  for (int c = p.rank + threadIdx.x; c < out.padded_rank; c += kThreads) out.channel[c] = 0;
  const float scale = p.soft_cap > 0 ? 1 << kQueryShift : kLog2e * (1 << kQueryShift);
#pragma unroll 1
  for (int g = warp; g < out.padded_group; g += kWarps) {
    if (g > warp) load_head(g);
    float read = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (i < each && mine + i < size && is_selected(mine + i)) read += fabsf(x[i]);
    }
    const float total = warp_sum(all);
    read = warp_sum(read);
    // Where mass decides, without the paper's temperature.
    const float temperature = p.top_p < 1 ? 1 : fast_sqrt(__fdividef(total, read));
    const float factor = read > 0 ? scale * p.scale * temperature : 0;
    __half* to = out.query + g * out.padded_rank;
    int at = place_of_mine;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (i >= each || mine + i >= size || !is_selected(mine + i)) continue;
      to[at] = __float2half_rn(fminf(fmaxf(factor * x[i], -65504.0f), 65504.0f));
      if (g == 0) out.channel[at] = mine + i;
      ++at;
    }
    for (int c = p.rank + lane; c < out.padded_rank; c += 32) to[c] = __float2half_rn(0);
  }
  __syncthreads();
}

}  // namespace vllm_sparse::cuda
