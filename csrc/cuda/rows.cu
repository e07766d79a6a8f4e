// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// Writing and copying rows of K and V, and sealing full blocks.
#include "kernels.h"
#include "pipeline.cuh"

namespace vllm_sparse::cuda {

namespace {

// One thread block per token. Word is 16 bytes, or less where the inputs are not aligned to that.
template <class Word>
__global__ void store_kernel(StoreArgs p) {
  const int64_t token = blockIdx.x, slot = p.slot_mapping[token];
  if (slot < 0 || slot >= p.cache.num_blocks * kBlockSize) return;
  const int words = p.cache.head_size * p.cache.element_size / static_cast<int>(sizeof(Word));
  const uint8_t* key = static_cast<const uint8_t*>(p.key) + token * p.key_stride;
  const uint8_t* value = static_cast<const uint8_t*>(p.value) + token * p.value_stride;
  for (int i = threadIdx.x; i < p.cache.num_kv_heads * 2 * words; i += blockDim.x) {
    const int head = i / (2 * words), word = i % (2 * words);
    const bool is_key = word < words;
    const uint8_t* from =
        is_key ? key + head * p.key_head_stride : value + head * p.value_head_stride;
    uint8_t* to = chunk_of(p.cache, slot / kBlockSize, head) +
                  slot % kBlockSize * (2ll * p.cache.head_size * p.cache.element_size);
    reinterpret_cast<Word*>(to)[word] =
        reinterpret_cast<const Word*>(from)[is_key ? word : word - words];
  }
}

__device__ __half clamped_half(float x) {
  return __float2half_rn(fminf(fmaxf(x, -65504.0f), 65504.0f));
}

// Codes and parameters of one channel of K, by the thread that has it.
template <class T>
__device__ void quantise_channel(uint8_t* chunk, int head_size, int d) {
  const T* column = reinterpret_cast<const T*>(chunk) + d;
  const int stride = 2 * head_size;
  float low = to_float(column[0]), high = low;
#pragma unroll 16
  for (int t = 1; t < kBlockSize; ++t) {
    const float k = to_float(column[t * stride]);
    low = fminf(low, k);
    high = fmaxf(high, k);
  }
  const __half minimum = clamped_half(low);
  const __half scale = __float2half_rn(fminf(__fdiv_rn(high - low, 15.0f), 65504.0f));
  const float base = __half2float(minimum);
  const float divisor = __half2float(scale) > 0 ? __half2float(scale) : 1.0f;
  uint32_t words[kLanes] = {};
#pragma unroll
  for (int i = 0; i < kLanes; ++i) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float k = to_float(column[(i + kLanes * j) * stride]);
      const float code = rintf(__fdiv_rn(k - base, divisor));
      words[i] |= static_cast<uint32_t>(fminf(fmaxf(code, 0.0f), 15.0f)) << (4 * j);
    }
  }
  uint8_t* sidecar = chunk + int64_t{kBlockSize} * stride * sizeof(T);
  uint4* codes = reinterpret_cast<uint4*>(sidecar + d * kCodeBytes);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    codes[i] = make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
  }
  __half* params = reinterpret_cast<__half*>(sidecar + head_size * kCodeBytes);
  params[2 * d] = scale;
  params[2 * d + 1] = minimum;
}

// Mean of one channel of V over a block.
template <class T>
__device__ float mean_of_channel(const uint8_t* chunk, int head_size, int d) {
  const T* column = reinterpret_cast<const T*>(chunk) + head_size + d;
  float sum = 0;
#pragma unroll 16
  for (int t = 0; t < kBlockSize; ++t) sum += to_float(column[t * 2 * head_size]);
  return sum / kBlockSize;
}

__device__ inline float extend_mean(float before, float mean, int index) {
  return before + (mean - before) / static_cast<float>(index + 1);
}

// One thread block per (job, KV head): the first D threads quantise a channel of K each, the
// others average one of V.
template <class T>
__global__ void __launch_bounds__(2 * kMaxHeadSize) seal_kernel(SealArgs p) {
  const int64_t job = blockIdx.x;
  const int head = blockIdx.y, head_size = p.cache.head_size, d = threadIdx.x % head_size;
  const int32_t id = p.block_ids[job];
  if (id < 0 || id >= p.cache.num_blocks) return;
  uint8_t* chunk = chunk_of(p.cache, id, head);
  if (threadIdx.x < head_size) {
    quantise_channel<T>(chunk, head_size, d);
  } else {
    p.block_mean[(job * p.cache.num_kv_heads + head) * head_size + d] =
        mean_of_channel<T>(chunk, head_size, d);
  }
}

