// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// A warp's online softmax over quantised blocks and the rows after them.
#pragma once

#include "attend/block_products.cuh"
#include "common/tails.cuh"

namespace vllm_sparse::cuda {

constexpr int kBlockHeads = 4;  // query heads of a warp
constexpr int kTailUnit = 32;   // rows of a unit of work

// The lane's sums of head lane % 4.
template <class S, class T>
struct BlockAccumulator {
  static constexpr int D = S::kSize;
  uint32_t q[D / 16][2];  // columns 2 h and 2 h + 1: head h
  ValueSums<S> sums;
  float top, total;  // total: of this lane's tokens

  __device__ void begin(const T* query, int heads) {
    const int lane = threadIdx.x % 32, head = lane / 8;
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float x[2] = {};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (head < heads) x[i] = to_float(query[head * D + 16 * k + 8 * j + lane % 4 * 2 + i]);
          x[i] = fminf(fmaxf(x[i] * (1 << kAttendShift), -65504.0f), 65504.0f);
        }
        q[k][j] = as_word(__floats2half2_rn(x[0], x[1]));
      }
    }
    sums.clear();
    top = -INFINITY;
    total = 0;
  }

  // Logits (in units of log2) to probabilities.
  template <int N>
  __device__ void weigh(float (&x)[N], float cap) {
    float peak = top;
#pragma unroll
    for (auto& y : x) {
      if (cap > 0) y = cap * kLog2e * tanhf(y / cap);
      peak = fmaxf(peak, y);
    }
#pragma unroll
    for (int i = 4; i < 32; i *= 2) peak = fmaxf(peak, __shfl_xor_sync(kFullMask, peak, i));
    const float shift = peak == -INFINITY ? 0 : peak;  // keeps NaN out
    const float factor = fast_exp2(top - shift);
    top = peak;
    total *= factor;
    if (__any_sync(kFullMask, factor != 1)) sums.scale(factor, factor, factor);
#pragma unroll
    for (auto& y : x) {
      y = fast_exp2(y - (shift - kWeightShift));
      total += y;
    }
  }

  __device__ void keys(
      uint32_t slot, const uint32_t (&mask)[4], float scale, float cap, uint32_t (&p)[8][2]) {
    float x[8][2];
    key_products<S>(slot, q, scale, x);
    const int r = threadIdx.x % 32 / 4;
    if ((mask[0] & mask[1] & mask[2] & mask[3]) != ~0u) {
      const uint32_t low = (r % 2 ? mask[2] : mask[0]) >> r / 2;
      const uint32_t high = (r % 2 ? mask[3] : mask[1]) >> r / 2;
#pragma unroll
      for (int t = 0; t < 8; ++t) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint32_t bit = 1u << (t / 2 % 2 * 16 + t % 2 * 8 + i * 4);
          if (!((t / 4 ? high : low) & bit)) x[t][i] = -INFINITY;
        }
      }
    }
    float (&flat)[16] = reinterpret_cast<float (&)[16]>(x);
    weigh(flat, cap);
