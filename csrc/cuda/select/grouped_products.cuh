// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// Products of products.cuh where a channel has a scale for each 32 tokens of a block.
#pragma once

#include "select/products.cuh"

namespace vllm_sparse::cuda {

// In tile 2 n + ab, even rows are tokens below 64 and odd rows those above, of group n / 2 there.
// Columns 0 to 3 are four heads with the scales of one half of the block, columns 4 to 7 with
// those of the other: which half is which differs between the two blocks. So each lane has what
// counts of one block, and the other way round nothing that counts.
struct GroupedProducts {
  float acc[2][8][4], offset[2][2][4];  // of both blocks; of groups n / 2

  static constexpr int kParamBytes = 16;
  static __device__ int lane_block() { return (threadIdx.x / 4 ^ threadIdx.x / 2) & 1; }

  __device__ void clear() {
#pragma unroll
    for (auto& block : acc) {
#pragma unroll
      for (auto& tile : block) tile[0] = tile[1] = tile[2] = tile[3] = 0;
    }
#pragma unroll
    for (auto& block : offset) {
#pragma unroll
      for (auto& group : block) group[0] = group[1] = group[2] = group[3] = 0;
    }
  }

  template <bool kOnly>
  __device__ void add(uint32_t slot, const uint32_t (&query)[2][2]) {
    const int lane = threadIdx.x % 32;
    constexpr uint32_t kOnes[4] = {0x3c003c00u, 0x3c003c00u, 0x3c003c00u, 0x3c003c00u};
    const int matrix = lane / 8, r = lane % 8;
    const uint32_t codes = slot + (8 * (matrix / 2) + r) * kCodeBytes + ((matrix % 2 ^ r / 2) * 16);
    const uint32_t params = slot + 2 * kCodesOfStep + lane % 4 * 2 * kParamBytes + lane / 16 * 8;
#pragma unroll
    for (int block = 0; block < 2; ++block) {
      const uint32_t of_block = (params ^ (8 * block)) + block * kStepChannels * kParamBytes;
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        uint32_t scaled[2][2], middle[2][2];  // [group][register]
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          uint32_t x[2], y[2];  // of two channels
          const uint32_t from = of_block + (16 * s + 8 * j) * kParamBytes;
          load_pair(x, from);
          load_pair(y, from + kParamBytes);
          const __half2 q = as_half2(query[s][j]);
#pragma unroll
          for (int g = 0; g < 2; ++g) {
            const __half2 scale = as_half2(__byte_perm(x[g], y[g], 0x5410));
            const __half2 minimum = as_half2(__byte_perm(x[g], y[g], 0x7632));
            scaled[g][j] = as_word(__hmul2(q, scale));
            middle[g][j] =
                as_word(__hmul2(q, __hmul2(minimum, __float2half2_rn(1.0f / (1 << kQueryShift)))));
          }
        }
#pragma unroll
        for (int g = 0; g < 2; ++g) {
          mma<__half>(offset[block][g], kOnes, middle[g][0], middle[g][1], offset[block][g]);
        }
#pragma unroll
        for (int ab = 0; ab < 2; ++ab) {
          uint32_t words[4];
          load_matrices_transposed(
              words, (codes ^ (32 * ab)) + block * kCodesOfStep + 16 * s * kCodeBytes);
#pragma unroll
          for (int n = 0; n < 4; ++n) {
            uint32_t a[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              a[i] = (words[i] >> (n / 2 * 8)) & (n % 2 ? 0x00f000f0u : 0x000f000fu);
            }
            float (&sum)[4] = acc[block][2 * n + ab];
            mma<__half>(sum, a, scaled[n / 2][0], scaled[n / 2][1], sum);
          }
        }
      }
    }
  }

  // As Products::finish.
  template <bool kCentered, bool kCap>
  __device__ float4 finish(float soft_cap, uint32_t (&words)[8]) {
    constexpr float kUnit = 1 << (24 - kQueryShift);
    const bool second = lane_block() == 1;
    float x[8][4];
    float2 top = {-INFINITY, -INFINITY};
#pragma unroll
    for (int k = 0; k < 8; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float sum = second ? acc[1][k][i] : acc[0][k][i];
        const float add = second ? offset[1][k / 4][i] : offset[0][k / 4][i];
        x[k][i] = fmaf(sum, k & 2 ? kUnit / 16 : kUnit, add);
        if constexpr (kCap) x[k][i] = cap_logit(x[k][i], soft_cap);
        float& highest = i % 2 ? top.y : top.x;
        highest = fmaxf(highest, x[k][i]);
      }
    }
#pragma unroll
    for (int i = 4; i < 32; i *= 2) {
      const int other = i == 4 ? 6 : i;
      top.x = fmaxf(top.x, __shfl_xor_sync(kFullMask, top.x, other));
      top.y = fmaxf(top.y, __shfl_xor_sync(kFullMask, top.y, other));
    }
    __half2 e[8][2];
#pragma unroll
    for (int k = 0; k < 8; ++k) {
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        e[k][t] = exp2_half2(__floats2half2_rn(x[k][2 * t] - top.x, x[k][2 * t + 1] - top.y));
      }
    }
    return pack_block<6>(e, top, words);
  }
};

}  // namespace vllm_sparse::cuda
