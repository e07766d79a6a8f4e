// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// Quantising a block's rows (KIVI, arXiv 2402.02750), by a thread block.
#pragma once

#include "store/new_tokens.cuh"

namespace vllm_sparse::cuda {

constexpr int kSealThreads = 512;

// fp16 numbers (scale, minimum) of a range, rounded before codes are taken.
struct Range {
  __half scale, minimum;
  float base, divisor;
  __device__ void round(float step, float low) {
    scale = __float2half_rn(fminf(step, 65504.0f));
    minimum = clamped_half(low);
    base = __half2float(minimum);
    divisor = __half2float(scale) > 0 ? __half2float(scale) : 1.0f;
  }
  __device__ float place(float x) const { return __fdiv_rn(__fsub_rn(x, base), divisor); }
};

// K of a block: a thread takes 16 tokens of a channel, which share a nibble of its words. The
// operations and their order are the reference's.
template <class T, int kBits, int kGroups>
__device__ void quantise_keys(const StoreArgs& p, const T* const* rows, uint8_t* chunk) {
  constexpr int kParts = kBlockSize / kLanes, kChannels = kSealThreads / kParts;
  constexpr int kPlanes = kBits / 4, kEach = kParts / kGroups;  // parts of a group
  __shared__ float2 ends[kParts][kChannels];
  __shared__ uint32_t words[kPlanes][kChannels][kLanes + 1];
  const int part = threadIdx.x / kChannels, c = threadIdx.x % kChannels;
  for (int first = 0; first < p.cache.head_size; first += kChannels) {
    const int d = first + c, count = min(kChannels, p.cache.head_size - first);
    float k[kLanes], low = INFINITY, high = -INFINITY;
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      k[i] = c < count ? to_float(rows[part * kLanes + i][d]) : 0;
      low = fminf(low, k[i]);
      high = fmaxf(high, k[i]);
    }
    __syncthreads();  // the words of the channels before are stored
    ends[part][c] = {low, high};
    for (int i = threadIdx.x; i < kPlanes * kChannels * (kLanes + 1); i += kSealThreads) {
      (&words[0][0][0])[i] = 0;
    }
    __syncthreads();
    const int group = part / kEach;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const float2 other = ends[group * kEach + i][c];
      low = fminf(low, other.x);
      high = fmaxf(high, other.y);
    }
    Range range;
    if constexpr (kBits == 8) {
      const float step = __fdiv_rn(__fsub_rn(high, low), 255.0f);
      const float shift = __fsub_rn(__fmul_rn(step, 8.0f), __fmul_rn(step, 0.5f));
      range.round(__fmul_rn(step, 16.0f), __fadd_rn(low, shift));
      if (__half2float(range.scale) > 0) range.divisor *= 0.0625f;
    } else {
      range.round(__fdiv_rn(__fsub_rn(high, low), 15.0f), low);
    }
    if (c < count && part % kEach == 0) {
      reinterpret_cast<__half2*>(chunk + p.codes.params)[d * kGroups + group] =
          __halves2half2(range.scale, range.minimum);
    }
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      const float x = range.place(k[i]);
      if constexpr (kBits == 8) {
        const uint32_t code =
            static_cast<uint32_t>(fminf(fmaxf(rintf(__fadd_rn(x, 7.5f)), 0.0f), 255.0f));
        atomicOr(&words[0][c][i], (code >> 4) << (4 * part));
        atomicOr(&words[1][c][i], (code & 15) << (4 * part));
      } else {
        const uint32_t code = static_cast<uint32_t>(fminf(fmaxf(rintf(x), 0.0f), 15.0f));
        atomicOr(&words[0][c][i], code << (4 * part));
      }
    }
    __syncthreads();
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
      uint32_t* to = reinterpret_cast<uint32_t*>(chunk + (plane ? p.codes.low_codes : 0));
      for (int i = threadIdx.x; i < count * kLanes; i += kSealThreads) {
        to[first * kLanes + i] = words[plane][i / kLanes][i % kLanes];
      }
    }
  }
}

// Half a warp takes a group of channels of a token.
template <class T>
__device__ void quantise_tokens(int head_size, const T* const* rows, const TokenCodes& out) {
  constexpr int kMost = kMaxHeadSize / 16;  // sixteens of channels of a group
  const int each = out.group / 16, groups = head_size / out.group;
  const int c = threadIdx.x % 16;
  const float most = out.bits == 8 ? 255.0f : 15.0f;
  for (int task = threadIdx.x / 16; task < kBlockSize * groups; task += kSealThreads / 16) {
    const int token = task / groups, group = task % groups;
    const int first = group * out.group;
    float x[kMost], low = INFINITY, high = -INFINITY;
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      if (i >= each) break;
      x[i] = to_float(rows[token][first + 16 * i + c]);
      low = fminf(low, x[i]);
      high = fmaxf(high, x[i]);
    }
    for (int i = 1; i < 16; i *= 2) {
      low = fminf(low, __shfl_xor_sync(kFullMask, low, i));
      high = fmaxf(high, __shfl_xor_sync(kFullMask, high, i));
    }
    Range range;
    range.round(__fdiv_rn(__fsub_rn(high, low), most), low);
    if (c == 0) {
      reinterpret_cast<__half2*>(out.params + token * out.param_bytes)[group] =
          __halves2half2(range.scale, range.minimum);
    }
    uint8_t* to = out.codes + token * out.code_bytes;
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      if (i >= each) break;
      const uint32_t code =
          static_cast<uint32_t>(fminf(fmaxf(rintf(range.place(x[i])), 0.0f), most));
      const uint32_t other = __shfl_down_sync(kFullMask, code, 8, 16);
      if (out.bits == 8) {
        to[first + 16 * i + c] = static_cast<uint8_t>(code);
      } else if (c < 8) {
        to[(first + 16 * i) / 2 + c] = static_cast<uint8_t>(code | other << 4);
      }
    }
  }
}

}  // namespace vllm_sparse::cuda
