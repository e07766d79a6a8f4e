// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// Checked entry points: tensors in, pointers and shapes out.
#include "ops.h"

#include "../checks.h"
#include "runtime.h"

namespace vllm_sparse::cpu {

void store_kv(const Tensor& key,
              const Tensor& value,
              Tensor& kv_cache,
              const Tensor& slot_mapping) {
  check_tensor(key, "key", 3);
  StoreParams p;
  p.cache = kv_cache_view(kv_cache, key.size(2));
  for (const auto& [tensor, name] : {std::pair{&key, "key"}, std::pair{&value, "value"}}) {
    check_tensor(*tensor, name, 3);
    STD_TORCH_CHECK(
        model_dtype(*tensor, name) == p.cache.dtype, name, " must have kv_cache's dtype");
    check_size(*tensor, name, 1, p.cache.num_kv_heads, "num_kv_heads");
    check_size(*tensor, name, 2, p.cache.head_size, "head_size");
  }
  check_tensor(slot_mapping, "slot_mapping", 1);
  check_dtype(slot_mapping, "slot_mapping", ScalarType::Long, "int64");
  p.num_tokens = slot_mapping.size(0);  // key and value may be padded beyond it
  STD_TORCH_CHECK(key.size(0) >= p.num_tokens && value.size(0) >= p.num_tokens,
                  "key and value must hold at least slot_mapping's ",
                  p.num_tokens,
                  " tokens");
  p.key = key.data_ptr();
  p.value = value.data_ptr();
  p.key_stride = key.stride(0) * p.cache.element_size;
  p.value_stride = value.stride(0) * p.cache.element_size;
  p.key_head_stride = key.stride(1) * p.cache.element_size;
  p.value_head_stride = value.stride(1) * p.cache.element_size;
  p.slot_mapping = static_cast<const int64_t*>(slot_mapping.data_ptr());
  for (int64_t t = 0; t < p.num_tokens; ++t) {
    STD_TORCH_CHECK(p.slot_mapping[t] < p.cache.num_blocks * kBlockSize,
                    "slot_mapping[",
                    t,
                    "] = ",
                    p.slot_mapping[t],
                    " is beyond the cache's ",
                    p.cache.num_blocks,
                    " blocks");
  }
  kernels().store(p);
}

void seal_blocks(Tensor& kv_cache,
                 const Tensor& block_ids,
                 const Tensor& prev_block_ids,
                 const Tensor& block_index,
                 int64_t head_size) {
  SealParams p;
  p.cache = kv_cache_view(kv_cache, head_size);
  p.block_ids = int_vector(block_ids, "block_ids", -1, "");
  p.num_jobs = block_ids.size(0);
  p.prev_block_ids = int_vector(prev_block_ids, "prev_block_ids", p.num_jobs, "blocks to seal");
  p.block_index = int_vector(block_index, "block_index", p.num_jobs, "blocks to seal");
  for (int64_t i = 0; i < p.num_jobs; ++i) {
    STD_TORCH_CHECK(p.block_ids[i] >= 0 && p.block_ids[i] < p.cache.num_blocks,
                    "block_ids[",
                    i,
                    "] = ",
                    p.block_ids[i],
                    " is not a block");
    STD_TORCH_CHECK(p.prev_block_ids[i] < p.cache.num_blocks,
                    "prev_block_ids[",
                    i,
                    "] = ",
                    p.prev_block_ids[i],
                    " is not a block");
    STD_TORCH_CHECK(i == 0 || p.block_index[i - 1] <= p.block_index[i],
                    "block_index must be sorted");
  }
  if (p.num_jobs > 0) kernels().seal(p);
}

void gather_kv(const Tensor& kv_cache,
               const Tensor& block_table,
               const Tensor& seq_lens,
               const Tensor& out_start,
               Tensor& key,
               Tensor& value) {
  check_tensor(key, "key", 3);
  GatherParams p;
  p.cache = kv_cache_view(kv_cache, key.size(2));
  p.seq_lens = int_vector(seq_lens, "seq_lens", -1, "");
  p.num_rows = seq_lens.size(0);
  p.block_table = check_block_table(block_table, p.num_rows, p.seq_lens, p.cache);
  p.block_table_stride = block_table.stride(0);
  check_tensor(out_start, "out_start", 1);
  check_dtype(out_start, "out_start", ScalarType::Long, "int64");
  check_size(out_start, "out_start", 0, p.num_rows, "rows");
  p.out_start = static_cast<const int64_t*>(out_start.data_ptr());
  check_heads(key, "key", p.cache);
  check_heads(value, "value", p.cache);
  STD_TORCH_CHECK(key.is_contiguous() && value.is_contiguous(), "key and value must be contiguous");
  check_size(key, "key", 1, p.cache.num_kv_heads, "num_kv_heads");
  check_size(value, "value", 1, p.cache.num_kv_heads, "num_kv_heads");
  for (int64_t row = 0; row < p.num_rows; ++row) {
    const int64_t end = p.out_start[row] + p.seq_lens[row];
    STD_TORCH_CHECK(p.out_start[row] >= 0 && end <= key.size(0) && end <= value.size(0),
                    "row ",
                    row,
                    " ends at token ",
                    end,
                    ", beyond key or value");
  }
  p.key = key.data_ptr();
  p.value = value.data_ptr();
  kernels().gather(p);
}

namespace {

SelectParams select_params(const Tensor& query,
                           const Tensor& kv_cache,
                           const Tensor& block_table,
                           const Tensor& seq_lens,
                           const Tensor& budgets,
                           int64_t rank,
                           int64_t local_window,
                           int64_t sink_tokens,
                           double scale,
                           double soft_cap,
                           Tensor& indices,
                           Tensor& counts,
                           std::optional<Tensor>& kept_mass) {
  check_tensor(query, "query", 3);
  SelectParams p;
  p.cache = kv_cache_view(kv_cache, query.size(2));
  p.query_stride = check_heads(query, "query", p.cache);
  p.group = query_group(query, p.cache);
  p.query = query.data_ptr();
  p.num_rows = query.size(0);
  p.seq_lens = int_vector(seq_lens, "seq_lens", p.num_rows, "rows");
  p.budgets = int_vector(budgets, "budgets", p.num_rows, "rows");
  p.block_table = check_block_table(block_table, p.num_rows, p.seq_lens, p.cache);
  p.block_table_stride = block_table.stride(0);
  STD_TORCH_CHECK(rank >= 1 && rank <= p.cache.head_size,
                  "rank must lie between 1 and head_size = ",
                  p.cache.head_size,
                  ", got ",
                  rank);
  STD_TORCH_CHECK(local_window >= 1, "local_window must be at least 1, got ", local_window);
  STD_TORCH_CHECK(sink_tokens >= 0, "sink_tokens must not be negative, got ", sink_tokens);
  p.rank = static_cast<int>(rank);
  p.local_window = static_cast<int>(local_window);
  p.sink_tokens = static_cast<int>(sink_tokens);
  p.scale = static_cast<float>(scale);
  p.soft_cap = static_cast<float>(soft_cap);
  check_tensor(indices, "indices", 3);
  check_dtype(indices, "indices", ScalarType::Int, "int32");
  STD_TORCH_CHECK(indices.is_contiguous(), "indices must be contiguous");
  check_size(indices, "indices", 0, p.num_rows, "rows");
  check_size(indices, "indices", 1, p.cache.num_kv_heads, "num_kv_heads");
  p.max_kept = indices.size(2);
  for (int64_t row = 0; row < p.num_rows; ++row) {
    const int64_t tail = p.seq_lens[row] % kBlockSize;
    const int64_t forced = sink_tokens + (tail > local_window ? tail : local_window);
    const int64_t kept = p.budgets[row] > forced ? p.budgets[row] : forced;
    STD_TORCH_CHECK(p.budgets[row] < 0 || p.budgets[row] >= p.seq_lens[row] || kept <= p.max_kept ||
                        p.seq_lens[row] <= p.max_kept,
                    "indices holds ",
                    p.max_kept,
                    " tokens, row ",
                    row,
                    " keeps ",
                    kept);
  }
  p.indices = static_cast<int32_t*>(indices.data_ptr());
  check_tensor(counts, "counts", 2);
  check_dtype(counts, "counts", ScalarType::Int, "int32");
  STD_TORCH_CHECK(counts.is_contiguous(), "counts must be contiguous");
  check_size(counts, "counts", 0, p.num_rows, "rows");
  check_size(counts, "counts", 1, p.cache.num_kv_heads, "num_kv_heads");
  p.counts = static_cast<int32_t*>(counts.data_ptr());
  p.kept_mass = nullptr;
  if (kept_mass) {
    check_tensor(*kept_mass, "kept_mass", 2);
    check_dtype(*kept_mass, "kept_mass", ScalarType::Float, "float32");
    STD_TORCH_CHECK(kept_mass->is_contiguous(), "kept_mass must be contiguous");
    check_size(*kept_mass, "kept_mass", 0, p.num_rows, "rows");
    check_size(*kept_mass, "kept_mass", 1, query.size(1), "num_heads");
    p.kept_mass = static_cast<float*>(kept_mass->data_ptr());
  }
  return p;
}

// Adds what the rows attend to, tokens per KV head, to a counter.
void count_tokens(const AttendParams& p, std::optional<Tensor>& tokens_read) {
  if (!tokens_read) return;
  int64_t& total = *static_cast<int64_t*>(tokens_read->data_ptr());
  for (int64_t i = 0; i < p.num_rows * p.cache.num_kv_heads; ++i) {
    const bool listed = p.counts != nullptr && p.counts[i] >= 0;
    total += listed ? p.counts[i] : p.seq_lens[i / p.cache.num_kv_heads];
  }
}

void check_outputs(const Tensor& query,
                   Tensor& out,
                   const std::optional<Tensor>& tokens_read,
                   AttendParams& p) {
  p.out_stride = check_heads(out, "out", p.cache);
  check_size(out, "out", 0, p.num_rows, "rows");
  check_size(out, "out", 1, query.size(1), "num_heads");
  p.out = out.data_ptr();
  if (!tokens_read) return;
  check_tensor(*tokens_read, "tokens_read", 1);
  check_dtype(*tokens_read, "tokens_read", ScalarType::Long, "int64");
  check_size(*tokens_read, "tokens_read", 0, 1, "one counter");
}

}  // namespace

void sparq_select(const Tensor& query,
                  const Tensor& kv_cache,
                  const Tensor& block_table,
                  const Tensor& seq_lens,
                  const Tensor& budgets,
                  int64_t rank,
                  int64_t local_window,
                  int64_t sink_tokens,
                  double scale,
                  double soft_cap,
                  Tensor& indices,
                  Tensor& counts,
                  std::optional<Tensor> kept_mass) {
  const SelectParams p = select_params(query,
                                       kv_cache,
                                       block_table,
                                       seq_lens,
                                       budgets,
                                       rank,
                                       local_window,
                                       sink_tokens,
                                       scale,
                                       soft_cap,
                                       indices,
                                       counts,
                                       kept_mass);
  if (p.num_rows > 0) kernels().select(p);
}

void sparq_attend(const Tensor& query,
                  const Tensor& kv_cache,
                  const Tensor& block_table,
                  const Tensor& seq_lens,
                  const Tensor& budgets,
                  int64_t rank,
                  int64_t local_window,
                  int64_t sink_tokens,
                  double scale,
                  double soft_cap,
                  Tensor& indices,
                  Tensor& counts,
                  std::optional<Tensor> kept_mass,
                  Tensor& out,
                  std::optional<Tensor> tokens_read) {
  const SelectParams s = select_params(query,
                                       kv_cache,
                                       block_table,
                                       seq_lens,
                                       budgets,
                                       rank,
                                       local_window,
                                       sink_tokens,
                                       scale,
                                       soft_cap,
                                       indices,
                                       counts,
                                       kept_mass);
  AttendParams p;
  p.cache = s.cache;
  p.query = s.query;
  p.query_stride = s.query_stride;
  p.block_table = s.block_table;
  p.block_table_stride = s.block_table_stride;
  p.seq_lens = s.seq_lens;
  p.indices = s.indices;
  p.max_kept = s.max_kept;
  p.counts = s.counts;
  p.kept_mass = s.kept_mass;
  p.num_rows = s.num_rows;
  p.group = s.group;
  p.scale = s.scale;
  p.soft_cap = s.soft_cap;
  check_outputs(query, out, tokens_read, p);
  if (p.num_rows > 0) kernels().select_attend(s, p);
  count_tokens(p, tokens_read);
}

void attend(const Tensor& query,
            const Tensor& kv_cache,
            const Tensor& block_table,
            const Tensor& seq_lens,
            std::optional<Tensor> indices,
            std::optional<Tensor> counts,
            std::optional<Tensor> kept_mass,
            double scale,
            double soft_cap,
            Tensor& out,
            std::optional<Tensor> tokens_read) {
  check_tensor(query, "query", 3);
  AttendParams p;
  p.cache = kv_cache_view(kv_cache, query.size(2));
  p.query_stride = check_heads(query, "query", p.cache);
  p.group = query_group(query, p.cache);
  p.query = query.data_ptr();
  p.num_rows = query.size(0);
  p.seq_lens = int_vector(seq_lens, "seq_lens", p.num_rows, "rows");
  p.block_table = check_block_table(block_table, p.num_rows, p.seq_lens, p.cache);
  p.block_table_stride = block_table.stride(0);
  p.scale = static_cast<float>(scale);
  p.soft_cap = static_cast<float>(soft_cap);
  STD_TORCH_CHECK(indices.has_value() == counts.has_value(),
                  "indices and counts must be given together");
  p.indices = nullptr;
  p.counts = nullptr;
  p.kept_mass = nullptr;
  p.max_kept = 0;
  if (indices) {
    check_tensor(*indices, "indices", 3);
    check_dtype(*indices, "indices", ScalarType::Int, "int32");
    check_size(*indices, "indices", 0, p.num_rows, "rows");
    check_size(*indices, "indices", 1, p.cache.num_kv_heads, "num_kv_heads");
    check_tensor(*counts, "counts", 2);
    check_dtype(*counts, "counts", ScalarType::Int, "int32");
    check_size(*counts, "counts", 0, p.num_rows, "rows");
    check_size(*counts, "counts", 1, p.cache.num_kv_heads, "num_kv_heads");
    STD_TORCH_CHECK(indices->is_contiguous() && counts->is_contiguous(),
                    "indices and counts must be contiguous");
    p.indices = static_cast<const int32_t*>(indices->data_ptr());
    p.counts = static_cast<const int32_t*>(counts->data_ptr());
    p.max_kept = indices->size(2);
    const int64_t items = p.num_rows * p.cache.num_kv_heads;
    for (int64_t i = 0; i < items; ++i) {
      const int32_t seq_len = p.seq_lens[i / p.cache.num_kv_heads];
      STD_TORCH_CHECK(p.counts[i] != 0 && p.counts[i] <= p.max_kept && p.counts[i] <= seq_len,
                      "counts[",
                      i,
                      "] = ",
                      p.counts[i],
                      " must be -1 (everything) or from 1 to indices' size and seq_len");
      for (int32_t j = 0; j < p.counts[i]; ++j) {
        const int32_t token = p.indices[i * p.max_kept + j];
        STD_TORCH_CHECK(token >= 0 && token < seq_len,
                        "indices[",
                        i / p.cache.num_kv_heads,
                        "][",
                        i % p.cache.num_kv_heads,
                        "][",
                        j,
                        "] = ",
                        token,
                        " is not a token of the row's ",
                        seq_len);
      }
    }
  }
  if (kept_mass) {
    check_tensor(*kept_mass, "kept_mass", 2);
    check_dtype(*kept_mass, "kept_mass", ScalarType::Float, "float32");
    STD_TORCH_CHECK(kept_mass->is_contiguous(), "kept_mass must be contiguous");
    check_size(*kept_mass, "kept_mass", 0, p.num_rows, "rows");
    check_size(*kept_mass, "kept_mass", 1, query.size(1), "num_heads");
    p.kept_mass = static_cast<const float*>(kept_mass->data_ptr());
  }
  check_outputs(query, out, tokens_read, p);
  if (p.num_rows > 0) kernels().attend(p);
  count_tokens(p, tokens_read);
}

std::string cpu_isa() { return kernels().name; }

}  // namespace vllm_sparse::cpu