// Seals block `index` of a context: codes by the first D threads, the mean of V by the others. The
// block before it was sealed in an earlier launch, so that its mean can be read at once.
template <class T>
__device__ void seal_in_context(
    const KvCache& cache, const int32_t* table, int index, int head, int64_t mean_offset) {
  const int head_size = cache.head_size, d = threadIdx.x % head_size;
  const int32_t id = table[index], prev = index > 0 ? table[index - 1] : -1;
  // Block 0 is vLLM's null block, which pads tables and is never written.
  if (id <= 0 || id >= cache.num_blocks || prev >= cache.num_blocks) return;
  uint8_t* chunk = chunk_of(cache, id, head);
  if (threadIdx.x < head_size) {
    quantise_channel<T>(chunk, head_size, d);
    return;
  }
  float mean = mean_of_channel<T>(chunk, head_size, d);
  if (prev >= 0) {
    const __half* before =
        reinterpret_cast<const __half*>(chunk_of(cache, prev, head) + mean_offset);
    mean = extend_mean(__half2float(before[d]), mean, index);
  }
  reinterpret_cast<__half*>(chunk + mean_offset)[d] = clamped_half(mean);
}

// One thread block per (row, KV head).
template <class T>
__global__ void __launch_bounds__(2 * kMaxHeadSize) seal_rows_kernel(SealRowsArgs p) {
  wait_for_previous();
  let_next_begin();
  const int64_t row = blockIdx.x;
  const int length = p.seq_lens[row], index = length / kBlockSize - 1;
  const int computed = length - (p.query_start_loc[row + 1] - p.query_start_loc[row]);
  if (index < 0 || index >= p.max_blocks || computed >= (index + 1) * kBlockSize) return;
  const int32_t* table = p.block_table + row * p.block_table_stride;
  seal_in_context<T>(p.cache, table, index, blockIdx.y, p.mean_offset);
}

// One thread block per (row, KV head) stores the row's new token, and seals the block that ends
// with it: all other tokens of that block were stored in earlier launches.
template <class T>
__global__ void __launch_bounds__(2 * kMaxHeadSize) store_rows_kernel(StoreRowsArgs p) {
  wait_for_previous();
  let_next_begin();
  const int64_t row = blockIdx.x, slot = p.slot_mapping[row];
  const int head = blockIdx.y, head_size = p.cache.head_size, d = threadIdx.x % head_size;
  if (slot < 0 || slot >= p.cache.num_blocks * kBlockSize) return;
  const bool is_key = threadIdx.x < head_size;
  const uint8_t* from = static_cast<const uint8_t*>(is_key ? p.key : p.value) +
                        row * (is_key ? p.key_stride : p.value_stride) +
                        head * (is_key ? p.key_head_stride : p.value_head_stride);
  T* to = reinterpret_cast<T*>(chunk_of(p.cache, slot / kBlockSize, head)) +
          slot % kBlockSize * (2 * head_size);
  to[threadIdx.x] = reinterpret_cast<const T*>(from)[d];
  const int length = p.seq_lens[row], index = length / kBlockSize - 1;
  if (length <= 0 || length % kBlockSize != 0 || index >= p.max_blocks) return;
  __syncthreads();  // the new row is read back below
  const int32_t* table = p.block_table + row * p.block_table_stride;
  seal_in_context<T>(p.cache, table, index, head, p.mean_offset);
}

// One thread per (KV head, channel) walks the jobs in order: a block's mean needs that of the
// block before it, which may be sealed in this very call.
__global__ void prefix_mean_kernel(SealArgs p, int64_t offset) {
  const int head = blockIdx.x, d = threadIdx.x, head_size = p.cache.head_size;
  int32_t last_id = -1;
  float last = 0;
  for (int64_t job = 0; job < p.num_jobs; ++job) {
    const int32_t id = p.block_ids[job], prev = p.prev_block_ids[job];
    if (id < 0 || id >= p.cache.num_blocks || prev >= p.cache.num_blocks) continue;
    float mean = p.block_mean[(job * p.cache.num_kv_heads + head) * head_size + d];
    if (prev >= 0) {
      const __half* stored =
          reinterpret_cast<const __half*>(chunk_of(p.cache, prev, head) + offset);
      const float before = prev == last_id ? last : __half2float(stored[d]);
      mean = extend_mean(before, mean, p.block_index[job]);
    }
    const __half rounded = clamped_half(mean);
    reinterpret_cast<__half*>(chunk_of(p.cache, id, head) + offset)[d] = rounded;
    last_id = id;
    last = __half2float(rounded);
  }
}

