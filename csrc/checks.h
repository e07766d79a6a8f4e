// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// Contracts of the ops, checked in one order: dimensions, device, dtype, layout, shape.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "params.h"

namespace vllm_sparse {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#ifdef VLLM_SPARSE_DEVICE_CUDA
inline bool on_device(const Tensor& t) { return t.is_cuda(); }
constexpr const char* kDeviceName = "GPU";
#else
inline bool on_device(const Tensor& t) { return t.is_cpu(); }
constexpr const char* kDeviceName = "CPU";
#endif

inline Dtype model_dtype(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::kFloat;
    case ScalarType::Half: return Dtype::kHalf;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    default: STD_TORCH_CHECK(false, name, " must be float32, float16 or bfloat16");
  }
}

// `dims` dimensions on the library's device, and the last of them contiguous.
inline void check_tensor(const Tensor& t, const char* name, int64_t dims) {
  STD_TORCH_CHECK(t.dim() == dims, name, " must have ", dims, " dimensions, got ", t.dim());
  STD_TORCH_CHECK(on_device(t), name, " must be on the ", kDeviceName);
  STD_TORCH_CHECK(t.size(dims - 1) <= 1 || t.stride(dims - 1) == 1,
                  name,
                  " must be contiguous in its last dimension");
}

inline void check_dtype(const Tensor& t, const char* name, ScalarType dtype, const char* expected) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, " must be ", expected);
}

inline void check_size(
    const Tensor& t, const char* name, int64_t dim, int64_t size, const char* meaning) {
  STD_TORCH_CHECK(t.size(dim) == size,
                  name,
                  " has size ",
                  t.size(dim),
                  " in dimension ",
                  dim,
                  ", expected ",
                  size,
                  " (",
                  meaning,
                  ")");
}

// A contiguous int32 vector of `size` entries (or any number, when negative).
inline const int32_t* int_vector(const Tensor& t,
                                 const char* name,
                                 int64_t size,
                                 const char* meaning) {
  check_tensor(t, name, 1);
  check_dtype(t, name, ScalarType::Int, "int32");
  if (size >= 0) check_size(t, name, 0, size, meaning);
  return static_cast<const int32_t*>(t.data_ptr());
}

// kv_cache: [num_blocks, num_kv_heads, kBlockSize, C] with whole chunks contiguous.
inline KvCache kv_cache_view(const Tensor& t, int64_t head_size) {
  check_tensor(t, "kv_cache", 4);
  KvCache cache;
  cache.dtype = model_dtype(t, "kv_cache");
  cache.element_size = static_cast<int>(t.element_size());
  cache.head_size = static_cast<int>(head_size);
  STD_TORCH_CHECK(head_size >= 16 && head_size <= kMaxHeadSize && head_size % 16 == 0,
                  "head_size must be a multiple of 16 from 16 to ",
                  kMaxHeadSize,
                  ", got ",
                  head_size);
  check_size(t, "kv_cache", 2, kBlockSize, "tokens of a block");
  STD_TORCH_CHECK(t.stride(2) == t.size(3),
                  "kv_cache must hold each (block, head) in one contiguous chunk");
  STD_TORCH_CHECK(t.size(3) * cache.element_size == cache.content_bytes(),
                  "kv_cache has ",
                  t.size(3) * cache.element_size,
                  " bytes per token and head, expected ",
                  cache.content_bytes(),
                  " for head size ",
                  head_size);
  cache.data = static_cast<uint8_t*>(t.data_ptr());
  cache.num_blocks = t.size(0);
  cache.num_kv_heads = static_cast<int>(t.size(1));
  cache.block_stride = t.stride(0) * cache.element_size;
  cache.head_stride = t.stride(1) * cache.element_size;
  return cache;
}

// [n, num_heads, head_size] in the cache's dtype, heads packed; returns bytes between rows.
inline int64_t check_heads(const Tensor& t, const char* name, const KvCache& cache) {
  check_tensor(t, name, 3);
  STD_TORCH_CHECK(model_dtype(t, name) == cache.dtype, name, " must have kv_cache's dtype");
  STD_TORCH_CHECK(t.size(1) <= 1 || t.stride(1) == t.size(2),
                  name,
                  " must be contiguous in its last two dimensions");
  check_size(t, name, 2, cache.head_size, "head_size");
  return t.stride(0) * cache.element_size;
}

inline int query_group(const Tensor& query, const KvCache& cache) {
  STD_TORCH_CHECK(cache.num_kv_heads > 0 && query.size(1) % cache.num_kv_heads == 0,
                  "query has ",
                  query.size(1),
                  " heads, not a multiple of kv_cache's ",
                  cache.num_kv_heads);
  return static_cast<int>(query.size(1) / cache.num_kv_heads);
}

// block_table [num_rows, >= blocks of the longest context] int32.
inline const int32_t* check_block_table(const Tensor& t,
                                        int64_t num_rows,
                                        const int32_t* seq_lens,
                                        const KvCache& cache) {
  check_tensor(t, "block_table", 2);
  check_dtype(t, "block_table", ScalarType::Int, "int32");
  check_size(t, "block_table", 0, num_rows, "rows");
  const int32_t* table = static_cast<const int32_t*>(t.data_ptr());
  for (int64_t row = 0; row < num_rows; ++row) {
    const int64_t blocks = (int64_t{seq_lens[row]} + kBlockSize - 1) / kBlockSize;
    STD_TORCH_CHECK(seq_lens[row] > 0 && blocks <= t.size(1),
                    "seq_lens[",
                    row,
                    "] = ",
                    seq_lens[row],
                    " does not fit a block_table of ",
                    t.size(1),
                    " blocks");
    for (int64_t i = 0; i < blocks; ++i) {
      const int32_t id = table[row * t.stride(0) + i];
      STD_TORCH_CHECK(id >= 0 && id < cache.num_blocks,
                      "block_table[",
                      row,
                      "][",
                      i,
                      "] = ",
                      id,
                      " is not one of the ",
                      cache.num_blocks,
                      " blocks");
    }
  }
  return table;
}

}  // namespace vllm_sparse
