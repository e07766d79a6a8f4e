// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// Approximate logits of two sealed blocks from 4-bit codes, on the tensor cores.
#pragma once

#include "select/score_format.cuh"

namespace vllm_sparse::cuda {

// A step of two blocks in shared memory: codes of both, then parameters of both.
constexpr int kCodesOfStep = kStepChannels * kCodeBytes;
__host__ __device__ constexpr int slot_bytes(int param_bytes) {
  return 2 * (kCodesOfStep + kStepChannels * param_bytes);
}
constexpr int kSlotBytes = slot_bytes(4);

__device__ inline float fast_tanh(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// A capped logit in units of log2.
__device__ inline float cap_logit(float x, float soft_cap) {
  return soft_cap * kLog2e * fast_tanh(x / soft_cap);
}

__device__ inline __half2 max_over_tokens(__half2 x) {
#pragma unroll
  for (int i = 4; i < 32; i *= 2) {
    x = __hmax2(x, as_half2(__shfl_xor_sync(kFullMask, as_word(x), i)));
  }
  return x;
}

// Words of a lane's 16 exponentials of two heads, and (top, sum) of each head. The first other lane
// with tokens of the same block and heads is kNext away.
template <int kNext>
__device__ inline float4 pack_block(const __half2 (&e)[8][2], float2 top, uint32_t (&words)[8]) {
  __half2 sums[8];
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    words[k] = pack_exponentials(e[k][0], e[k][1]);
    sums[k] = __hadd2(e[k][0], e[k][1]);
  }
#pragma unroll
  for (int i = 4; i > 0; i /= 2) {
#pragma unroll
    for (int k = 0; k < i; ++k) sums[k] = __hadd2(sums[k], sums[k + i]);
  }
#pragma unroll
  for (int i = 4; i < 32; i *= 2) {
    const int other = i == 4 ? kNext : i;
    sums[0] = __hadd2(sums[0], as_half2(__shfl_xor_sync(kFullMask, as_word(sums[0]), other)));
  }
  const float2 sum = __half22float2(sums[0]);
  return {top.x, sum.x, top.y, sum.y};
}

// Products of two blocks with four heads. Columns 0 to 3 of a tile are the first block's heads,
// columns 4 to 7 the second's: each block's codes meet zeros in the other's columns. Tile 2 n + ab
// holds, in rows 0 to 7 and 8 to 15, tokens t and t + 4 with t = 8 ab + 16 n + 64 (row & 1) + row /
// 2. Codes are taken less 8, which keeps the sums small; tiles of odd n are 16 times too large.
struct Products {
  float acc[8][4], center[4], offset[4];

  static constexpr int kParamBytes = 4;  // of a channel
  // Which of the two blocks the lane has.
  static __device__ int lane_block() { return threadIdx.x % 4 / 2; }

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < 4; ++i) center[i] = offset[i] = 0;
#pragma unroll
    for (int k = 0; k < 8; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[k][i] = 0;
    }
  }

  // `query` of the lane's column: channels 2 p, 2 p + 1 and 8 more, of two tiles of 16. With
  // kOnly, this is the first and last step, and sums start from the center.
  template <bool kOnly>
  __device__ void add(uint32_t slot, const uint32_t (&query)[2][2]) {
    const int lane = threadIdx.x % 32, block = lane / 16;
    const uint32_t params = slot + 2 * kCodesOfStep + block * kStepChannels * 4 + lane % 4 * 8;
    constexpr uint32_t kOnes[4] = {0x3c003c00u, 0x3c003c00u, 0x3c003c00u, 0x3c003c00u};
    constexpr uint32_t kMinusEight[4] = {0x80088008u, 0x80088008u, 0x80088008u, 0x80088008u};
    uint32_t b[2][2][2];  // [block][tile of channels][register]
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      uint32_t scaled[2], middle[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        uint32_t x, y;
        asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];"
                     : "=r"(x), "=r"(y)
                     : "r"(params + (16 * s + 8 * j) * 4)
                     : "memory");
        const __half2 scale = as_half2(__byte_perm(x, y, 0x5410));
        const __half2 minimum = as_half2(__byte_perm(x, y, 0x7632));
        const __half2 q = as_half2(query[s][j]);
        scaled[j] = as_word(__hmul2(q, scale));
        // (minimum + 8 scale) without the query's shift
        const __half2 unshifted = __hmul2(minimum, __float2half2_rn(1.0f / (1 << kQueryShift)));
        const __half2 mid = __hfma2(scale, __float2half2_rn(8.0f / (1 << kQueryShift)), unshifted);
        middle[j] = as_word(__hmul2(q, mid));
        b[0][s][j] = block == 0 ? scaled[j] : 0;
        b[1][s][j] = block == 0 ? 0 : scaled[j];
      }
      mma<__half>(center, kMinusEight, scaled[0], scaled[1], center);
      mma<__half>(offset, kOnes, middle[0], middle[1], offset);
    }
    if constexpr (kOnly) {
#pragma unroll
      for (int k = 0; k < 8; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[k][i] = k & 2 ? 16 * center[i % 2] : center[i % 2];
      }
    }
    // Matrices of 8 channels and 16 bytes; their places are swizzled against bank conflicts.
    const int matrix = lane / 8, r = lane % 8;
    const uint32_t codes = slot + (8 * (matrix / 2) + r) * kCodeBytes + ((matrix % 2 ^ r / 2) * 16);
