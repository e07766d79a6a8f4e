// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// Contracts of the ops, checked in one order: dimensions, device, dtype, layout, shape.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <utility>

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
// `format`: KvFormat.code of vllm_sparse/cache/formats.py.
inline KvCache kv_cache_view(const Tensor& t, int64_t head_size, int64_t format = 0) {
  check_tensor(t, "kv_cache", 4);
  KvCache cache;
  cache.key_bits = static_cast<int>(format & 0xff);
  cache.value_bits = static_cast<int>(format >> 8 & 0xff);
  cache.value_group = static_cast<int>(format >> 16 & 0xffff);
  const int key_group = static_cast<int>(format >> 32 & 0xffff);
  cache.key_groups = format == 0 ? 1 : kBlockSize / (key_group > 0 ? key_group : kBlockSize);
  cache.has_mean = format == 0 || (format >> 48 & 1) != 0;
  cache.key_rows = (format >> 49 & 1) != 0;
  if (format != 0) {
    // 8-bit K has one scale for the block: halves of a code share it.
    const bool key = (cache.key_bits == 4 && (key_group == 32 || key_group == kBlockSize)) ||
                     (cache.key_bits == 8 && key_group == kBlockSize && !cache.key_rows);
    const bool value = (cache.value_bits == 4 || cache.value_bits == 8) && cache.value_group > 0 &&
                       cache.value_group % 16 == 0 && head_size % cache.value_group == 0;
    STD_TORCH_CHECK(
        key && value, "kv_format ", format, " is not a format for head size ", head_size);
  }
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
                  head_size,
                  cache.quantised() ? " and its format" : "");
  cache.data = static_cast<uint8_t*>(t.data_ptr());
  cache.num_blocks = t.size(0);
  cache.num_kv_heads = static_cast<int>(t.size(1));
  cache.block_stride = t.stride(0) * cache.element_size;
  cache.head_stride = t.stride(1) * cache.element_size;
  return cache;
}

// The block table and context lengths of `num_rows` requests.
template <class Params>
inline void set_contexts(const Tensor& block_table,
                         const Tensor& seq_lens,
                         int64_t num_rows,
                         Params& p) {
  p.seq_lens = int_vector(seq_lens, "seq_lens", num_rows, "rows");
  check_tensor(block_table, "block_table", 2);
  check_dtype(block_table, "block_table", ScalarType::Int, "int32");
  check_size(block_table, "block_table", 0, seq_lens.size(0), "rows");
  p.block_table = static_cast<const int32_t*>(block_table.data_ptr());
  p.block_table_stride = block_table.stride(0);
  p.max_blocks = block_table.size(1);
}

