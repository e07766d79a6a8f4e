// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// Selection's first half: probabilities of scored tokens, pooled over the query heads.
#pragma once

#include "select/score_format.cuh"

namespace vllm_sparse::cuda {

constexpr int kSelectThreads = 512;
constexpr int kSelectWarps = kSelectThreads / 32;
constexpr int kBins = 2048;
constexpr int kKeyShift = 4;          // from a key to its bin
constexpr uint32_t kForced = 0x7c00;  // key of a token that is kept in any case: infinity

// Keys of a thread block's blocks; a block's tokens stand in the scores' order. Shared or global.
struct Keys {
  uint16_t* data;
  __device__ uint16_t* of(int block) const { return data + int64_t{block} * kBlockSize; }
};

// Of half a warp's block: probabilities of the lane's eight tokens, (t, t + 4) each, in two sums.
struct Pooled {
  __half2 sum[8];

  __device__ Pooled() {
#pragma unroll
    for (auto& x : sum) x = __float2half2_rn(0);
  }
  // Two heads of their exponentials and their weights at the block's maximum.
  __device__ void add(const uint4& words, __half2 first_weight, __half2 second_weight) {
    const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      sum[k] = __hfma2(first_head(word[k]), first_weight, sum[k]);
      sum[k + 4] = __hfma2(second_head(word[k]), second_weight, sum[k + 4]);
    }
  }
  // Stores the tokens' keys and counts them. `position`: the block's first token.
  __device__ void store(const RowPlan& plan, int position, uint16_t* keys, uint32_t* histogram) {
    const int part = threadIdx.x % 16;
    uint32_t key[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      // The smaller of NaN and a number is the number: keys are always ordered.
      key[k] = as_word(__hmin2(__hadd2(sum[k], sum[k + 4]), __float2half2_rn(65504.0f)));
    }
    if (position < plan.sinks || position + kBlockSize > plan.recent) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int s = 8 * part + 2 * k;  // the halves' place, stored_at's inverse
        const int t = position + ((s & 31) << 2 | s >> 5);
        if (t < plan.sinks || t >= plan.recent) key[k] = (key[k] & 0xffff0000u) | kForced;
        if (t + 4 < plan.sinks || t + 4 >= plan.recent) key[k] = (key[k] & 0xffff) | kForced << 16;
      }
    }
    reinterpret_cast<uint4*>(keys)[part] = make_uint4(key[0], key[1], key[2], key[3]);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      atomicAdd(&histogram[key[k] >> kKeyShift & (kBins - 1)], 1);
      atomicAdd(&histogram[key[k] >> (16 + kKeyShift)], 1);
    }
  }
};

__device__ inline __half2 weight_of(float x) { return __float2half2_rn(fminf(x, 65504.0f)); }

// log2 of every head's normaliser into lse[2 * pairs]; also `shift`, such that pooled
// probabilities times 2^shift have a largest value near 2^14 and never reach fp16's end.
__device__ inline void find_normalisers(
    const SelectArgs& p, const float2* stats, int entries, float* lse, float* shift) {
  __shared__ float4 partial[kSelectWarps];
  constexpr int kHeld = 4;  // entries of a lane at once
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float peaks = 0;  // largest probabilities of all heads
  for (int first = 0; first < p.pairs; first += kSelectWarps) {
    // Warps share the pairs of heads; several warps a pair if there are enough.
    const int here = min(kSelectWarps, p.pairs - first), sharers = kSelectWarps / here;
    const int pair = first + warp % here, part = warp / here;
    const float4* from = reinterpret_cast<const float4*>(stats) + pair;
    float2 top = {-INFINITY, -INFINITY}, sum = {0, 0};
    const int step = sharers * 32;
    for (int base = part * 32; part < sharers && base < entries; base += kHeld * step) {
      float4 x[kHeld];
      float2 peak = top;
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        const int at = base + i * step + lane;
        x[i] = at < entries ? __ldcg(from + int64_t{at} * p.pairs)
                            : make_float4(-INFINITY, 0, -INFINITY, 0);
      }
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        peak.x = fmaxf(peak.x, x[i].x);
        peak.y = fmaxf(peak.y, x[i].z);
      }
      peak.x = warp_max(peak.x);
      peak.y = warp_max(peak.y);
      sum.x *= fast_exp2(top.x - peak.x);
      sum.y *= fast_exp2(top.y - peak.y);
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        sum.x += x[i].y * fast_exp2(x[i].x - peak.x);
        sum.y += x[i].w * fast_exp2(x[i].z - peak.y);
      }
      top = peak;
    }
    sum.x = warp_sum(sum.x);
    sum.y = warp_sum(sum.y);
    if (lane == 0) partial[warp] = make_float4(top.x, sum.x, top.y, sum.y);
    __syncthreads();
    if (warp == 0) {
      float peak = -INFINITY, all = 0;
      const int head = 2 * first + lane;
      if (lane < 2 * here) {
        for (int w = lane / 2; w < sharers * here; w += here) {
          peak = fmaxf(peak, lane % 2 ? partial[w].z : partial[w].x);
        }
        for (int w = lane / 2; w < sharers * here; w += here) {
          const float4 s = partial[w];
          // A warp without entries has a sum of 0.
          const float t = lane % 2 ? s.z : s.x, y = lane % 2 ? s.w : s.y;
          all += y > 0 ? y * fast_exp2(t - peak) : 0;
        }
        lse[head] = peak + log2f(all);
      }
      peaks += warp_sum(lane < 2 * here && head < p.group ? 1 / all : 0);
      if (lane == 0) *shift = 14 - log2f(peaks);
    }
    __syncthreads();
  }
}

