// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// A quantised block in a warp's shared memory: how it comes there, and its products with up to four
// query heads on the tensor cores.
//
// Codes enter the products as they are, as fp16 denormals; scales are factors of the queries and of
// the probabilities. Codes in the upper half of a byte come out 16 times too large. A warp's rows
// of K's products are tokens t(r) = 8 ab + 16 n + 64 (r & 1) + r / 2 (and 4 more from row 8 on) of
// tile 2 n + ab; columns 2 h and 2 h + 1 are head h, with the scales of even and of odd rows. So a
// lane has numbers of one head, lane % 4.
#pragma once

#include "attend/accumulate.cuh"
#include "attend/code_factors.cuh"
#include "common/kernels.h"

namespace vllm_sparse::cuda {

template <int D, int kKeyBits, int kValueBits>
struct BlockShape {
  static constexpr int kSize = D, kKey = kKeyBits, kValue = kValueBits;
  static constexpr int kPlanes = kKeyBits / 4, kKeyGroups = kKeyBits == 4 ? 4 : 1;
  static constexpr int kPlaneBytes = D * kCodeBytes;
  static constexpr int kKeyParams = kPlanes * kPlaneBytes;
  static constexpr int kKeyBytes = kKeyParams + D * 4 * kKeyGroups;
  static constexpr int kValueGroup = kValueBits == 4 ? 32 : 64, kValueGroups = D / kValueGroup;
  static constexpr int kRowBytes = D * kValueBits / 8, kPieces = kRowBytes / 16;
  static constexpr int kValueParams = kBlockSize * kRowBytes;  // after the block's K
  static constexpr int kValueBytes = kValueParams + kBlockSize * 4 * kValueGroups;
  static constexpr int kBytes = kKeyBytes + kValueBytes;
  static constexpr int kTiles = D / 16;  // of V's products

  static bool covers(const KvCache& cache) {
    return cache.head_size == D && cache.key_bits == kKeyBits && !cache.key_rows &&
           cache.value_bits == kValueBits && cache.key_groups == kKeyGroups &&
           cache.value_group == kValueGroup;
  }
  // Moves the 16-byte pieces of V's rows, so that those which are read together lie in different
  // banks: rows t ... t + 3 and 64 after these.
  static __device__ int swizzle(int row) {
    if (kPieces == 8) return row % 4 | row / 64 << 2;
    if (kPieces == 4) return row / 2 % 2 | row / 64 << 1;
    return row / 64;
  }
};

// K of a block.
template <class S>
__device__ inline void copy_keys(const uint8_t* chunk, uint32_t slot) {
  const int lane = threadIdx.x % 32;
  const uint32_t to = slot + lane / 4 * kCodeBytes + (lane % 4 ^ lane / 8) * 16;
  const uint8_t* from = chunk + lane * 16;
#pragma unroll
  for (int i = 0; i < S::kKeyParams / 512; ++i) copy_async_16(to + i * 512, from + i * 512);
  constexpr int kParamPieces = (S::kKeyBytes - S::kKeyParams) / 16;
#pragma unroll
  for (int i = 0; i < (kParamPieces + 31) / 32; ++i) {
    if (lane + 32 * i < kParamPieces) {
      copy_async_16(slot + S::kKeyParams + lane * 16 + i * 512, from + S::kKeyParams + i * 512);
    }
  }
}

// V of the tokens in `mask`; parameters of the others are zero.
template <class S>
__device__ inline void copy_values(const uint8_t* values,
                                   const uint32_t (&mask)[4],
                                   uint32_t slot) {
  constexpr int kRows = 32 / S::kPieces;  // of one copy
  const int lane = threadIdx.x % 32, row = lane / S::kPieces, piece = lane % S::kPieces;
  const uint32_t low = slot + row * S::kRowBytes + (piece ^ S::swizzle(row)) * 16;
  const uint32_t high = slot + row * S::kRowBytes + (piece ^ S::swizzle(row + 64)) * 16;
  const uint8_t* from = values + lane * 16;
#pragma unroll
  for (int i = 0; i < kBlockSize / kRows; ++i) {
    if (mask[i * kRows / 32] >> (i * kRows % 32 + row) & 1) {
      copy_async_16((i * kRows < 64 ? low : high) + i * 512, from + i * 512);
    }
  }
  constexpr int kBytes = 4 * S::kValueGroups;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const bool listed = mask[i] >> lane & 1;
    const uint32_t at = S::kValueParams + (lane + 32 * i) * kBytes;
    if constexpr (kBytes == 16) {
      copy_async_16(slot + at, values + at, listed ? 16 : 0);
    } else {
#pragma unroll
      for (int b = 0; b < kBytes; b += 4)
        copy_async_4(slot + at + b, values + at + b, listed ? 4 : 0);
    }
  }
}

