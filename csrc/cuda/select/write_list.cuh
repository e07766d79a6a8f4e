// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// Selection's last step: from keys and a threshold to the list of tokens, in order.
#pragma once

#include "select/pool.cuh"

namespace vllm_sparse::cuda {

constexpr uint32_t kNothing = 0x7c1;  // a bin above all keys

// Blocks of a warp: its lanes count in fp16, four tokens of every second block in each half, which
// is exact up to 2,048.
constexpr int kCountedBlocks = 1024;

// Tokens above bin `bin` are kept, and of those in it the first `need`.
struct Threshold {
  uint32_t bin, need;
  uint32_t above_before, equal_before;  // in the thread blocks before this one
  uint32_t listed;                      // how many are kept
};

// Writes this thread block's part of the list and returns where it begins and ends in it.
// `keys`: see Keys of pool.cuh.
template <int kWarps, class Keys>
__device__ int2 write_list(
    const Threshold& t, const Keys& keys, int first, int count, int32_t* out, int64_t max_kept) {
  __shared__ uint32_t sums[kWarps][2];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t low = t.bin << kKeyShift, high = (t.bin + 1) << kKeyShift;
  const int begin = count * warp / kWarps, end = count * (warp + 1) / kWarps;
  // Keys are compared as numbers; beyond infinity stand NaNs, which nothing reaches.
  const __half2 lows = as_half2(low * 0x10001), highs = as_half2(high * 0x10001);
  __half2 reached = __float2half2_rn(0), above = __float2half2_rn(0);
#pragma unroll 2
  for (int b = begin + lane / 16; b < end; b += 2) {
    const uint4 k = reinterpret_cast<const uint4*>(keys.of(b))[lane % 16];
    reached = __hadd2(reached,
                      __hadd2(__hadd2(__hge2(as_half2(k.x), lows), __hge2(as_half2(k.y), lows)),
                              __hadd2(__hge2(as_half2(k.z), lows), __hge2(as_half2(k.w), lows))));
    above = __hadd2(above,
                    __hadd2(__hadd2(__hge2(as_half2(k.x), highs), __hge2(as_half2(k.y), highs)),
                            __hadd2(__hge2(as_half2(k.z), highs), __hge2(as_half2(k.w), highs))));
  }
  const float2 r = __half22float2(reached), a = __half22float2(above);
  const uint32_t all_above = __reduce_add_sync(kFullMask, static_cast<uint32_t>(a.x + a.y));
  const uint32_t all_reached = __reduce_add_sync(kFullMask, static_cast<uint32_t>(r.x + r.y));
  if (lane == 0) sums[warp][0] = all_above, sums[warp][1] = all_reached - all_above;
  __syncthreads();
  uint32_t place = t.above_before, equal = t.equal_before;
  uint32_t total = place, total_equal = equal;
#pragma unroll 1
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) place += sums[w][0], equal += sums[w][1];
    total += sums[w][0];
    total_equal += sums[w][1];
  }
  const int2 mine = {static_cast<int>(t.above_before + min(t.equal_before, t.need)),
                     static_cast<int>(total + min(total_equal, t.need))};
  place += min(equal, t.need);
  // Eight blocks at a time become 32 words of 32 tokens; then every lane lists one word's. Half a
  // warp takes a block: its lanes n, n + 4, n + 8 and n + 12 have word n's tokens.
  const uint32_t limit = static_cast<uint32_t>(max_kept);
  const int part = lane % 16, word_lane = lane / 4 % 2 * 16 + lane % 4;
#pragma unroll 1
  for (int base = begin; base < end; base += 8) {
    uint32_t word = 0, ties = 0;
#pragma unroll 2
    for (int i = 0; i < 4; ++i) {
      if (base + 2 * i >= end) break;
      const int b = base + 2 * i + lane / 16;
      const uint4 k = b < end ? reinterpret_cast<const uint4*>(keys.of(b))[part] : uint4{};
      const uint32_t pair[4] = {k.x, k.y, k.z, k.w};
      uint32_t over = 0, over_or_tie = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        // Tokens t and t + 4 of a word; bits 0 and 16 become bits 0 and 4.
        const uint32_t x = __hge2_mask(as_half2(pair[j]), highs) & 0x00100001u;
        const uint32_t y = __hge2_mask(as_half2(pair[j]), lows) & 0x00100001u;
        over |= ((x | x >> 16) & 0x11u) << 8 * j;
        over_or_tie |= ((y | y >> 16) & 0x11u) << 8 * j;
      }
      over <<= part / 4;
      over_or_tie = b < end ? over_or_tie << part / 4 : 0;
      over = b < end ? over : 0;
#pragma unroll
      for (int j = 4; j < 16; j *= 2) {
        over |= __shfl_xor_sync(kFullMask, over, j);
        over_or_tie |= __shfl_xor_sync(kFullMask, over_or_tie, j);
      }
      over = __shfl_sync(kFullMask, over, word_lane);
      over_or_tie = __shfl_sync(kFullMask, over_or_tie, word_lane);
      if (lane / 8 == i) word = over, ties = over_or_tie & ~over;
    }
    if (__any_sync(kFullMask, ties != 0)) {
      const uint32_t inclusive = warp_scan(__popc(ties));
      uint32_t at = equal + inclusive - __popc(ties);
      equal += __shfl_sync(kFullMask, inclusive, 31);
#pragma unroll 1
      for (; ties && at < t.need; ++at, ties &= ties - 1) word |= ties & -ties;
    }
    const uint32_t inclusive = warp_scan(__popc(word));
    uint32_t at = place + inclusive - __popc(word);
    place += __shfl_sync(kFullMask, inclusive, 31);
    const int token = (first + base) * kBlockSize + 32 * lane - 1;
#pragma unroll 1
    for (; word; word &= word - 1, ++at) {
      if (at < limit) out[at] = token + __ffs(word);
    }
  }
  return mine;
}

}  // namespace vllm_sparse::cuda