#pragma unroll
    for (int t = 0; t < 8; ++t) {
#pragma unroll
      for (int i = 0; i < 2; ++i) p[t][i] = transpose(pack<__half>(x[t][i], 0));
    }
  }

  __device__ void values(uint32_t slot, const uint32_t (&mask)[4], const uint32_t (&p)[8][2]) {
#pragma unroll
    for (int t = 0; t < 8; ++t) {
      const uint32_t both = mask[t / 4] | mask[2 + t / 4];
      if (both >> (t / 2 % 2 * 16 + t % 2 * 8) & 255) sums.add(slot, t, p[t]);
    }
  }

  // Rows of the tokens in `mask`, from token `first` of the tail on; as the model's numbers.
  __device__ void rows(const AttendArgs& p,
                       const int32_t* table,
                       int head,
                       int block,
                       int first,
                       uint32_t mask,
                       const T* query,
                       int heads,
                       float scale) {
    const int lane = threadIdx.x % 32, pair = lane % 4;
    const int any = __ffs(mask) - 1;
    const auto row_of = [&](int t) {  // another's for tokens that are not listed
      const int token = first + (mask >> t & 1 ? t : any);
      return reinterpret_cast<const T*>(tail_row(p, table, head, block, token));
    };
    float x[4];
#pragma unroll 1
    for (int tile = 0; tile < 2; ++tile) {
      const T* even = row_of(16 * tile + lane / 4) + pair * 2;
      const T* odd = row_of(16 * tile + lane / 4 + 8) + pair * 2;
      const T* of_head = query + lane / 8 * D + pair * 2;
      float acc[4] = {};
#pragma unroll
      for (int k = 0; k < D / 16; ++k) {
        const auto word = [&](const T* from) {
          return *reinterpret_cast<const uint32_t*>(from + 16 * k);
        };
        const uint32_t a[4] = {word(even), word(odd), word(even + 8), word(odd + 8)};
        const bool inside = lane / 8 < heads;
        const uint32_t b0 = inside ? word(of_head) : 0, b1 = inside ? word(of_head + 8) : 0;
        mma<T>(acc, a, b0, b1, acc);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const bool listed = mask >> (16 * tile + lane / 4 + 8 * i) & 1;
        const float y = listed ? acc[2 * i] * scale : -INFINITY;
        tile == 0 ? x[i] = y : x[2 + i] = y;
      }
    }
    weigh(x, p.soft_cap);
    sums.scale(sums.kUnit, sums.kHighUnit, 1);
#pragma unroll 1
    for (int tile = 0; tile < 2; ++tile) {
      uint32_t b[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) b[i] = transpose(pack<T>(tile == 0 ? x[i] : x[2 + i], 0));
      const T* from[4];  // rows 2 pair, 2 pair + 1, and 8 after these
#pragma unroll
      for (int i = 0; i < 4; ++i) from[i] = row_of(16 * tile + 2 * pair + i % 2 + i / 2 * 8) + D;
#pragma unroll
      for (int m = 0; m < S::kTiles; ++m) {
        uint32_t a[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // rows of channels, then pairs of tokens
          const int d = sums.channel(m, i % 2 * 2);
          const uint16_t low = reinterpret_cast<const uint16_t*>(from[i / 2 * 2])[d];
          const uint16_t high = reinterpret_cast<const uint16_t*>(from[i / 2 * 2 + 1])[d];
          a[i] = low | uint32_t{high} << 16;
        }
        mma<T>(sums.o[m], a, b[0], b[1], sums.o[m]);
      }
    }
    sums.scale(1 / sums.kUnit, 1 / sums.kHighUnit, 1);
  }

  // To merge[head][pitch], and (top, total) of every head to `ends`.
  __device__ void store(float* merge, int pitch, float2* ends) {
    const int lane = threadIdx.x % 32, head = lane % 4;
    float all = total;
#pragma unroll
    for (int i = 4; i < 32; i *= 2) all += __shfl_xor_sync(kFullMask, all, i);
    if (lane < 4) ends[lane] = {top - kWeightShift, all};
    float least[S::kValueGroups];
#pragma unroll
    for (int g = 0; g < S::kValueGroups; ++g) {
      least[g] = __shfl_sync(kFullMask, sums.least[0], 4 * g + head);
    }
#pragma unroll
    for (int m = 0; m < S::kTiles; ++m) {
      const float minimum = least[m * 16 / S::kValueGroup];
      float* to = merge + head * pitch;
      to[sums.channel(m, 0)] = fmaf(sums.o[m][0], sums.kUnit, minimum);
      to[sums.channel(m, 2)] = fmaf(sums.o[m][2], sums.kHighUnit, minimum);
    }
  }
};

}  // namespace vllm_sparse::cuda
