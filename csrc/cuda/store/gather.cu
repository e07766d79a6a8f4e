// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// Copying contexts out of their blocks, as rows.
#include "common/codes.cuh"
#include "common/launch.cuh"
#include "common/token_lists.cuh"

namespace vllm_sparse::cuda {

namespace {

// One thread block per (block of a row, KV head).
__global__ void gather_rows_kernel(GatherArgs p) {
  const int64_t row = blockIdx.z, index = blockIdx.x;
  const int head = blockIdx.y;
  const int64_t first = index * kBlockSize;
  const int64_t length = min(int64_t{p.seq_lens[row]}, p.max_blocks * kBlockSize);
  if (first >= length) return;
  const int64_t count = min(length - first, int64_t{kBlockSize});
  const int words = p.cache.head_size * p.cache.element_size / 16;
  const int64_t block = safe_block(p.cache, p.table(row)[index]);
  const uint4* rows = reinterpret_cast<const uint4*>(chunk_of(p.cache, block, head));
  for (int64_t i = threadIdx.x; i < count * 2 * words; i += blockDim.x) {
    const int64_t token = i / (2 * words), out = p.out_start[row] + first + token;
    const int word = i % (2 * words);
    if (out < 0 || out >= p.num_out_tokens) continue;
    uint4* to = static_cast<uint4*>(word < words ? p.key : p.value);
    to[(out * p.cache.num_kv_heads + head) * words + word % words] = rows[i];
  }
}

constexpr int kThreads = 256;
constexpr int kPitch = kLanes + 1;  // words of a channel in shared memory

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
  const uint32_t* low_words = words + size * kPitch;
  for (int task = threadIdx.x; task < eights * kLanes; task += kThreads) {
    const int d = task % eights * 8, i = task / eights;
    uint32_t code[8], low_code[8];
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      code[c] = words[(d + c) * kPitch + i];
      low_code[c] = low ? low_words[(d + c) * kPitch + i] : 0;
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
  for (int task = threadIdx.x; task < eights * kBlockSize; task += kThreads) {
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

// One thread block per (block of a row, KV head).
template <class T>
__global__ void __launch_bounds__(kThreads) gather_codes_kernel(GatherArgs p) {
  extern __shared__ __align__(16) uint32_t words[];
  const int64_t row = blockIdx.z;
  const int index = blockIdx.x, head = blockIdx.y, size = p.cache.head_size;
  const int64_t length = min(int64_t{p.seq_lens[row]}, (p.max_blocks - p.codes.ahead) * kBlockSize);
  const int64_t first = int64_t{index} * kBlockSize, stride = int64_t{p.cache.num_kv_heads} * size;
  const int64_t start = p.out_start[row] + first;
  if (first >= length || start < 0 || p.out_start[row] + length > p.num_out_tokens) return;
  const int32_t* table = p.table(row);
  T* key = static_cast<T*>(p.key) + start * stride + head * size;
  T* value = static_cast<T*>(p.value) + start * stride + head * size;
  if (length - first < kBlockSize) {
    const int each = size * sizeof(T) / 16, count = static_cast<int>(length - first);
    for (int i = threadIdx.x; i < count * 2 * each; i += kThreads) {
      const int token = i / (2 * each), part = i % (2 * each);
      T* to = (part < each ? key : value) + token * stride;
      reinterpret_cast<uint4*>(to)[part % each] =
          reinterpret_cast<const uint4*>(tail_row(p, table, head, index, token))[part];
    }
    return;
  }
  uint8_t* chunk = chunk_of(p.cache, safe_block(p.cache, table[index]), head);
  if (p.cache.key_rows) {
    gather_tokens(size, keys_of(p, chunk), key, stride);
    return gather_tokens(size, values_of(p, chunk), value, stride);
  }
  const int planes = p.cache.key_bits / 4;
  for (int i = threadIdx.x; i < planes * size * kLanes / 4; i += kThreads) {
    const uint4 four = reinterpret_cast<const uint4*>(chunk)[i];
    uint32_t* to = words + i / (kLanes / 4) * kPitch + i % (kLanes / 4) * 4;
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

}  // namespace

void launch_gather_rows(const Device& device, const GatherArgs& p) {
  if (p.num_rows == 0 || p.max_blocks == 0) return;
  const dim3 grid(p.max_blocks, p.cache.num_kv_heads, p.num_rows);
  launch(device, gather_rows_kernel, 1, grid, 256, 0, p);
}

void launch_gather_codes(const Device& device, const GatherArgs& p) {
  if (p.num_rows == 0 || p.max_blocks <= p.codes.ahead) return;
  const dim3 grid(p.max_blocks - p.codes.ahead, p.cache.num_kv_heads, p.num_rows);
  const size_t bytes = size_t(p.cache.key_bits / 4) * p.cache.head_size * kPitch * 4;
  const auto kernel = p.cache.dtype == Dtype::kHalf ? gather_codes_kernel<__half>
                                                    : gather_codes_kernel<__nv_bfloat16>;
  launch(device, kernel, 1, grid, kThreads, bytes, p);
}

}  // namespace vllm_sparse::cuda
