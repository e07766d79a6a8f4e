// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// Long lists among short ones: what a cluster does not attend to itself waits, in parts, for any
// thread block that is through with its own. The last one to finish an item joins its parts.
#pragma once

#include "decode/attend_rows.cuh"

namespace vllm_sparse::cuda {

constexpr int kOwnTiles = 48;   // of a thread block
constexpr int kPartTiles = 48;  // of a part, at least
constexpr int kNone = -1;

// How a list is cut: its first tiles are the cluster's, the rest are parts of equal size.
struct Cut {
  int own, parts, each;
};

__device__ inline int tiles_of(int count) { return (count + kTile - 1) / kTile; }

template <bool kShares>
__device__ inline Cut cut_list(const DecodeArgs& p, int count) {
  const int tiles = tiles_of(count);
  if (!kShares) return {tiles, 0, 0};
  const int own = min(tiles, kOwnTiles * p.cluster);
  const int parts = min(p.max_parts, (tiles - own + kPartTiles - 1) / kPartTiles);
  if (parts == 0) return {tiles, 0, 0};
  return {own, parts, (tiles - own + parts - 1) / parts};
}

// Offers an item's parts. Called by one thread; the list and its count are in memory, as seen by
// this thread block.
__device__ inline void offer_parts(const DecodeArgs& p, int item, int parts) {
  __threadfence();
  atomicExch(&p.shared->offers[item], static_cast<uint32_t>(parts) << 16);
}

struct Taken {
  int item, part;  // parts count from 1
};

// A part that nobody has taken, of the item with the most of them near this one; item kNone if
// there is none. Called by one warp. Offers count who came for them, also in vain.
__device__ inline Taken take_part(const DecodeArgs& p, int near) {
  const int items = static_cast<int>(p.num_rows) * p.cache.num_kv_heads, lane = threadIdx.x % 32;
#pragma unroll 1
  for (int first = 0; first < items; first += 32) {
    const int at = first + lane;
    const int item = near + at < items ? near + at : near + at - items;
    while (true) {
      const uint32_t offer =
          at < items ? *const_cast<const volatile uint32_t*>(&p.shared->offers[item]) : 0;
      const int left = static_cast<int>(offer >> 16) - static_cast<int>(offer & 0xffff);
      const uint32_t most = __reduce_max_sync(kFullMask, left > 0 ? left << 5 | lane : 0);
      if (most == 0) break;
      uint32_t seen = 0;
      if (lane == most % 32) {
        seen = atomicAdd(&p.shared->offers[item], 1);
        __threadfence();
      }
      seen = __shfl_sync(kFullMask, seen, most % 32);
      const int part = static_cast<int>(seen & 0xffff) + 1;
      if (part <= seen >> 16) return {__shfl_sync(kFullMask, item, most % 32), part};
    }
  }
  return {kNone, 0};
}

// Results of a part: [group, head_size] sums, then (top, total) of the heads.
__device__ inline float* partial_of(const DecodeArgs& p, int64_t item, int part) {
  const int64_t size = partial_size(p.group, p.cache.head_size);
  return p.part_results + (item * (kMaxParts + 1) + part) * size;
}

// This thread block's words of a part's result, from `C` thread blocks.
__device__ inline void store_partial(
    const DecodeArgs& p, int rank, int C, float* to, const Shared& shared) {
  const unsigned words = p.cache.head_size / 4, i = rank + threadIdx.x * C, h = i / words;
  if (h < p.group) {
    float4 sum = {};
    Merged m;
    merge_words(p, rank, C, h, shared, m, sum);
    reinterpret_cast<float4*>(to)[i] = sum;
    if (i == h * words) {
      reinterpret_cast<float2*>(to + p.group * p.cache.head_size)[h] = {m.top, m.total};
    }
  }
}

// Says that this thread block has stored its part; true in the last of an item's. What is shared is
// then as before the launch, but for who comes in vain. Called by all threads.
__device__ inline bool arrive_last(const DecodeArgs& p, int item, int expected) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    uint32_t& counter = p.shared->arrivals[item];
    last = atomicAdd(&counter, 1) + 1 == expected;
    if (last) {
      counter = 0;
      atomicExch(&p.shared->offers[item], 0);
    }
    __threadfence();
  }
  __syncthreads();
  return last;
}

template <class T>
__device__ void join_parts(const DecodeArgs& p, unsigned item, int parts, T* out) {
  const unsigned words = p.cache.head_size / 4;
  for (unsigned i = threadIdx.x; i < p.group * words; i += kThreads) {
    Merged m = first_of(p, item, i / words);
    float4 sum = {};
    for (int part = 0; part <= parts; ++part) {
      const float* from = partial_of(p, item, part);
      const float2 ends =
          __ldcg(reinterpret_cast<const float2*>(from + p.group * p.cache.head_size) + i / words);
      m.add(ends.x, ends.y, __ldcg(reinterpret_cast<const float4*>(from) + i), sum);
    }
    store_words(m, sum, out + i * 4);
  }
}

}  // namespace vllm_sparse::cuda
