// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// The ops: their contracts, from tensors to parameters, and their schemas. Both libraries have
// them, each with a way of its own to run what is asked for. What values decide is left to that.
#pragma once

#include <torch/csrc/stable/library.h>

#include <string>
#include <vector>

#include "checks.h"

namespace vllm_sparse {

// Defined by each library.
void run_store(StoreParams& p, const Tensor& kv_cache);
void run_gather(const GatherParams& p);
// `attend`: null to choose alone.
void run_sparq(const SelectParams& select,
               const AttendParams* attend,
               const std::optional<Tensor>& workspace,
               const Tensor& kv_cache);
void run_attend(const AttendParams& p,
                const std::optional<Tensor>& workspace,
                const Tensor& kv_cache);

// `num_rows`: negative where seq_lens decides.
inline void set_contexts(const Tensor& block_table,
                         const Tensor& seq_lens,
                         int64_t num_rows,
                         Contexts& p) {
  p.seq_lens = packed<int32_t>(seq_lens, "seq_lens", p.cache, {{num_rows, "rows"}});
  p.num_rows = seq_lens.size(0);
  check_tensor(block_table, "block_table", 2, p.cache);
  check_dtype<int32_t>(block_table, "block_table");
  check_size(block_table, "block_table", 0, p.num_rows, "rows");
  p.block_table = static_cast<const int32_t*>(block_table.data_ptr());
  p.block_table_stride = block_table.stride(0);
  p.max_blocks = block_table.size(1);
}

inline void set_query(const Tensor& query,
                      const Tensor& kv_cache,
                      const Tensor& block_table,
                      const Tensor& seq_lens,
                      int64_t kv_format,
                      QueryParams& p) {
  check_tensor(query, "query", 3);
  p.cache = kv_cache_view(kv_cache, query.size(2), kv_format);
  p.query_stride = check_packed_heads(query, "query", p.cache, query.size(1), "num_heads");
  STD_TORCH_CHECK(p.cache.num_kv_heads > 0 && query.size(1) % p.cache.num_kv_heads == 0,
                  "query has ",
                  query.size(1),
                  " heads, not a multiple of kv_cache's ",
                  p.cache.num_kv_heads);
  p.group = static_cast<int>(query.size(1) / p.cache.num_kv_heads);
  p.query = query.data_ptr();
  set_contexts(block_table, seq_lens, query.size(0), p);
}

inline void set_sinks(const std::optional<Tensor>& sinks, const float* kept_mass, QueryParams& p) {
  const int64_t num_heads = int64_t{p.cache.num_kv_heads} * p.group;
  p.sinks = packed<float>(sinks, "sinks", p.cache, {{num_heads, "num_heads"}});
  STD_TORCH_CHECK(p.sinks == nullptr || kept_mass == nullptr,
                  "sinks cannot be had with kept_mass: the mean of V leaves them out");
}

// Lists of tokens, and what of the attention mass they keep.
template <class Params>
inline void set_lists(const std::optional<Tensor>& indices,
                      const std::optional<Tensor>& counts,
                      const std::optional<Tensor>& kept_mass,
                      Params& p) {
  const Size rows = {p.num_rows, "rows"}, heads = {p.cache.num_kv_heads, "num_kv_heads"};
  p.indices = packed<int32_t>(indices, "indices", p.cache, {rows, heads, {-1}});
  p.max_kept = indices ? indices->size(2) : 0;
  p.counts = packed<int32_t>(counts, "counts", p.cache, {rows, heads});
  p.kept_mass =
      packed<float>(kept_mass, "kept_mass", p.cache, {rows, {heads.size * p.group, "num_heads"}});
  STD_TORCH_CHECK(p.kept_mass == nullptr || p.cache.has_mean,
                  "kept_mass needs a format whose blocks hold the mean of V");
}

// `sizes`: rank, local_window, sink_tokens, min_tokens. `numbers`: scale, soft_cap, top_p.
inline void set_sparq_options(const std::vector<int64_t>& sizes,
                              const std::vector<double>& numbers,
                              int head_size,
                              SparqOptions& p) {
  STD_TORCH_CHECK(sizes.size() == 4, "sizes must be rank, local_window, sink_tokens, min_tokens");
  STD_TORCH_CHECK(numbers.size() == 3, "numbers must be scale, soft_cap, top_p");
  const double top_p = numbers[2];
  STD_TORCH_CHECK(sizes[0] >= 1 && sizes[0] <= head_size,
                  "rank must lie between 1 and head_size = ",
                  head_size,
                  ", got ",
                  sizes[0]);
  STD_TORCH_CHECK(sizes[1] >= 1, "local_window must be at least 1, got ", sizes[1]);
  STD_TORCH_CHECK(sizes[2] >= 0, "sink_tokens must not be negative, got ", sizes[2]);
  STD_TORCH_CHECK(top_p > 0 && top_p <= 1, "top_p must lie in (0, 1], got ", top_p);
  STD_TORCH_CHECK(sizes[3] >= 0, "min_tokens must not be negative, got ", sizes[3]);
  p.rank = static_cast<int>(sizes[0]);
  p.local_window = static_cast<int>(sizes[1]);
  p.sink_tokens = static_cast<int>(sizes[2]);
  p.min_tokens = static_cast<int>(sizes[3]);
  p.scale = static_cast<float>(numbers[0]);
  p.soft_cap = static_cast<float>(numbers[1]);
  p.top_p = static_cast<float>(top_p);
}

inline void set_out(const Tensor& out, AttendParams& p) {
  const int64_t num_heads = int64_t{p.cache.num_kv_heads} * p.group;
  p.out_stride = check_packed_heads(out, "out", p.cache, num_heads, "num_heads");
  check_size(out, "out", 0, p.num_rows, "rows");
  p.out = out.data_ptr();
}

inline void store(const Tensor& key,
                  const Tensor& value,
                  Tensor& kv_cache,
                  const Tensor& slot_mapping,
                  const Tensor& block_table,
                  const Tensor& seq_lens,
                  const Tensor& query_start_loc,
                  int64_t kv_format) {
  StoreParams p = {};
  check_tensor(key, "key", 3);
  p.cache = kv_cache_view(kv_cache, key.size(2), kv_format);
  p.slot_mapping = packed<int64_t>(slot_mapping, "slot_mapping", p.cache, {{-1}});
  p.num_tokens = slot_mapping.size(0);
  set_contexts(block_table, seq_lens, -1, p);
  p.query_start_loc =
      packed<int32_t>(query_start_loc, "query_start_loc", p.cache, {{p.num_rows + 1, "rows + 1"}});
  p.key_stride = check_heads(key, "key", p.cache, p.cache.num_kv_heads, "num_kv_heads");
  p.value_stride = check_heads(value, "value", p.cache, p.cache.num_kv_heads, "num_kv_heads");
  STD_TORCH_CHECK(key.size(0) >= p.num_tokens && value.size(0) >= p.num_tokens,
                  "key and value must hold at least ",
                  p.num_tokens,
                  " tokens");
  p.key = key.data_ptr();
  p.value = value.data_ptr();
  p.key_head_stride = key.stride(1) * p.cache.element_size;
  p.value_head_stride = value.stride(1) * p.cache.element_size;
  run_store(p, kv_cache);
}

inline void gather_kv(const Tensor& kv_cache,
                      const Tensor& block_table,
                      const Tensor& seq_lens,
                      const Tensor& out_start,
                      Tensor& key,
                      Tensor& value,
                      int64_t kv_format) {
  GatherParams p;
  check_tensor(key, "key", 3);
  p.cache = kv_cache_view(kv_cache, key.size(2), kv_format);
  set_contexts(block_table, seq_lens, -1, p);
  p.out_start = packed<int64_t>(out_start, "out_start", p.cache, {{p.num_rows, "rows"}});
  check_heads(key, "key", p.cache, p.cache.num_kv_heads, "num_kv_heads");
  check_heads(value, "value", p.cache, p.cache.num_kv_heads, "num_kv_heads");
  STD_TORCH_CHECK(key.is_contiguous() && value.is_contiguous(), "key and value must be contiguous");
  check_size(value, "value", 0, key.size(0), "key's tokens");
  p.num_out_tokens = key.size(0);
  p.key = key.data_ptr();
  p.value = value.data_ptr();
  run_gather(p);
}

inline void sparq_attend(const Tensor& query,
                         const Tensor& kv_cache,
                         const Tensor& block_table,
                         const Tensor& seq_lens,
                         const Tensor& budgets,
                         std::vector<int64_t> sizes,
                         std::vector<double> numbers,
                         Tensor& indices,
                         Tensor& counts,
                         std::optional<Tensor> kept_mass,
                         std::optional<Tensor> out,
                         std::optional<Tensor> kept_histogram,
                         std::optional<Tensor> workspace,
                         int64_t kv_format,
                         std::optional<Tensor> sinks) {
  SelectParams p;
  set_query(query, kv_cache, block_table, seq_lens, kv_format, p);
  p.budgets = packed<int32_t>(budgets, "budgets", p.cache, {{p.num_rows, "rows"}});
  STD_TORCH_CHECK(!p.cache.bare, "blocks without codes have nothing to choose tokens by");
  set_sparq_options(sizes, numbers, p.cache.head_size, p);
  set_lists(indices, counts, kept_mass, p);
  set_sinks(sinks, p.kept_mass, p);
  p.kept_histogram = packed<int64_t>(kept_histogram,
                                     "kept_histogram",
                                     p.cache,
                                     {{p.cache.num_kv_heads, "num_kv_heads"}, {kKeptBins, "bins"}});
  AttendParams after;
  attend_after(p, after);
  if (out) set_out(*out, after);
  if (p.num_rows > 0) run_sparq(p, out ? &after : nullptr, workspace, kv_cache);
}

inline void attend(const Tensor& query,
                   const Tensor& kv_cache,
                   const Tensor& block_table,
                   const Tensor& seq_lens,
                   std::optional<Tensor> indices,
                   std::optional<Tensor> counts,
                   std::optional<Tensor> kept_mass,
                   double scale,
                   double soft_cap,
                   Tensor& out,
                   std::optional<Tensor> workspace,
                   int64_t kv_format,
                   std::optional<Tensor> sinks,
                   std::optional<Tensor> lse) {
  AttendParams p;
  set_query(query, kv_cache, block_table, seq_lens, kv_format, p);
  p.scale = static_cast<float>(scale);
  p.soft_cap = static_cast<float>(soft_cap);
  STD_TORCH_CHECK(indices.has_value() == counts.has_value(),
                  "indices and counts must be given together");
  set_lists(indices, counts, kept_mass, p);
  set_sinks(sinks, p.kept_mass, p);
  set_out(out, p);
  const int64_t num_heads = int64_t{p.cache.num_kv_heads} * p.group;
  p.lse = packed<float>(lse, "lse", p.cache, {{p.num_rows, "rows"}, {num_heads, "num_heads"}});
#ifdef VLLM_SPARSE_DEVICE_CUDA
  STD_TORCH_CHECK(p.lse == nullptr || !p.cache.quantised(),
                  "lse is written for rows only, not for quantised blocks");
#endif
  if (p.num_rows > 0) run_attend(p, workspace, kv_cache);
}

// The ops as torch has them; vllm_sparse/ops/__init__.py documents them.
struct Op {
  const char* schema;
  void (*boxed)(StableIValue*, uint64_t, uint64_t);  // null: only one library has it
};
inline constexpr Op kOps[] = {
    {"store(Tensor key, Tensor value, Tensor(a!) kv_cache, Tensor slot_mapping, "
     "Tensor block_table, Tensor seq_lens, Tensor query_start_loc, int kv_format=0) -> ()",
     TORCH_BOX(&store)},
    {"gather_kv(Tensor kv_cache, Tensor block_table, Tensor seq_lens, Tensor out_start, "
     "Tensor(a!) key, Tensor(b!) value, int kv_format=0) -> ()",
     TORCH_BOX(&gather_kv)},
    {"sparq_attend(Tensor query, Tensor kv_cache, Tensor block_table, Tensor seq_lens, "
     "Tensor budgets, int[] sizes, float[] numbers, Tensor(a!) indices, Tensor(b!) counts, "
     "Tensor(c!)? kept_mass, Tensor(d!)? out, Tensor(e!)? kept_histogram=None, "
     "Tensor(f!)? workspace=None, int kv_format=0, Tensor? sinks=None) -> ()",
     TORCH_BOX(&sparq_attend)},
    {"attend(Tensor query, Tensor kv_cache, Tensor block_table, Tensor seq_lens, "
     "Tensor? indices, Tensor? counts, Tensor? kept_mass, float scale, float soft_cap, "
     "Tensor(a!) out, Tensor(b!)? workspace=None, int kv_format=0, Tensor? sinks=None, "
     "Tensor(c!)? lse=None) -> ()",
     TORCH_BOX(&attend)},
    {"workspace_bytes(int num_rows, int num_kv_heads, int group, int max_blocks, "
     "int head_size, bool adapts, int device_index) -> int",
     nullptr},
    {"cpu_isa() -> str", nullptr},
};

// `library`: what STABLE_TORCH_LIBRARY_IMPL names.
template <class Library>
void implement_ops(Library& library) {
  for (const Op& op : kOps) {
    const std::string schema = op.schema;
    if (op.boxed) library.impl(schema.substr(0, schema.find('(')).c_str(), op.boxed);
  }
}

}  // namespace vllm_sparse
