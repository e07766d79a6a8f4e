// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// The decode kernel's second half: attention over the list, and the merge of what warps and thread
// blocks have of it.
#pragma once

#include "attend/accumulate.cuh"
#include "decode/shared.cuh"

namespace vllm_sparse::cuda {

// Tiles of a warp on their way into its ring of three half tiles: keys, values, the next keys.
struct TileReader {
  const DecodeArgs& p;
  const int32_t *list, *table;  // list: null for all tokens
  int head, length, count, end;
  uint32_t block_units;  // 64 bytes between blocks
  int next;              // tile whose tokens are looked up next

  __device__ int tokens() {
    const int at = max(min(next * kTile + static_cast<int>(threadIdx.x) % kTile, count - 1), 0);
    next += kWarps;
    const int token = list != nullptr ? __ldcg(list + at) : at;
    return min(max(token, 0), length - 1);
  }
  // Where a token's row begins, in 64 bytes from the head's first.
  __device__ uint32_t row(int token, int32_t id) const {
    return static_cast<uint32_t>(safe_block(p.cache, id)) * block_units +
           token % kBlockSize * (p.cache.head_size / 16);
  }
};

// Keys or values of a tile; lane i % 16 knows the row of token i.
template <int kD>
__device__ inline void copy_half(
    const uint8_t* from, uint32_t row, int chunks, uint32_t to, int pitch) {
  constexpr int kLanes = kD / 8, kRows = 32 / kLanes;
  const int lane = threadIdx.x % 32, first = lane / kLanes, chunk = lane % kLanes;
  to += first * pitch + chunk * 16;
  from += chunk * 16;
#pragma unroll
  for (int i = 0; i < kTile / kRows; ++i) {
    const uint32_t units = __shfl_sync(kFullMask, row, first + i * kRows);
    if (chunk < chunks) copy_async_16(to + i * kRows * pitch, from + units * uint64_t{64});
  }
}

template <class T, int kD>
__device__ void attend_tiles(
    TileReader reader, int begin, float scale, uint32_t ring, Accumulator<T, kD, 8>& a) {
  const int size = reader.p.cache.head_size, chunks = size / 8, pitch = 2 * size + 16;
  uint32_t key = ring, value = ring + kTile * pitch, next_key = value + kTile * pitch;
  int tile = begin + threadIdx.x / 32;
  if (tile >= reader.end) return;
  // A tile's tokens, blocks and rows are each looked up a tile ahead of the next.
  const auto look_up = [&](int token) { return reader.table[token / kBlockSize]; };
  reader.next = tile;
  int token = reader.tokens(), next_token = reader.tokens();
  int32_t id = look_up(token), next_id = look_up(next_token);
  const uint8_t* keys = reader.p.cache.data + reader.head * reader.p.cache.head_stride;
  const uint8_t* values = keys + 2 * size;
  uint32_t row = reader.row(token, id);
  copy_half<kD>(keys, row, chunks, key, pitch);
  copy_commit();
  copy_half<kD>(values, row, chunks, value, pitch);
  copy_commit();
  row = reader.row(next_token, next_id);
  next_token = reader.tokens();
  if (tile + kWarps < reader.end) copy_half<kD>(keys, row, chunks, next_key, pitch);
  copy_commit();
  next_id = look_up(next_token);
  int after_token = reader.tokens();
#pragma unroll 1
  for (; tile < reader.end; tile += kWarps) {
    uint32_t probabilities[1][2];
    copy_wait<2>();
    __syncwarp();
    a.add_keys(key, pitch, size, reader.count - tile * kTile, scale, 0, probabilities);
    __syncwarp();
    if (tile + kWarps < reader.end) copy_half<kD>(values, row, chunks, key, pitch);
    copy_commit();
    row = reader.row(next_token, next_id);
    next_token = after_token;
    next_id = look_up(next_token);
    after_token = reader.tokens();
    copy_wait<2>();
    __syncwarp();
    a.add_values(value, pitch, size, probabilities);
    __syncwarp();
    if (tile + 2 * kWarps < reader.end) copy_half<kD>(keys, row, chunks, value, pitch);
    copy_commit();
    const uint32_t free = value;
    value = key;
    key = next_key;
    next_key = free;
  }
  copy_wait<0>();
}

// Joins what the warps have of an item and sends it to those thread blocks that store it: words of
// four elements go round.
template <int kD, class Sums>
__device__ void merge_warps(
    const DecodeArgs& p, Sums& a, float* merge, unsigned rank, unsigned C, Shared& shared) {
  constexpr int kPitch = kD + 4;
  const unsigned h = threadIdx.x / 32, lane = threadIdx.x % 32, words = p.cache.head_size / 4;
  const unsigned most = p.group * words / C + 1;
  __syncthreads();
  a.store(p.group, merge + h * kMaxHeads * kPitch, kPitch, shared.merge.ends[h]);
  __syncthreads();
  static_assert(kWarps == kMaxHeads && kD <= 128);
  if (h >= p.group) return;
  const float2 mine = shared.merge.ends[lane % kWarps][h];
  const float top = warp_max(mine.x), shift = top == -INFINITY ? 0 : top;
  const float weight = fast_exp2(mine.x - shift);
  const float total = warp_sum(lane < kWarps ? mine.y * weight : 0);
  if (lane < C) *cluster_at(&shared.merge.totals[rank][h], lane, C) = {top, total};
  float4 sum = {};
#pragma unroll 4
  for (int w = 0; w < kWarps; ++w) {
    const float4 x =
        *reinterpret_cast<const float4*>(merge + (w * kMaxHeads + h) * kPitch + lane % words * 4);
    const float y = __shfl_sync(kFullMask, weight, w);
    sum = {fmaf(x.x, y, sum.x), fmaf(x.y, y, sum.y), fmaf(x.z, y, sum.z), fmaf(x.w, y, sum.w)};
  }
  if (lane < words) {
    const unsigned i = h * words + lane, at = i / C;
    *cluster_at(&shared.merge.sums[rank * most + at], i - at * C, C) = sum;
  }
}

// What an item's head h begins with: nothing, or its sink.
__device__ inline Merged first_of(const DecodeArgs& p, unsigned item, unsigned h) {
  if (p.sinks == nullptr) return {};
  return {p.sinks[item % p.cache.num_kv_heads * p.group + h] * kLog2e, 1};
}

// This thread's word of head h added to `m` and `sum`, from the `C` thread blocks that have sent
// it.
__device__ inline void merge_words(const DecodeArgs& p,
                                   unsigned rank,
                                   unsigned C,
                                   unsigned h,
                                   const Shared& shared,
                                   Merged& m,
                                   float4& sum) {
  const unsigned most = p.group * (p.cache.head_size / 4) / C + 1;
#pragma unroll 2
  for (int r = 0; r < C; ++r) {
    const float2 ends = shared.merge.totals[r][h];
    m.add(ends.x, ends.y, shared.merge.sums[r * most + threadIdx.x], sum);
  }
}

template <class T>
__device__ inline void store_words(const Merged& m, const float4& sum, T* out) {
  const float inverse = m.total > 0 ? __fdividef(1, m.total) : 0;
  const float x[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
  for (int k = 0; k < 4; ++k) out[k] = from_float(m.total > 0 ? x[k] * inverse : 0, T());
}

// This thread block's words of the result, from all.
template <class T>
__device__ void merge_cluster(
    const DecodeArgs& p, unsigned item, unsigned rank, unsigned C, T* out, const Shared& shared) {
  const unsigned i = rank + threadIdx.x * C, h = i / (p.cache.head_size / 4);
  if (h >= p.group) return;
  float4 sum = {};
  Merged m = first_of(p, item, h);
  merge_words(p, rank, C, h, shared, m, sum);
  store_words(m, sum, out + i * 4);
}

}  // namespace vllm_sparse::cuda
