// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// Online softmax over tiles of 16 tokens on the tensor cores, and how partial results merge.
#pragma once

#include "common/instructions.cuh"

namespace vllm_sparse::cuda {

template <class T>
__device__ inline uint32_t pack(float x, float y) {
  if constexpr (std::is_same_v<T, __half>) return as_word(__floats2half2_rn(x, y));
  const __nv_bfloat162 both = __floats2bfloat162_rn(x, y);
  return reinterpret_cast<const uint32_t&>(both);
}

// The transpose of an 8 by 8 matrix whose rows lie in groups of four lanes.
__device__ inline uint32_t transpose(uint32_t x) {
  uint32_t y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// A warp's running result, transposed so that query heads are columns, of which a tensor-core tile
// has eight: of heads 8 n + lane % 4 * 2 and the one after it, elements 16 k + lane / 4 and 8 more.
template <class T, int kD, int kRows>
struct Accumulator {
  static constexpr int kTiles = kRows / 8;
  uint32_t q[kD / 16][kTiles][2];
  float o[kD / 16][kTiles][4], m[kTiles][2], l[kTiles][2];  // l: of this lane's tokens

  __device__ void begin(const T* query, int heads, int head_size) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < kD / 16; ++k) {
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) {
        const int head = lane / 4 + i / 2 * 8, d = 16 * k + i % 2 * 8 + lane % 4 * 2;
        q[k][i / 2][i % 2] = head < heads && d < head_size
                                 ? *reinterpret_cast<const uint32_t*>(query + head * head_size + d)
                                 : 0;
      }
    }
#pragma unroll
    for (auto& tiles : o) {
#pragma unroll
      for (auto& tile : tiles) tile[0] = tile[1] = tile[2] = tile[3] = 0;
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      m[n][0] = m[n][1] = -INFINITY;
      l[n][0] = l[n][1] = 0;
    }
  }

  // Probabilities of a tile of 16 keys, of which `left` count, as the second factor of their
  // products with values.
  __device__ void add_keys(uint32_t keys,
                           int pitch,
                           int head_size,
                           int left,
                           float scale,
                           float cap,
                           uint32_t (&p)[kTiles][2]) {
    const int lane = threadIdx.x % 32;
    const uint32_t from = keys + lane % 16 * pitch + lane / 16 * 16;
    float s[2][kTiles][4] = {};  // two sums each, for a shorter chain
#pragma unroll
    for (int k = 0; k < kD / 16; ++k) {
      if (k * 16 < head_size) {
        uint32_t a[4];
        load_matrices(a, from + k * 32);
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          mma<T>(s[k % 2][n], a, q[k][n][0], q[k][n][1], s[k % 2][n]);
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      float x[4], factor[2];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x[i] = (s[0][n][i] + s[1][n][i]) * scale;
        if (cap > 0) x[i] = cap * kLog2e * tanhf(x[i] / cap);
        if (lane / 4 + i / 2 * 8 >= left) x[i] = -INFINITY;
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float peak = fmaxf(m[n][h], fmaxf(x[h], x[h + 2]));
#pragma unroll
        for (int i = 4; i < 32; i *= 2) peak = fmaxf(peak, __shfl_xor_sync(kFullMask, peak, i));
        // Nothing yet: any finite value keeps NaN out.
        const float shift = peak == -INFINITY ? 0 : peak;
        factor[h] = fast_exp2(m[n][h] - shift);
        m[n][h] = peak;
        x[h] = fast_exp2(x[h] - shift);
        x[h + 2] = fast_exp2(x[h + 2] - shift);
        l[n][h] = l[n][h] * factor[h] + x[h] + x[h + 2];
      }
      p[n][0] = transpose(pack<T>(x[0], x[1]));
      p[n][1] = transpose(pack<T>(x[2], x[3]));
      if (__any_sync(kFullMask, factor[0] != 1 || factor[1] != 1)) {
#pragma unroll
        for (auto& tiles : o) {
#pragma unroll
          for (int i = 0; i < 4; ++i) tiles[n][i] *= factor[i % 2];
        }
      }
    }
  }

  __device__ void add_values(uint32_t values,
                             int pitch,
                             int head_size,
                             const uint32_t (&p)[kTiles][2]) {
    const int lane = threadIdx.x % 32;
    const uint32_t from = values + (lane % 8 + lane / 16 * 8) * pitch + lane / 8 % 2 * 16;
#pragma unroll
    for (int k = 0; k < kD / 16; ++k) {
      if (k * 16 < head_size) {
        uint32_t a[4];
        load_matrices_transposed(a, from + k * 32);
#pragma unroll
        for (int n = 0; n < kTiles; ++n) mma<T>(o[k][n], a, p[n][0], p[n][1], o[k][n]);
      }
    }
  }

  __device__ void store(int heads, float* merge, int pitch, float2* ends) {
    store(0, kD, heads, merge, pitch, ends);
  }
  // Elements [first, end) of the result to merge[head][pitch], with the first of them (top, total)
  // of every head to `ends`. Both are constants once loops are unrolled.
  __device__ void store(int first, int end, int heads, float* merge, int pitch, float2* ends) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int head = 8 * n + lane % 4 * 2 + h;
        if (first == 0) {
          float total = l[n][h];
#pragma unroll
          for (int i = 4; i < 32; i *= 2) total += __shfl_xor_sync(kFullMask, total, i);
          if (lane < 4) ends[head] = {m[n][h], total};
        }
        if (head < heads) {
          float* to = merge + head * pitch + lane / 4;
#pragma unroll
          for (int k = 0; k < kD / 16; ++k) {
            if (16 * k < first || 16 * k >= end) continue;
            to[16 * k - first] = o[k][n][h];
            to[16 * k - first + 8] = o[k][n][h + 2];
          }
        }
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
  // A logit that joins the softmax and has no value.
  __device__ void add_sink(float logit, float4& sum) { add(logit * kLog2e, 1, {}, sum); }
};

}  // namespace vllm_sparse::cuda