#pragma unroll
    for (int block_of = 0; block_of < 2; ++block_of) {
#pragma unroll
      for (int s = 0; s < 2; ++s) {
#pragma unroll
        for (int ab = 0; ab < 2; ++ab) {
          uint32_t words[4];
          load_matrices_transposed(
              words, (codes ^ (32 * ab)) + block_of * kCodesOfStep + 16 * s * kCodeBytes);
#pragma unroll
          for (int n = 0; n < 4; ++n) {
            uint32_t a[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              a[i] = (words[i] >> (n / 2 * 8)) & (n % 2 ? 0x00f000f0u : 0x000f000fu);
            }
            float (&sum)[4] = acc[2 * n + ab];
            mma<__half>(sum, a, b[block_of][s][0], b[block_of][s][1], sum);
          }
        }
      }
    }
  }

  // Exponentials of the lane's 16 tokens and two heads, relative to the block's maximum; that and
  // their sum as (top, sum) of each head.
  template <bool kCentered, bool kCap>
  __device__ float4 finish(float soft_cap, uint32_t (&words)[8]) {
    constexpr float kUnit = 1 << (24 - kQueryShift);
    if constexpr (!kCentered) {
#pragma unroll
      for (int k = 0; k < 8; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[k][i] += k & 2 ? 16 * center[i] : center[i];
      }
    }
    __half2 e[8][2];
    float2 top;
    if constexpr (kCap) {
      float2 peak = {-INFINITY, -INFINITY};
#pragma unroll
      for (int k = 0; k < 8; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          acc[k][i] = cap_logit(fmaf(acc[k][i], k & 2 ? kUnit / 16 : kUnit, offset[i]), soft_cap);
          float& highest = i % 2 ? peak.y : peak.x;
          highest = fmaxf(highest, acc[k][i]);
        }
      }
#pragma unroll
      for (int i = 4; i < 32; i *= 2) {
        peak.x = fmaxf(peak.x, __shfl_xor_sync(kFullMask, peak.x, i));
        peak.y = fmaxf(peak.y, __shfl_xor_sync(kFullMask, peak.y, i));
      }
#pragma unroll
      for (int k = 0; k < 8; ++k) {
#pragma unroll
        for (int t = 0; t < 2; ++t) {
          e[k][t] =
              exp2_half2(__floats2half2_rn(acc[k][2 * t] - peak.x, acc[k][2 * t + 1] - peak.y));
        }
      }
      top = peak;
    } else {
      __half2 highest[2];  // of even and of odd n
#pragma unroll
      for (int k = 0; k < 8; ++k) {
#pragma unroll
        for (int t = 0; t < 2; ++t) {
          e[k][t] = __floats2half2_rn(acc[k][2 * t], acc[k][2 * t + 1]);
          __half2& mine = highest[k / 2 % 2];
          mine = (k == 0 || k == 2) && t == 0 ? e[k][t] : __hmax2(mine, e[k][t]);
        }
      }
      const __half2 units[2] = {__float2half2_rn(kUnit), __float2half2_rn(kUnit / 16)};
      const __half2 peak =
          max_over_tokens(__hmax2(__hmul2(highest[0], units[0]), __hmul2(highest[1], units[1])));
#pragma unroll
      for (int k = 0; k < 8; ++k) {
#pragma unroll
        for (int t = 0; t < 2; ++t) {
          e[k][t] = exp2_half2(__hfma2(e[k][t], units[k / 2 % 2], __hneg2(peak)));
        }
      }
      top = __half22float2(peak);
      top.x += offset[0];
      top.y += offset[1];
    }
    return pack_block<4>(e, top, words);
  }
};

}  // namespace vllm_sparse::cuda