// One thread block per (block of a row, KV head).
__global__ void gather_kernel(GatherArgs p) {
  const int64_t row = blockIdx.z, index = blockIdx.x;
  const int head = blockIdx.y;
  const int64_t first = index * kBlockSize;
  const int64_t length = min(int64_t{p.seq_lens[row]}, p.max_blocks * kBlockSize);
  if (first >= length) return;
  const int64_t count = min(length - first, int64_t{kBlockSize});
  const int words = p.cache.head_size * p.cache.element_size / 16;
  const int64_t block = safe_block(p.cache, p.block_table[row * p.block_table_stride + index]);
  const uint4* rows = reinterpret_cast<const uint4*>(chunk_of(p.cache, block, head));
  for (int64_t i = threadIdx.x; i < count * 2 * words; i += blockDim.x) {
    const int64_t token = i / (2 * words), out = p.out_start[row] + first + token;
    const int word = i % (2 * words);
    if (out < 0 || out >= p.num_out_tokens) continue;
    uint4* to = static_cast<uint4*>(word < words ? p.key : p.value);
    to[(out * p.cache.num_kv_heads + head) * words + word % words] = rows[i];
  }
}

}  // namespace

void launch_store(const Device& device, const StoreArgs& p) {
  if (p.num_tokens == 0) return;
  const auto bits = reinterpret_cast<uintptr_t>(p.key) | reinterpret_cast<uintptr_t>(p.value) |
                    p.key_stride | p.value_stride | p.key_head_stride | p.value_head_stride;
  const int words = p.cache.num_kv_heads * 2 * p.cache.head_size * p.cache.element_size / 16;
  const dim3 grid(p.num_tokens);
  if (bits % 16 == 0) {
    const int threads = words < 256 ? (words + 31) / 32 * 32 : 256;
    launch(device, store_kernel<uint4>, 1, grid, threads, 0, p);
  } else {
    launch(device, store_kernel<uint16_t>, 1, grid, 256, 0, p);
  }
}

void launch_seal(const Device& device, const SealArgs& p) {
  if (p.num_jobs == 0) return;
  const dim3 grid(p.num_jobs, p.cache.num_kv_heads);
  const int threads = 2 * p.cache.head_size;
  switch (p.cache.dtype) {
    case Dtype::kHalf: launch(device, seal_kernel<__half>, 1, grid, threads, 0, p); break;
    case Dtype::kBFloat16:
      launch(device, seal_kernel<__nv_bfloat16>, 1, grid, threads, 0, p);
      break;
    default: launch(device, seal_kernel<float>, 1, grid, threads, 0, p);
  }
  prefix_mean_kernel<<<p.cache.num_kv_heads, p.cache.head_size, 0, device.stream>>>(
      p, p.cache.prefix_mean_offset());
  check(cudaGetLastError());
}

namespace {

template <class Args>
void launch_rows(const Device& device,
                 void (*half)(Args),
                 void (*bfloat16)(Args),
                 void (*single)(Args),
                 int64_t num_rows,
                 Args p) {
  if (num_rows == 0) return;
  const auto kernel = p.cache.dtype == Dtype::kHalf       ? half
                      : p.cache.dtype == Dtype::kBFloat16 ? bfloat16
                                                          : single;
  p.mean_offset = p.cache.prefix_mean_offset();
  const dim3 grid(num_rows, p.cache.num_kv_heads);
  launch(device, kernel, 1, grid, 2 * p.cache.head_size, 0, p, true);
}

}  // namespace

void launch_seal_rows(const Device& device, const SealRowsArgs& p) {
  launch_rows(device,
              seal_rows_kernel<__half>,
              seal_rows_kernel<__nv_bfloat16>,
              seal_rows_kernel<float>,
              p.num_rows,
              p);
}

void launch_store_rows(const Device& device, const StoreRowsArgs& p) {
  launch_rows(device,
              store_rows_kernel<__half>,
              store_rows_kernel<__nv_bfloat16>,
              store_rows_kernel<float>,
              p.num_tokens,
              p);
}

void launch_gather(const Device& device, const GatherArgs& p) {
  if (p.num_rows == 0 || p.max_blocks == 0) return;
  const dim3 grid(p.max_blocks, p.cache.num_kv_heads, p.num_rows);
  launch(device, gather_kernel, 1, grid, 256, 0, p);
}

}  // namespace vllm_sparse::cuda
