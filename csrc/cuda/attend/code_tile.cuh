// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// Tiles of 16 tokens with codes by token, 8 bits for K and 4 for V: how they come into a warp's
// shared memory, and a warp's online softmax over them.
//
// Codes enter the products as they are, as fp16 denormals; 4-bit codes in the upper half of a byte
// come out 16 times too large. K's scale and minimum are applied to the products, V's scales are
// factors of the probabilities.
#pragma once

#include "attend/accumulate.cuh"
#include "attend/code_factors.cuh"
#include "common/kernels.h"

namespace vllm_sparse::cuda {

// K rows, then V rows, each with its parameters in the gap that keeps rows in different banks.
template <int D>
struct CodeTile {
  static constexpr int kTokens = 16, kGroup = 32, kGroups = D / kGroup;
  static constexpr int kKeyPitch = D + 16, kValuePitch = D / 2 + 16;
  static constexpr int kValues = kTokens * kKeyPitch;
  static constexpr int kBytes = kValues + kTokens * kValuePitch;
  static constexpr int kUnit = 32;  // places of rows are counted in so many bytes

  static bool covers(const KvCache& cache) {
    const int64_t units = cache.block_stride / kUnit;
    return cache.key_rows && cache.head_size == D && cache.value_bits == 4 &&
           cache.value_group == kGroup && cache.element_size == 2 &&
           cache.block_stride % kUnit == 0 && units * cache.num_blocks <= UINT32_MAX;
  }
};

// Lane i has token i % 16: its chunk's place in units after `base`, and its place in the block.
template <int D>
__device__ inline void copy_code_tile(
    const uint8_t* base, const Codes& codes, uint32_t chunk, int token, uint32_t slot) {
  using Tile = CodeTile<D>;
  constexpr int kKeyLanes = D / 16, kValueLanes = D / 32, kTokens = Tile::kTokens;  // of a row
  const int lane = threadIdx.x % 32;
  {
    constexpr int kRows = 32 / kKeyLanes;  // of one copy
    const uint32_t mine = chunk + token * (D / Tile::kUnit);
    const uint8_t* from = base + codes.key_rows + lane % kKeyLanes * 16;
    const uint32_t to = slot + lane / kKeyLanes * Tile::kKeyPitch + lane % kKeyLanes * 16;
#pragma unroll
    for (int i = 0; i < kTokens / kRows; ++i) {
      const uint32_t place = __shfl_sync(kFullMask, mine, lane / kKeyLanes + i * kRows);
      copy_async_16(to + i * kRows * Tile::kKeyPitch, from + place * uint64_t{Tile::kUnit});
    }
  }
  {
    constexpr int kRows = 32 / kValueLanes;
    const uint32_t mine = chunk + token * (D / 2 / Tile::kUnit);
    const uint8_t* from = base + codes.value_codes + lane % kValueLanes * 16;
    const uint32_t to =
        slot + Tile::kValues + lane / kValueLanes * Tile::kValuePitch + lane % kValueLanes * 16;
#pragma unroll
    for (int i = 0; i < kTokens / kRows; ++i) {
      const uint32_t place = __shfl_sync(kFullMask, mine, lane / kValueLanes + i * kRows);
      copy_async_16(to + i * kRows * Tile::kValuePitch, from + place * uint64_t{Tile::kUnit});
    }
  }
  const uint8_t* mine = base + chunk * uint64_t{Tile::kUnit};
  const uint32_t key = slot + lane % kTokens * Tile::kKeyPitch + D;
  const uint32_t value = slot + Tile::kValues + lane % kTokens * Tile::kValuePitch + D / 2;
  if (lane < kTokens) {
    copy_async_params<4 * Tile::kGroups>(value,
                                         mine + codes.value_params + token * 4 * Tile::kGroups);
  } else {
    copy_async_params<4>(key, mine + codes.key_row_params + token * 4);
  }
}

// The lane's (pair = lane % 4, u = lane / 4) share of a warp's running result, laid out as
// Accumulator's: of heads 2 pair and 2 pair + 1. Tile 2 m + j of the sums: channel(m, j) in
// elements 0 and 1, 8 more in elements 2 and 3. `least`: of the minima of V, in group u.
template <class T, int D>
struct CodeAccumulator {
  using Tile = CodeTile<D>;
  static constexpr int kGroups = Tile::kGroups;
  static constexpr float kUnit = 1 << 24, kHighUnit = 1 << 20;
  uint32_t q[D / 16][2];  // channels 16 k + 4 pair + 0 and 2, 1 and 3
  float q_sum[2];
  float o[D / 16][4], least[4], m[2], l[2];  // l: of this lane's tokens

  static __device__ int channel(int m, int j) {
    const int u = threadIdx.x % 32 / 4;
    return 32 * m + u / 4 * 16 + u % 4 * 2 + j;
  }