// Pooled probabilities of this thread block's blocks as keys, and how many tokens have which.
template <int kPairs>
__device__ void pool(const SelectArgs& p,
                     const RowPlan& plan,
                     const float2* stats,
                     int entries,
                     const uint8_t* scores,
                     int first,
                     int count,
                     float* lse,
                     float* shift,
                     const Keys& keys,
                     uint32_t* histogram) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, part = lane % 16;
  const int pairs = kPairs ? kPairs : p.pairs;
  int b = 2 * warp + lane / 16;
  const float2* stat = stats + (int64_t{first} + b) * 2 * pairs + part;
  const uint4* score =
      reinterpret_cast<const uint4*>(scores + (int64_t{first} + b) * pairs * kPairBytes) + part;
  // Half a warp takes a block. The next block's scores are under way.
  constexpr int kHeld = kPairs ? kPairs : 1;
  uint4 next[kHeld] = {};
  float next_top = 0;
  const auto load = [&](int ahead) {
    if (b + ahead >= count) return;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      next[i] = __ldcg(score + (ahead * pairs + i) * (kPairBytes / 16));
    }
    if (part < 2 * pairs) next_top = __ldcg(stat + ahead * 2 * pairs).x;
  };
  load(0);
  find_normalisers(p, stats, entries, lse, shift);
  constexpr int kStep = 2 * kSelectWarps;
  for (int base = 2 * warp; base < count; base += kStep) {
    uint4 words[kHeld];
#pragma unroll
    for (int i = 0; i < kHeld; ++i) words[i] = next[i];
    float top = next_top;
    load(kStep);
    Pooled pooled;
#pragma unroll
    for (int i = 0; i < (kPairs ? kPairs : pairs); ++i) {
      if constexpr (kPairs == 0) {
        if (i > 0 && b < count) words[0] = __ldcg(score + i * (kPairBytes / 16));
        if (i % 8 == 0 && i > 0 && part < 2 * (pairs - i) && b < count) {
          top = __ldcg(stat + 2 * i).x;
        }
      }
      // A lane of each half weighs a head: its share of the probability at the block's maximum.
      const int head = (i & ~7) * 2 + part;
      const float weight = head < p.group ? fast_exp2(top - lse[head] + *shift) : 0.0f;
      const uint32_t both = as_word(weight_of(weight));
      const __half2 w0 = as_half2(__shfl_sync(kFullMask, both, lane / 16 * 16 + i % 8 * 2));
      const __half2 w1 = as_half2(__shfl_sync(kFullMask, both, lane / 16 * 16 + i % 8 * 2 + 1));
      pooled.add(words[kPairs ? i : 0], w0, w1);
    }
    const int mine = b;
    b += kStep;
    stat += kStep * 2 * pairs;
    score += kStep * pairs * (kPairBytes / 16);
    if (mine < count) pooled.store(plan, (first + mine) * kBlockSize, keys.of(mine), histogram);
  }
}

}  // namespace vllm_sparse::cuda