inline SealRowsParams seal_rows_params(const KvCache& cache,
                                       const Tensor& block_table,
                                       const Tensor& seq_lens,
                                       const Tensor& query_start_loc) {
  SealRowsParams p;
  p.cache = cache;
  set_contexts(block_table, seq_lens, -1, p);
  p.num_rows = seq_lens.size(0);
  p.query_start_loc = int_vector(query_start_loc, "query_start_loc", p.num_rows + 1, "rows + 1");
  return p;
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

// Token lists (3 dimensions) or their counts (2): [num_rows, num_kv_heads, ...] int32.
inline int32_t* check_lists(
    const Tensor& t, const char* name, int64_t dims, int64_t num_rows, const KvCache& cache) {
  check_tensor(t, name, dims);
  check_dtype(t, name, ScalarType::Int, "int32");
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
  check_size(t, name, 0, num_rows, "rows");
  check_size(t, name, 1, cache.num_kv_heads, "num_kv_heads");
  return static_cast<int32_t*>(t.data_ptr());
}

// kept_mass: [num_rows, num_heads] float32, or nothing.
inline float* check_mass(const std::optional<Tensor>& t, const Tensor& query) {
  if (!t) return nullptr;
  check_tensor(*t, "kept_mass", 2);
  check_dtype(*t, "kept_mass", ScalarType::Float, "float32");
  STD_TORCH_CHECK(t->is_contiguous(), "kept_mass must be contiguous");
  check_size(*t, "kept_mass", 0, query.size(0), "rows");
  check_size(*t, "kept_mass", 1, query.size(1), "num_heads");
  return static_cast<float*>(t->data_ptr());
}

// kept_histogram: [num_kv_heads, kKeptBins] int64, or nothing.
inline int64_t* check_histogram(const std::optional<Tensor>& t, const KvCache& cache) {
  if (!t) return nullptr;
  check_tensor(*t, "kept_histogram", 2);
  check_dtype(*t, "kept_histogram", ScalarType::Long, "int64");
  STD_TORCH_CHECK(t->is_contiguous(), "kept_histogram must be contiguous");
  check_size(*t, "kept_histogram", 0, cache.num_kv_heads, "num_kv_heads");
  check_size(*t, "kept_histogram", 1, kKeptBins, "bins");
  return static_cast<int64_t*>(t->data_ptr());
}

// The query's part of SelectParams and AttendParams; the cache is known.
template <class Params>
inline void set_query(const Tensor& query, double scale, double soft_cap, Params& p) {
  p.query_stride = check_heads(query, "query", p.cache);
  p.group = query_group(query, p.cache);
  p.query = query.data_ptr();
  p.num_rows = query.size(0);
  p.scale = static_cast<float>(scale);
  p.soft_cap = static_cast<float>(soft_cap);
}

inline void set_sparq_options(int64_t rank,
                              int64_t local_window,
                              int64_t sink_tokens,
                              double top_p,
                              int64_t min_tokens,
                              SelectParams& p) {
  STD_TORCH_CHECK(rank >= 1 && rank <= p.cache.head_size,
                  "rank must lie between 1 and head_size = ",
                  p.cache.head_size,
                  ", got ",
                  rank);
  STD_TORCH_CHECK(local_window >= 1, "local_window must be at least 1, got ", local_window);
  STD_TORCH_CHECK(sink_tokens >= 0, "sink_tokens must not be negative, got ", sink_tokens);
  STD_TORCH_CHECK(top_p > 0 && top_p <= 1, "top_p must lie in (0, 1], got ", top_p);
  STD_TORCH_CHECK(min_tokens >= 0, "min_tokens must not be negative, got ", min_tokens);
  p.top_p = static_cast<float>(top_p);
  p.min_tokens = static_cast<int>(min_tokens);
  p.rank = static_cast<int>(rank);
  p.local_window = static_cast<int>(local_window);
  p.sink_tokens = static_cast<int>(sink_tokens);
}

inline int64_t* set_outputs(const Tensor& query,
                            const Tensor& out,
                            const std::optional<Tensor>& tokens_read,
                            AttendParams& p) {
  p.out_stride = check_heads(out, "out", p.cache);
  check_size(out, "out", 0, p.num_rows, "rows");
  check_size(out, "out", 1, query.size(1), "num_heads");
  p.out = out.data_ptr();
  if (!tokens_read) return nullptr;
  check_tensor(*tokens_read, "tokens_read", 1);
  check_dtype(*tokens_read, "tokens_read", ScalarType::Long, "int64");
#ifdef VLLM_SPARSE_DEVICE_CUDA
  check_size(*tokens_read, "tokens_read", 0, 1, "one counter");
#else
  STD_TORCH_CHECK(tokens_read->size(0) == 1 || tokens_read->size(0) == 3,
                  "tokens_read has size ",
                  tokens_read->size(0),
                  " in dimension 0, expected 1 or 3 (counters)");
#endif
  return static_cast<int64_t*>(tokens_read->data_ptr());
}

// New tokens to store; they may be padded beyond `num_tokens`.
template <class Params>
inline void set_new_tokens(const Tensor& key, const Tensor& value, int64_t num_tokens, Params& p) {
  for (const auto& [tensor, name] : {std::pair{&key, "key"}, std::pair{&value, "value"}}) {
    check_tensor(*tensor, name, 3);
    STD_TORCH_CHECK(
        model_dtype(*tensor, name) == p.cache.dtype, name, " must have kv_cache's dtype");
    check_size(*tensor, name, 1, p.cache.num_kv_heads, "num_kv_heads");
    check_size(*tensor, name, 2, p.cache.head_size, "head_size");
    STD_TORCH_CHECK(
        tensor->size(0) >= num_tokens, "key and value must hold at least ", num_tokens, " tokens");
  }
  p.key = key.data_ptr();
  p.value = value.data_ptr();
  p.key_stride = key.stride(0) * p.cache.element_size;
  p.value_stride = value.stride(0) * p.cache.element_size;
  p.key_head_stride = key.stride(1) * p.cache.element_size;
  p.value_head_stride = value.stride(1) * p.cache.element_size;
}

// The part of store_kv's contract that no value decides.
inline void set_store(const Tensor& key,
                      const Tensor& value,
                      const Tensor& slot_mapping,
                      StoreParams& p) {
  check_tensor(slot_mapping, "slot_mapping", 1);
  check_dtype(slot_mapping, "slot_mapping", ScalarType::Long, "int64");
  p.num_tokens = slot_mapping.size(0);
  set_new_tokens(key, value, p.num_tokens, p);
  p.slot_mapping = static_cast<const int64_t*>(slot_mapping.data_ptr());
}

// block_table [num_rows, >= blocks of the longest context] int32.
inline const int32_t* check_block_table(const Tensor& t,
                                        int64_t num_rows,
                                        const int32_t* seq_lens,
                                        const KvCache& cache,
                                        bool allow_empty = false) {
  check_tensor(t, "block_table", 2);
  check_dtype(t, "block_table", ScalarType::Int, "int32");
  check_size(t, "block_table", 0, num_rows, "rows");
  const int32_t* table = static_cast<const int32_t*>(t.data_ptr());
  for (int64_t row = 0; row < num_rows; ++row) {
    const int64_t filled = (int64_t{seq_lens[row]} + kBlockSize - 1) / kBlockSize;
    const int64_t blocks = filled + cache.lookahead_blocks();
    STD_TORCH_CHECK(seq_lens[row] >= (allow_empty ? 0 : 1) && blocks <= t.size(1),
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