  // `query`: of the first of `heads` heads. Rows may be added before queries are loaded.
  __device__ void begin(const T* query, int heads) {
    clear();
    load(query, heads);
  }
  __device__ void clear() {
#pragma unroll
    for (auto& tile : o) tile[0] = tile[1] = tile[2] = tile[3] = 0;
    least[0] = least[1] = least[2] = least[3] = 0;
    m[0] = m[1] = -INFINITY;
    l[0] = l[1] = 0;
  }
  __device__ void load(const T* query, int heads) {
    const int lane = threadIdx.x % 32, head = lane / 4;
    float ones[4] = {};
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
      alignas(8) T of_query[4] = {};
      if (head < heads) {
        const T* from = query + head * D + 16 * k + lane % 4 * 4;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          reinterpret_cast<uint32_t*>(of_query)[i] = reinterpret_cast<const uint32_t*>(from)[i];
        }
      }
      float x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x[i] = to_float(of_query[i]);
        x[i] = fminf(fmaxf(x[i] * (1 << kAttendShift), -65504.0f), 65504.0f);
      }
      q[k][0] = as_word(__floats2half2_rn(x[0], x[2]));
      q[k][1] = as_word(__floats2half2_rn(x[1], x[3]));
      constexpr uint32_t kOnes[4] = {0x3c003c00u, 0x3c003c00u, 0x3c003c00u, 0x3c003c00u};
      mma<__half>(ones, kOnes, q[k][0], q[k][1], ones);
    }
    q_sum[0] = ones[0];
    q_sum[1] = ones[1];
  }

  __device__ void multiply(float even, float odd, float low, float high) {
#pragma unroll
    for (auto& tile : o) {
      tile[0] *= even * low, tile[1] *= odd * low;
      tile[2] *= even * high, tile[3] *= odd * high;
    }
  }

  // Logits of tokens u (0, 1) and u + 8 (2, 3) become probabilities, those outside `valid` none.
  __device__ void weigh(float (&x)[4], uint32_t valid, float cap) {
    const int u = threadIdx.x % 32 / 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (cap > 0) x[i] = cap * kLog2e * tanhf(x[i] / cap);
      if (!(valid >> (u + i / 2 * 8) & 1)) x[i] = -INFINITY;
    }
    float factor[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float peak = fmaxf(m[h], fmaxf(x[h], x[h + 2]));
#pragma unroll
      for (int i = 4; i < 32; i *= 2) peak = fmaxf(peak, __shfl_xor_sync(kFullMask, peak, i));
      // Nothing yet: any finite value keeps NaN out.
      const float shift = peak == -INFINITY ? 0 : peak;
      factor[h] = fast_exp2(m[h] - shift);
      m[h] = peak;
      x[h] = fast_exp2(x[h] - (shift - kWeightShift));
      x[h + 2] = fast_exp2(x[h + 2] - (shift - kWeightShift));
      l[h] = l[h] * factor[h] + x[h] + x[h + 2];
    }
    if (__any_sync(kFullMask, factor[0] != 1 || factor[1] != 1)) {
      multiply(factor[0], factor[1], 1, 1);
      least[0] *= factor[0], least[1] *= factor[1];
    }
  }

  // Probabilities of the tokens in `valid`, as the second factor of products with values.
  __device__ void add_keys(
      uint32_t slot, uint32_t valid, float scale, float cap, uint32_t (&p)[2]) {
    const int lane = threadIdx.x % 32;
    const uint32_t from = slot + lane % 16 * Tile::kKeyPitch + lane / 16 * 16;
    float s[2][4] = {};  // two sums each, for a shorter chain
#pragma unroll
    for (int k = 0; k < D / 16; k += 2) {
      uint32_t w[4];
      load_matrices(w, from + k * 16);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t x = w[2 * i], y = w[2 * i + 1];
        const uint32_t a[4] = {
            x & 0x00ff00ffu, y & 0x00ff00ffu, x >> 8 & 0x00ff00ffu, y >> 8 & 0x00ff00ffu};
        mma<__half>(s[i], a, q[k + i][0], q[k + i][1], s[i]);
      }
    }
    const uint32_t params = slot + lane / 4 * Tile::kKeyPitch + D;
    const float unit = scale * (1 << (24 - kAttendShift));
    const float unshift = scale * (1.0f / (1 << kAttendShift));
    float x[4];
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      const float2 range = __half22float2(as_half2(load_word(params + t * 8 * Tile::kKeyPitch)));
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int i = 2 * t + h;
        x[i] = fmaf(s[0][i] + s[1][i], unit * range.x, q_sum[h] * (unshift * range.y));
      }
    }
    weigh(x, valid, cap);
    p[0] = transpose(pack<__half>(x[0], x[1]));
    p[1] = transpose(pack<__half>(x[2], x[3]));
  }

  __device__ void add_values(uint32_t slot, const uint32_t (&p)[2]) {
    const int lane = threadIdx.x % 32, pair = lane % 4;
    const uint32_t values = slot + Tile::kValues;
    const uint32_t params = values + 2 * pair * Tile::kValuePitch + D / 2;
    uint32_t b[kGroups][2], a_least[4];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      uint32_t w[2][kGroups];
      const uint32_t from = params + 8 * j * Tile::kValuePitch;
      load_words(w[0], from);
      load_words(w[1], from + Tile::kValuePitch);
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        b[g][j] = as_word(__hmul2(as_half2(p[j]), as_half2(both_scales(w[0][g], w[1][g]))));
      }
      const uint32_t mine = from + min(lane / 4, kGroups - 1) * 4;
      a_least[2 * j] = a_least[2 * j + 1] =
          both_minima(load_word(mine), load_word(mine + Tile::kValuePitch));
    }
    mma<__half>(least, a_least, p[0], p[1], least);
    const uint32_t codes = values + lane % 16 * Tile::kValuePitch + lane / 16 * 16;
