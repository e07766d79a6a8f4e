// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// Online softmax over tiles of 16 tokens on the tensor cores, and how partial results merge.
#pragma once

#include "pipeline.cuh"

namespace vllm_sparse::cuda {

#ifdef __CUDACC__

template <class T>
__device__ inline uint32_t pack(float x, float y) {
  if constexpr (std::is_same_v<T, __half>) return as_word(__floats2half2_rn(x, y));
  const __nv_bfloat162 both = __floats2bfloat162_rn(x, y);
  return reinterpret_cast<const uint32_t&>(both);
}

// A warp's running result: rows are query heads lane / 4 and, with kRows 16, that plus 8.
template <class T, int kD, int kRows>
struct Accumulator {
  static constexpr int kHalves = kRows / 8;
  uint32_t q[kD / 16][4];
  float o[kD / 8][4], m[2], l[2];

  __device__ void begin(const T* query, int heads, int head_size) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < kD / 16; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int head = lane / 4 + i % 2 * 8, d = 16 * k + i / 2 * 8 + lane % 4 * 2;
        q[k][i] = i % 2 < kHalves && head < heads && d < head_size
                      ? *reinterpret_cast<const uint32_t*>(query + head * head_size + d)
                      : 0;
      }
    }
#pragma unroll
    for (auto& tile : o) tile[0] = tile[1] = tile[2] = tile[3] = 0;
    m[0] = m[1] = -INFINITY;
    l[0] = l[1] = 0;
  }

  // `left` tokens of the tile count.
  __device__ void add(uint32_t slot, int pitch, int head_size, int left, float scale, float cap) {
    const int lane = threadIdx.x % 32;
    const uint32_t keys = slot + (lane % 8 + lane / 16 * 8) * pitch + lane / 8 % 2 * 16;
    float s[2][2][4] = {};  // two sums each, for a shorter chain
#pragma unroll
    for (int k = 0; k < kD / 16; ++k) {
      if (k * 16 < head_size) {
        uint32_t b[4];
        load_matrices(b, keys + k * 32);
        mma<T>(s[k % 2][0], q[k], b[0], b[1], s[k % 2][0]);
        mma<T>(s[k % 2][1], q[k], b[2], b[3], s[k % 2][1]);
      }
    }
    uint32_t probabilities[4] = {};
#pragma unroll
    for (int r = 0; r < kHalves; ++r) {
      float x[4];
      float peak = m[r];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x[i] = (s[0][i / 2][2 * r + i % 2] + s[1][i / 2][2 * r + i % 2]) * scale;
        if (cap > 0) x[i] = cap * kLog2e * tanhf(x[i] / cap);
        if (i / 2 * 8 + lane % 4 * 2 + i % 2 >= left) x[i] = -INFINITY;
        peak = fmaxf(peak, x[i]);
      }
      peak = fmaxf(peak, __shfl_xor_sync(kFullMask, peak, 1));
      peak = fmaxf(peak, __shfl_xor_sync(kFullMask, peak, 2));
      // Nothing yet: any finite value keeps NaN out.
      const float shift = peak == -INFINITY ? 0 : peak;
      const float factor = fast_exp2(m[r] - shift);
      m[r] = peak;
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = fast_exp2(x[i] - shift);
      l[r] = l[r] * factor + (x[0] + x[1]) + (x[2] + x[3]);
      probabilities[r] = pack<T>(x[0], x[1]);
      probabilities[r + 2] = pack<T>(x[2], x[3]);
      if (__any_sync(kFullMask, factor != 1)) {
#pragma unroll
        for (auto& tile : o) {
          tile[2 * r] *= factor;
          tile[2 * r + 1] *= factor;
        }
      }
    }
    const uint32_t values =
        slot + 2 * head_size + (lane % 8 + lane / 8 % 2 * 8) * pitch + lane / 16 * 16;
#pragma unroll
    for (int k = 0; k < kD / 16; ++k) {
      if (k * 16 < head_size) {
        uint32_t b[4];
        load_matrices_transposed(b, values + k * 32);
        mma<T>(o[2 * k], probabilities, b[0], b[1], o[2 * k]);
        mma<T>(o[2 * k + 1], probabilities, b[2], b[3], o[2 * k + 1]);
      }
    }
  }
};

// What all warps of a thread block have of an item, or several thread blocks.
struct Merged {
  float top = -INFINITY, total = 0;
  __device__ void add(float other_top, float other_total, float4 x, float4& sum) {
    const float peak = fmaxf(top, other_top), shift = peak == -INFINITY ? 0 : peak;
    const float mine = fast_exp2(top - shift), other = fast_exp2(other_top - shift);
    total = total * mine + other_total * other;
    sum.x = sum.x * mine + x.x * other;
    sum.y = sum.y * mine + x.y * other;
    sum.z = sum.z * mine + x.z * other;
    sum.w = sum.w * mine + x.w * other;
    top = peak;
  }
};

#endif  // __CUDACC__

}  // namespace vllm_sparse::cuda
