// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// The codes of a sealed block (KIVI, arXiv 2402.02750), written and read: all that depends on a
// format, but for what the kernels with tensor cores load by themselves.
#pragma once

#include "common/kernels.h"
#include "common/primitives.cuh"

namespace vllm_sparse::cuda {

__device__ inline float2 scale_and_minimum(const uint8_t* params) {
  return __half22float2(*reinterpret_cast<const __half2*>(params));
}

// Codes by token, in groups of channels.
struct TokenCodes {
  int bits, group, code_bytes, param_bytes;  // bytes of a token
  uint8_t *codes, *params;
};
template <class Args>
__device__ inline TokenCodes values_of(const Args& p, uint8_t* chunk) {
  return {p.cache.value_bits,
          p.cache.value_group,
          p.codes.value_code_bytes,
          p.codes.value_param_bytes,
          chunk + p.codes.value_codes,
          chunk + p.codes.value_params};
}
template <class Args>
__device__ inline TokenCodes keys_of(const Args& p, uint8_t* chunk) {
  const int size = p.cache.head_size;
  return {8, size, size, 4, chunk + p.codes.key_rows, chunk + p.codes.key_row_params};
}

constexpr int kSealThreads = 512;  // of a thread block that writes

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

// K of a block, in every copy that the format has, and V. `rows`: of its tokens.
template <class T>
__device__ inline void write_keys(const StoreArgs& p,
                                  int head_size,
                                  const T* const* rows,
                                  uint8_t* chunk) {
  if (p.cache.key_rows) quantise_tokens<T>(head_size, rows, keys_of(p, chunk));
  if (p.cache.key_bits == 8) {
    quantise_keys<T, 8, 1>(p, rows, chunk);
  } else if (p.cache.key_groups == 1) {
    quantise_keys<T, 4, 1>(p, rows, chunk);
  } else {
    quantise_keys<T, 4, 4>(p, rows, chunk);
  }
}
template <class T>
__device__ inline void write_values(const StoreArgs& p,
                                    int head_size,
                                    const T* const* rows,
                                    uint8_t* chunk) {
  quantise_tokens<T>(head_size, rows, values_of(p, chunk));
}

// A sealed token's key in channel d, as attention reads it.
__device__ inline float key_of(
    const KvCache& cache, const Codes& codes, const uint8_t* chunk, int d, int token) {
  if (cache.key_rows) {
    const float2 p = scale_and_minimum(chunk + codes.key_row_params + token * 4);
    const uint32_t code = chunk[codes.key_rows + token * cache.head_size + d];
    return fmaf(static_cast<float>(code), p.x, p.y);
  }
  const int word = d * kLanes + token % kLanes, shift = token / kLanes * 4;
  const int group = token * cache.key_groups / kBlockSize;
  const float2 p = scale_and_minimum(chunk + codes.params + (d * cache.key_groups + group) * 4);
  const uint32_t high = reinterpret_cast<const uint32_t*>(chunk)[word] >> shift & 15;
  float code = static_cast<float>(high);
  if (cache.key_bits == 8) {
    const uint32_t low =
        reinterpret_cast<const uint32_t*>(chunk + codes.low_codes)[word] >> shift & 15;
    code += (static_cast<float>(low) - 7.5f) * 0.0625f;
  }
  return fmaf(code, p.x, p.y);
}

// A sealed token's value in channel d.
__device__ inline float value_of(
    const KvCache& cache, const Codes& codes, const uint8_t* chunk, int d, int token) {
  const uint8_t* row = chunk + codes.value_codes + token * codes.value_code_bytes;
  const uint8_t* params = chunk + codes.value_params + token * codes.value_param_bytes;
  const float2 p = scale_and_minimum(params + d / cache.value_group * 4);
  const uint32_t code =
      cache.value_bits == 8 ? row[d] : row[d / 16 * 8 + d % 8] >> (d / 8 % 2 * 4) & 15;
  return fmaf(static_cast<float>(code), p.x, p.y);
}

constexpr int kReadThreads = 256;       // of a thread block that reads all of a block
constexpr int kReadPitch = kLanes + 1;  // words of a channel in shared memory

// Shared memory for that.
inline size_t read_bytes(const KvCache& cache) {
  return size_t(cache.key_bits / 4) * cache.head_size * kReadPitch * 4;
}

template <class T>
__device__ inline void store_eight(T* to, const float (&x)[8]) {
  alignas(16) T y[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) y[i] = from_float(x[i], T());
#pragma unroll
  for (int i = 0; i < static_cast<int>(8 * sizeof(T) / 16); ++i) {
    reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(y)[i];
  }
}

// Reads K by channels and writes it by tokens: a thread has eight channels of the eight tokens that
// share a word.
template <class T, int kGroups>
__device__ void gather_keys(
    const GatherArgs& p, const uint8_t* chunk, T* out, int64_t stride, const uint32_t* words) {
  const int size = p.cache.head_size, eights = size / 8;
  const bool low = p.cache.key_bits == 8;
  const uint32_t* low_words = words + size * kReadPitch;
  for (int task = threadIdx.x; task < eights * kLanes; task += kReadThreads) {
    const int d = task % eights * 8, i = task / eights;
    uint32_t code[8], low_code[8];
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      code[c] = words[(d + c) * kReadPitch + i];
      low_code[c] = low ? low_words[(d + c) * kReadPitch + i] : 0;
    }
    const __half2* params = reinterpret_cast<const __half2*>(chunk + p.codes.params);
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      float2 range[8];
#pragma unroll
      for (int c = 0; c < 8; ++c) range[c] = __half22float2(params[(d + c) * kGroups + g]);
#pragma unroll
      for (int j = g * 8 / kGroups; j < (g + 1) * 8 / kGroups; ++j) {
        float k[8];
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          k[c] = static_cast<float>(code[c] >> (4 * j) & 15);
          if (low) k[c] += (static_cast<float>(low_code[c] >> (4 * j) & 15) - 7.5f) * 0.0625f;
          k[c] = fmaf(k[c], range[c].x, range[c].y);
        }
        store_eight(out + (i + kLanes * j) * stride + d, k);
      }
    }
  }
}

