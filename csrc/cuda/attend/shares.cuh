// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// All lists of a call as one sequence of tiles, cut into equal shares.
#pragma once

#include "common/token_lists.cuh"

namespace vllm_sparse::cuda {

constexpr int kMaxWarps = 4;
constexpr int kTile = 16;

// The lists as one sequence of tiles. An item is a (row, KV head, 16 query heads).
struct Cursor {
  int item, first, tiles;  // `first` tile of the item
  int row, list, head;
  TokenList tokens;

  __device__ void load(const AttendArgs& p, int subs) {
    list = item / subs;
    row = list / p.cache.num_kv_heads;
    head = list - row * p.cache.num_kv_heads;
    tokens = token_list(p, row, list);
    tiles = max(1, (tokens.count + kTile - 1) / kTile);
  }
  __device__ void advance(const AttendArgs& p, int subs, int tile) {
    while (tile >= first + tiles) {
      first += tiles;
      ++item;
      load(p, subs);
    }
  }
};

// This thread block's share of the tiles: `active` blocks have `each`, the first `more` one more.
struct Share {
  int each, more, active;
  int begin, end, item, item_first;

  __device__ int begin_of(int block) const { return each * block + min(block, more); }
  __device__ int block_of(int tile) const {
    const int larger = more * (each + 1);
    return tile < larger ? tile / (each + 1) : more + (tile - larger) / each;
  }
};

template <int kWarps = kMaxWarps, class Items = Cursor>
__device__ Share find_share(const AttendArgs& p, int subs, int items) {
  __shared__ int warp_sums[kWarps], begin_item, begin_first;
  const int threads = blockDim.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int per_thread = (items + threads - 1) / threads;
  const int first = min(items, threadIdx.x * per_thread), end = min(items, first + per_thread);
  int sum = 0;
  Items c;
  for (c.item = first; c.item < end; ++c.item) {
    c.load(p, subs);
    sum += c.tiles;
  }
  const int inclusive = warp_scan(sum);
  if (lane == 31) warp_sums[warp] = inclusive;
  __syncthreads();
  int before = inclusive - sum, total = 0;
  for (int w = 0; w < threads / 32; ++w) {
    if (w < warp) before += warp_sums[w];
    total += warp_sums[w];
  }
  Share s;
  s.active = min(static_cast<int>(gridDim.x), total);
  s.each = total / s.active;
  s.more = total - s.each * s.active;
  const int block = blockIdx.x;
  s.begin = block < s.active ? s.begin_of(block) : total;
  s.end = block < s.active ? s.begin_of(block + 1) : total;
  if (before <= s.begin && s.begin < before + sum) {
    c.item = first;
    c.first = before;
    c.load(p, subs);
    c.advance(p, subs, s.begin);
    begin_item = c.item;
    begin_first = c.first;
  }
  __syncthreads();
  s.item = begin_item;
  s.item_first = begin_first;
  return s;
}

}  // namespace vllm_sparse::cuda
