// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// Copying contexts out of their blocks, as rows.
#include "common/codes.cuh"
#include "common/launch.cuh"
#include "common/tails.cuh"

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

// One thread block per (block of a row, KV head).
template <class T>
__global__ void __launch_bounds__(kReadThreads) gather_codes_kernel(GatherArgs p) {
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
    for (int i = threadIdx.x; i < count * 2 * each; i += kReadThreads) {
      const int token = i / (2 * each), part = i % (2 * each);
      T* to = (part < each ? key : value) + token * stride;
      reinterpret_cast<uint4*>(to)[part % each] =
          reinterpret_cast<const uint4*>(tail_row(p, table, head, index, token))[part];
    }
    return;
  }
  uint8_t* chunk = chunk_of(p.cache, safe_block(p.cache, table[index]), head);
  read_block(p, chunk, key, value, stride, words);
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
  const size_t bytes = read_bytes(p.cache);
  const auto kernel = p.cache.dtype == Dtype::kHalf ? gather_codes_kernel<__half>
                                                    : gather_codes_kernel<__nv_bfloat16>;
  launch(device, kernel, 1, grid, kReadThreads, bytes, p);
}

}  // namespace vllm_sparse::cuda