#pragma unroll
    for (int g = 0; g < kGroups; g += 2) {
      uint32_t words[4];
      load_matrices_transposed(words, codes + g * 16);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t x = words[2 * i], y = words[2 * i + 1];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const uint32_t a[4] = {x >> (8 * j) & 0x000f000fu,
                                 x >> (8 * j) & 0x00f000f0u,
                                 y >> (8 * j) & 0x000f000fu,
                                 y >> (8 * j) & 0x00f000f0u};
          float (&sum)[4] = o[2 * (g + i) + j];
          mma<__half>(sum, a, b[g + i][0], b[g + i][1], sum);
        }
      }
    }
  }

  // K|V rows of tokens u and u + 8, of which those in `valid` count; others are any that do.
  __device__ void add_rows(const T* low,
                           const T* high,
                           uint32_t valid,
                           const T* query,
                           int heads,
                           float scale,
                           float cap) {
    const int lane = threadIdx.x % 32, pair = lane % 4;
    // All that is read is under way before the first product.
    uint4 keys[D / 32][2];
    uint2 values[kGroups][4];  // tokens u and u + 8, then 8 more channels
#pragma unroll
    for (int k = 0; k < D / 32; ++k) {
      keys[k][0] = *reinterpret_cast<const uint4*>(low + 32 * k + 8 * pair);
      keys[k][1] = *reinterpret_cast<const uint4*>(high + 32 * k + 8 * pair);
    }
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      // Words of the channels that this lane's columns become once transposed.
      const int d = D + 32 * g + pair / 2 * 16 + pair % 2 * 4;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        values[g][i] = *reinterpret_cast<const uint2*>((i / 2 ? high : low) + d + i % 2 * 8);
      }
    }
    float x[4] = {};
#pragma unroll
    for (int k = 0; k < D / 32; ++k) {
      const int d = 32 * k + 8 * pair;
      const uint4 r = keys[k][0], s = keys[k][1];
      uint32_t of_query[4] = {};
      if (lane / 4 < heads) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          of_query[i] = reinterpret_cast<const uint32_t*>(query + lane / 4 * D + d)[i];
        }
      }
      const uint32_t a[4] = {r.x, s.x, r.y, s.y}, b[4] = {r.z, s.z, r.w, s.w};
      mma<T>(x, a, of_query[0], of_query[1], x);
      mma<T>(x, b, of_query[2], of_query[3], x);
    }
#pragma unroll
    for (auto& y : x) y *= scale;
    weigh(x, valid, cap);
    const uint32_t p[2] = {transpose(pack<T>(x[0], x[1])), transpose(pack<T>(x[2], x[3]))};
    multiply(1, 1, kUnit, kHighUnit);
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        uint32_t a[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          a[i] = transpose(__byte_perm(values[g][i].x, values[g][i].y, j ? 0x7632 : 0x5410));
        }
        mma<T>(o[2 * g + j], a, p[0], p[1], o[2 * g + j]);
      }
    }
    multiply(1, 1, 1 / kUnit, 1 / kHighUnit);
  }

  // To merge[head][pitch], with (top, total) of every head to `ends`.
  __device__ void store(int heads, float* merge, int pitch, float2* ends) {
    const int lane = threadIdx.x % 32, pair = lane % 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int head = 2 * pair + h;
      float total = l[h];
#pragma unroll
      for (int i = 4; i < 32; i *= 2) total += __shfl_xor_sync(kFullMask, total, i);
      if (lane < 4) ends[head] = {m[h] - kWeightShift, total};
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        const float minimum = __shfl_sync(kFullMask, least[h], 4 * g + pair);
        if (head >= heads) continue;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float* to = merge + head * pitch + channel(g, j);
          to[0] = fmaf(o[2 * g + j][h], kUnit, minimum);
          to[8] = fmaf(o[2 * g + j][2 + h], kHighUnit, minimum);
        }
      }
    }
  }
};

}  // namespace vllm_sparse::cuda
