// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// Logits of a sealed block from 4-bit codes, on the tensor cores: a warp multiplies [128 tokens,
// rank] codes with [rank, heads] queries.
#pragma once

#include "common.cuh"

namespace vllm_sparse::cuda {

// A nibble c in a 16-bit lane is the fp16 denormal c * 2^-24, exact in the product: unpacking is
// masking. Queries carry 2^kQueryShift so that what they lose to fp16 stays far below a code unit.
constexpr int kQueryShift = 5;

struct ScoreQuery {
  const float* query;  // shared [padded rank][pitch], times scale and temperature; 0 in padding
  const int* channel;  // shared [padded rank]
  int pitch;           // heads, padded
};

__device__ inline void mma(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline uint32_t pack(__half low, __half high) {
  return __half_as_ushort(low) | static_cast<uint32_t>(__half_as_ushort(high)) << 16;
}

// Codes and parameters of 16 * K channels, as one lane needs them.
template <int K>
struct Codes {
  uint2 words[K][4];
  __half2 params[K][4];

  // `codes` is the chunk's code area, parameters follow it.
  __device__ void load(const ScoreQuery& q, const uint8_t* codes, int head_size, int first) {
    const int lane = threadIdx.x % 32, pair = lane % 4, word = lane / 4;
#pragma unroll
    for (int k = 0; k < K; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int d = q.channel[first + 16 * k + 2 * pair + (i & 1) + 8 * (i >> 1)];
        words[k][i] = __ldg(reinterpret_cast<const uint2*>(codes + d * kCodeBytes) + word);
        params[k][i] = __ldg(reinterpret_cast<const __half2*>(codes + head_size * kCodeBytes) + d);
      }
    }
  }
};

// Accumulators of 128 tokens. Tile j holds the tokens 16 j + 2 (lane / 4) in rows 0 to 7 and the
// ones after them in rows 8 to 15, so that a lane's two rows are neighbours. Columns: with up to
// four heads, the queries' upper halves and then their lower halves; with eight, a tile for each.
template <bool kWide>
struct Logits {
  static constexpr int kHeads = kWide ? 8 : 4;
  static constexpr int kTokenTiles = kWide ? 8 : 4;  // of a lane, after `finish`
  float acc[kWide ? 2 : 1][8][4];
  float offset;  // of head lane / 4 % kHeads: sum of query * minimum

  __device__ void clear() {
    offset = 0;
#pragma unroll
    for (auto& part : acc) {
#pragma unroll
      for (auto& tile : part) tile[0] = tile[1] = tile[2] = tile[3] = 0;
    }
  }

  template <int K>
  __device__ void add(const ScoreQuery& q, const Codes<K>& codes, int first, int first_head) {
    const int lane = threadIdx.x % 32, pair = lane % 4, column = lane / 4;
    const int head = first_head + column % kHeads;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      __half high[4], low[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int c = first + 16 * k + 2 * pair + (i & 1) + 8 * (i >> 1);
        const float x = q.query[c * q.pitch + head];
        const float2 param = __half22float2(codes.params[k][i]);
        offset += x * param.y;
        const float y = x * param.x * (1 << kQueryShift);
        high[i] = __float2half_rn(fminf(fmaxf(y, -65504.0f), 65504.0f));
        low[i] = __float2half_rn(y - __half2float(high[i]));
      }
      uint32_t b[2][2];
      b[0][0] = pack(high[0], high[1]);
      b[0][1] = pack(high[2], high[3]);
      b[1][0] = pack(low[0], low[1]);
      b[1][1] = pack(low[2], low[3]);
      if (!kWide && column >= kHeads) {
        b[0][0] = b[1][0];
        b[0][1] = b[1][1];
      }
      const uint2* w = codes.words[k];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t bytes = half ? 0x7632 : 0x5410;
        uint32_t codes4[4] = {__byte_perm(w[0].x, w[1].x, bytes),
                              __byte_perm(w[0].y, w[1].y, bytes),
                              __byte_perm(w[2].x, w[3].x, bytes),
                              __byte_perm(w[2].y, w[3].y, bytes)};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          uint32_t a[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            a[i] = (codes4[i] >> (j / 2 * 8)) & (j % 2 ? 0x00f000f0u : 0x000f000fu);
          }
          mma(acc[0][4 * half + j], a, b[0][0], b[0][1]);
          if constexpr (kWide) mma(acc[1][4 * half + j], a, b[1][0], b[1][1]);
        }
      }
    }
  }

  // First of the lane's two heads and first of its token tiles.
  __device__ static int lane_head() { return 2 * (threadIdx.x % (kWide ? 4 : 2)); }
  __device__ static int lane_tile() { return kWide ? 0 : threadIdx.x % 4 / 2 * 4; }

  // out[tile][head][token]: the logits of this lane.
  __device__ void finish(float (&out)[kTokenTiles][2][2]) {
    offset += __shfl_xor_sync(kFullMask, offset, 1);
    offset += __shfl_xor_sync(kFullMask, offset, 2);
    const float offsets[2] = {__shfl_sync(kFullMask, offset, lane_head() * 4),
                              __shfl_sync(kFullMask, offset, lane_head() * 4 + 4)};
    const bool upper = threadIdx.x % 4 >= 2;
    constexpr float kUnit = static_cast<float>(1 << (24 - kQueryShift));
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float x;
        if constexpr (kWide) {
          x = acc[0][j][i] + acc[1][j][i];
        } else {
          const float other = upper ? acc[0][j][i] : acc[0][j + 4][i];
          x = upper ? acc[0][j + 4][i] : acc[0][j][i];
          x += __shfl_xor_sync(kFullMask, other, 2);
        }
        out[j][i % 2][i / 2] = x * (j % 2 ? kUnit / 16 : kUnit) + offsets[i % 2];
      }
    }
  }
};

}  // namespace vllm_sparse::cuda
