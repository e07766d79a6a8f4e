// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// Selection's last step: from keys and a threshold to the list of tokens, in order.
#pragma once

#include "pool.cuh"

namespace vllm_sparse::cuda {

#ifdef __CUDACC__

constexpr uint32_t kNothing = 0x7c1;  // a bin above all keys

// Tokens above bin `bin` are kept, and of those in it the first `need`.
struct Threshold {
  uint32_t bin, need;
  uint32_t above_before, equal_before;  // in the thread blocks before this one
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
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) place += sums[w][0], equal += sums[w][1];
    total += sums[w][0];
    total_equal += sums[w][1];
  }
  const int2 mine = {static_cast<int>(t.above_before + min(t.equal_before, t.need)),
                     static_cast<int>(total + min(total_equal, t.need))};
  place += min(equal, t.need);
  // Eight blocks at a time become 32 words of 32 tokens; then every lane lists one word's.
  const uint32_t limit = static_cast<uint32_t>(max_kept);
  for (int base = begin; base < end; base += 8) {
    uint32_t word = 0;
#pragma unroll 2
    for (int i = 0; i < 8; ++i) {
      if (base + i >= end) break;
      uint32_t key[4];
      bool any_equal = false;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        key[j] = keys.of(base + i)[stored_at(32 * j + lane)];
        any_equal |= key[j] >= low && key[j] < high;
        const uint32_t mask = __ballot_sync(kFullMask, key[j] >= high);
        if (lane == 4 * i + j) word = mask;
      }
      if (!__any_sync(kFullMask, any_equal)) continue;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        uint32_t mask = __ballot_sync(kFullMask, key[j] >= low && key[j] < high), rest = mask;
        for (; rest && equal < t.need; ++equal) rest &= rest - 1;
        if (lane == 4 * i + j) word |= mask ^ rest;
      }
    }
    uint32_t inclusive = __popc(word);
    for (int i = 1; i < 32; i *= 2) {
      const uint32_t y = __shfl_up_sync(kFullMask, inclusive, i);
      if (lane >= i) inclusive += y;
    }
    uint32_t at = place + inclusive - __popc(word);
    place += __shfl_sync(kFullMask, inclusive, 31);
    const int token = (first + base) * kBlockSize + 32 * lane - 1;
    for (; word; word &= word - 1, ++at) {
      if (at < limit) out[at] = token + __ffs(word);
    }
  }
  return mine;
}

#endif  // __CUDACC__

}  // namespace vllm_sparse::cuda