// Logits times `scale` of the lane's head: x[2 n + ab][i] of the tokens of rows lane / 4 + 8 i.
template <class S>
__device__ inline void key_products(uint32_t slot,
                                    const uint32_t (&q)[S::kSize / 16][2],
                                    float scale,
                                    float (&x)[8][2]) {
  const int lane = threadIdx.x % 32, pair = lane % 4, odd = lane / 4 % 2;
  const int matrix = lane / 8, r = lane % 8;
  const uint32_t codes = slot + (8 * (matrix / 2) + r) * kCodeBytes + ((matrix % 2 ^ r / 2) * 16);
  const uint32_t params = slot + S::kKeyParams + pair * 8 * S::kKeyGroups;
  constexpr int kSets = S::kKeyGroups == 4 ? 2 : 1;  // groups of the rows of one parity
  float acc[8][4] = {}, minima[kSets][4] = {}, scales[4] = {};
#pragma unroll
  for (int k = 0; k < S::kSize / 16; ++k) {
    uint32_t s[kSets][2], m[kSets][2], b[kSets][2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      uint32_t u[2], v[2];
      if constexpr (kSets == 2) {
        const uint32_t from = params + (16 * k + 8 * j) * 16 + odd * 8;
        load_pair(u, from);
        load_pair(v, from + 16);
      } else {
        load_pair(u, params + (16 * k + 8 * j) * 4);
        v[0] = u[1];
      }
#pragma unroll
      for (int g = 0; g < kSets; ++g) {
        s[g][j] = both_scales(u[g], v[g]);
        m[g][j] = both_minima(u[g], v[g]);
        b[g][j] = as_word(__hmul2(as_half2(q[k][j]), as_half2(s[g][j])));
      }
    }
#pragma unroll
    for (int g = 0; g < kSets; ++g) {
      const uint32_t a[4] = {m[g][0], m[g][0], m[g][1], m[g][1]};
      mma<__half>(minima[g], a, q[k][0], q[k][1], minima[g]);
    }
    if constexpr (S::kPlanes == 2) {
      const uint32_t a[4] = {s[0][0], s[0][0], s[0][1], s[0][1]};
      mma<__half>(scales, a, q[k][0], q[k][1], scales);
    }
#pragma unroll
    for (int plane = 0; plane < S::kPlanes; ++plane) {
      if (plane == 1) {
        const __half2 part = __float2half2_rn(0.0625f);
        b[0][0] = as_word(__hmul2(as_half2(b[0][0]), part));
        b[0][1] = as_word(__hmul2(as_half2(b[0][1]), part));
      }
#pragma unroll
      for (int ab = 0; ab < 2; ++ab) {
        uint32_t words[4];
        load_matrices_transposed(
            words, (codes ^ (32 * ab)) + plane * S::kPlaneBytes + 16 * k * kCodeBytes);
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          uint32_t a[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            a[i] = (words[i] >> (n / 2 * 8)) & (n % 2 ? 0x00f000f0u : 0x000f000fu);
          }
          const int g = kSets == 2 ? n / 2 : 0;
          mma<__half>(acc[2 * n + ab], a, b[g][0], b[g][1], acc[2 * n + ab]);
        }
      }
    }
  }
  const float unit = scale * (1 << (24 - kAttendShift));
  constexpr float kUnshift = 1.0f / (1 << kAttendShift);
#pragma unroll
  for (int t = 0; t < 8; ++t) {
    float add = minima[kSets == 2 ? t / 4 : 0][0];
    if (S::kPlanes == 2) add -= 7.5f / 16 * scales[0];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float sum = kSets == 2 && odd ? acc[t][2 * i + 1] : acc[t][2 * i];
      x[t][i] = fmaf(sum, t & 2 ? unit / 16 : unit, add * (scale * kUnshift));
    }
  }
}