template <class T>
__device__ void gather_tokens(int head_size, const TokenCodes& from, T* out, int64_t stride) {
  const int eights = head_size / 8;
  for (int task = threadIdx.x; task < eights * kBlockSize; task += kReadThreads) {
    const int d = task % eights * 8, token = task / eights;
    const uint8_t* row = from.codes + token * from.code_bytes;
    const float2 range =
        scale_and_minimum(from.params + token * from.param_bytes + d / from.group * 4);
    const bool nibbles = from.bits == 4;
    const uint2 raw = *reinterpret_cast<const uint2*>(row + (nibbles ? d / 16 * 8 : d));
    float v[8];
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      uint32_t code = (c < 4 ? raw.x : raw.y) >> (c % 4 * 8) & 255;
      if (nibbles) code = code >> (d / 8 % 2 * 4) & 15;
      v[c] = fmaf(static_cast<float>(code), range.x, range.y);
    }
    store_eight(out + token * stride + d, v);
  }
}

// A block's K and V as rows, `stride` elements apart. `words`: read_bytes of shared memory.
template <class T>
__device__ inline void read_block(
    const GatherArgs& p, uint8_t* chunk, T* key, T* value, int64_t stride, uint32_t* words) {
  const int size = p.cache.head_size;
  if (p.cache.key_rows) {
    gather_tokens(size, keys_of(p, chunk), key, stride);
    return gather_tokens(size, values_of(p, chunk), value, stride);
  }
  const int planes = p.cache.key_bits / 4;
  for (int i = threadIdx.x; i < planes * size * kLanes / 4; i += kReadThreads) {
    const uint4 four = reinterpret_cast<const uint4*>(chunk)[i];
    uint32_t* to = words + i / (kLanes / 4) * kReadPitch + i % (kLanes / 4) * 4;
    to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
  }
  gather_tokens(size, values_of(p, chunk), value, stride);
  __syncthreads();
  if (p.cache.key_groups == 1) {
    gather_keys<T, 1>(p, chunk, key, stride, words);
  } else {
    gather_keys<T, 4>(p, chunk, key, stride, words);
  }
}

}  // namespace vllm_sparse::cuda