// A warp's sums over V. Tile m of 4-bit values: byte 2 u + m % 2 of piece m / 2, u = lane / 4,
// lower half in elements 0 (of head lane % 4), upper half in elements 2. Tile m of 8-bit values:
// bytes 2 u and 2 u + 1 of piece m. `least`: of the minima, in group lane / 4.
template <class S>
struct ValueSums {
  float o[S::kTiles][4], least[4];

  __device__ void clear() {
#pragma unroll
    for (auto& tile : o) tile[0] = tile[1] = tile[2] = tile[3] = 0;
    least[0] = least[1] = least[2] = least[3] = 0;
  }
  __device__ void scale(float low, float high, float minimum) {
#pragma unroll
    for (auto& tile : o) tile[0] *= low, tile[2] *= high;
    least[0] *= minimum;
  }
  static constexpr float kUnit = 1 << 24, kHighUnit = S::kValue == 4 ? 1 << 20 : 1 << 24;
  // The channel of element 0 or 2.
  static __device__ int channel(int tile, int element) {
    const int u = threadIdx.x % 32 / 4;
    if (S::kValue == 8) return 16 * tile + 2 * u + element / 2;
    return tile / 2 * 32 + u / 4 * 16 + u % 4 * 2 + tile % 2 + element * 4;
  }

  // Tile `t` of K's products; `p`: probabilities of its tokens in pairs, columns as there.
  __device__ void add(uint32_t slot, int t, const uint32_t (&p)[2]) {
    const int lane = threadIdx.x % 32, pair = lane % 4;
    const int first = 8 * (t % 2) + 16 * (t / 2);
    constexpr int G = S::kValueGroups;
    const uint32_t params = slot + S::kValueParams + (first + pair) * 4 * G;
    uint32_t b[G][2], a_least[4];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      uint32_t w[2][G];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t from = params + (4 * j + 64 * h) * 4 * G;
        if constexpr (G == 4) {
          asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                       : "=r"(w[h][0]), "=r"(w[h][1]), "=r"(w[h][2]), "=r"(w[h][3])
                       : "r"(from)
                       : "memory");
        } else if constexpr (G == 2) {
          load_pair(w[h], from);
        } else {
          w[h][0] = load_word(from);
        }
      }
#pragma unroll
      for (int g = 0; g < G; ++g) {
        b[g][j] = as_word(__hmul2(as_half2(p[j]), as_half2(both_scales(w[0][g], w[1][g]))));
      }
      const uint32_t mine = params + 4 * j * 4 * G + min(lane / 4, G - 1) * 4;
      a_least[2 * j] = a_least[2 * j + 1] =
          both_minima(load_word(mine), load_word(mine + 64 * 4 * G));
    }
    mma<__half>(least, a_least, p[0], p[1], least);
    const int matrix = lane / 8, k = lane % 8;
    const int row = 64 * (k % 2) + k / 2 + 4 * (matrix % 2);
    const uint32_t codes = slot + row * S::kRowBytes + (matrix / 2 ^ S::swizzle(row)) * 16;
#pragma unroll
    for (int m = 0; m < S::kPieces; m += 2) {
      uint32_t words[4];
      load_matrices_transposed(words, (codes ^ (m * 16)) + first * S::kRowBytes);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t x = words[2 * h], y = words[2 * h + 1];
        const int g = (m + h) * 16 * 8 / S::kValue / S::kValueGroup;
        if constexpr (S::kValue == 4) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const uint32_t a[4] = {x >> (8 * j) & 0x000f000fu,
                                   x >> (8 * j) & 0x00f000f0u,
                                   y >> (8 * j) & 0x000f000fu,
                                   y >> (8 * j) & 0x00f000f0u};
            mma<__half>(o[2 * (m + h) + j], a, b[g][0], b[g][1], o[2 * (m + h) + j]);
          }
        } else {
          const uint32_t a[4] = {
              x & 0x00ff00ffu, x >> 8 & 0x00ff00ffu, y & 0x00ff00ffu, y >> 8 & 0x00ff00ffu};
          mma<__half>(o[m + h], a, b[g][0], b[g][1], o[m + h]);
        }
      }
    }
  }
};

}  // namespace vllm_sparse::cuda
