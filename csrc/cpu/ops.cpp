// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// Checked entry points: tensors in, pointers and shapes out.
#include "ops.h"

#include <vector>

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
  set_store(key, value, slot_mapping, p);
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

namespace {

// Seals the last block of every row that ends among its new tokens.
void seal_filled(const SealRowsParams& p) {
  std::vector<int32_t> block_ids, prev_block_ids, block_index;
  for (int64_t row = 0; row < p.num_rows; ++row) {
    const int length = p.seq_lens[row], index = length / kBlockSize - 1;
    const int computed = length - (p.query_start_loc[row + 1] - p.query_start_loc[row]);
    if (index < 0 || index >= p.max_blocks || computed >= (index + 1) * kBlockSize) continue;
    const int32_t* table = p.block_table + row * p.block_table_stride;
    const int32_t prev = index > 0 ? table[index - 1] : -1;
    if (table[index] <= 0) continue;
    STD_TORCH_CHECK(table[index] < p.cache.num_blocks && prev < p.cache.num_blocks,
                    "block_table names a block that does not exist in row ",
                    row);
    block_ids.push_back(table[index]);
    prev_block_ids.push_back(prev);
    block_index.push_back(index);
  }
  if (block_ids.empty()) return;
  SealParams jobs;
  jobs.cache = p.cache;
  jobs.block_ids = block_ids.data();
  jobs.prev_block_ids = prev_block_ids.data();
  jobs.block_index = block_index.data();
  jobs.num_jobs = static_cast<int64_t>(block_ids.size());
  kernels().seal(jobs);
}

}  // namespace

void seal_rows(Tensor& kv_cache,
               const Tensor& block_table,
               const Tensor& seq_lens,
               const Tensor& query_start_loc,
               int64_t head_size) {
  seal_filled(
      seal_rows_params(kv_cache_view(kv_cache, head_size), block_table, seq_lens, query_start_loc));
}

void store_rows(const Tensor& key,
                const Tensor& value,
                Tensor& kv_cache,
                const Tensor& slot_mapping,
                const Tensor& block_table,
                const Tensor& seq_lens) {
  store_kv(key, value, kv_cache, slot_mapping);
  SealRowsParams p;
  p.cache = kv_cache_view(kv_cache, key.size(2));
  p.num_rows = slot_mapping.size(0);
  set_contexts(block_table, seq_lens, p.num_rows, p);
  // A row without a slot brings no token, and so fills no block.
  const int64_t* slots = static_cast<const int64_t*>(slot_mapping.data_ptr());
  std::vector<int32_t> starts(p.num_rows + 1);
  for (int64_t row = 0; row < p.num_rows; ++row) starts[row + 1] = starts[row] + (slots[row] >= 0);
  p.query_start_loc = starts.data();
  seal_filled(p);
}

void store_quantised(const Tensor& key,
                     const Tensor& value,
                     Tensor& kv_cache,
                     const Tensor& block_table,
                     const Tensor& seq_lens,
                     const Tensor& query_start_loc,
                     int64_t kv_format) {
  check_tensor(key, "key", 3);
  STD_TORCH_CHECK(kv_format != 0, "store_quantised needs a quantised format");
  StoreQuantisedParams p;
  p.cache = kv_cache_view(kv_cache, key.size(2), kv_format);
  p.num_rows = seq_lens.size(0);
  set_contexts(block_table, seq_lens, p.num_rows, p);
  p.query_start_loc = int_vector(query_start_loc, "query_start_loc", p.num_rows + 1, "rows + 1");
  const int ahead = p.cache.lookahead_blocks();
  for (int64_t row = 0; row < p.num_rows; ++row) {
    const int32_t first = p.query_start_loc[row], end = p.query_start_loc[row + 1];
    const int32_t length = p.seq_lens[row];
    STD_TORCH_CHECK(first >= 0 && first <= end && end - first <= length,
                    "query_start_loc gives row ",
                    row,
                    " the tokens ",
                    first,
                    " to ",
                    end,
                    " of a context of ",
                    length);
    if (first == end) continue;
    const int64_t blocks = (int64_t{length} + kBlockSize - 1) / kBlockSize + ahead;
    STD_TORCH_CHECK(blocks <= p.max_blocks,
                    "block_table has ",
                    p.max_blocks,
                    " columns, row ",
                    row,
                    " needs ",
                    blocks,
                    ", of them ",
                    ahead,
                    " beyond its tokens");
    // Tails lie in blocks from the first new token's on; means are read of the one before.
    const int64_t from = (length - (end - first)) / kBlockSize;
    for (int64_t i = from > 0 ? from - 1 : 0; i < blocks; ++i) {
      const int32_t id = p.block_table[row * p.block_table_stride + i];
      STD_TORCH_CHECK(id >= 0 && id < p.cache.num_blocks,
                      "block_table[",
                      row,
                      "][",
                      i,
                      "] = ",
                      id,
                      " is not one of the ",
                      p.cache.num_blocks,
                      " blocks");
    }
  }
  set_new_tokens(key, value, p.num_rows > 0 ? p.query_start_loc[p.num_rows] : 0, p);
  kernels().store_quantised(p);
}

void gather_kv(const Tensor& kv_cache,
               const Tensor& block_table,
               const Tensor& seq_lens,
               const Tensor& out_start,
               Tensor& key,
               Tensor& value,
               int64_t kv_format) {
  check_tensor(key, "key", 3);
  GatherParams p;
  p.cache = kv_cache_view(kv_cache, key.size(2), kv_format);
  p.seq_lens = int_vector(seq_lens, "seq_lens", -1, "");
  p.num_rows = seq_lens.size(0);
  p.block_table =
      check_block_table(block_table, p.num_rows, p.seq_lens, p.cache, p.cache.quantised());
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
                           double top_p,
                           int64_t min_tokens,
                           Tensor& indices,
                           Tensor& counts,
                           std::optional<Tensor>& kept_mass,
                           int64_t kv_format) {
  check_tensor(query, "query", 3);
  SelectParams p;
  p.cache = kv_cache_view(kv_cache, query.size(2), kv_format);
  set_query(query, scale, soft_cap, p);
  p.seq_lens = int_vector(seq_lens, "seq_lens", p.num_rows, "rows");
  p.budgets = int_vector(budgets, "budgets", p.num_rows, "rows");
  p.block_table = check_block_table(block_table, p.num_rows, p.seq_lens, p.cache);
  p.block_table_stride = block_table.stride(0);
  set_sparq_options(rank, local_window, sink_tokens, top_p, min_tokens, p);
  p.indices = check_lists(indices, "indices", 3, p.num_rows, p.cache);
  p.max_kept = indices.size(2);
  for (int64_t row = 0; row < p.num_rows; ++row) {
    const int64_t tail =
        p.seq_lens[row] - p.cache.sealed_blocks(p.seq_lens[row]) * int64_t{kBlockSize};
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
  p.counts = check_lists(counts, "counts", 2, p.num_rows, p.cache);
  p.kept_mass = check_mass(kept_mass, query);
  STD_TORCH_CHECK(p.kept_mass == nullptr || p.cache.has_mean,
                  "kept_mass needs a format whose blocks hold the mean of V");
  return p;
}

// What one list, or a whole context, reads of sealed blocks: tokens and blocks.
void count_sealed(const AttendParams& p, int64_t item, int32_t count, int64_t* total) {
  const int32_t sealed = p.cache.sealed_blocks(p.seq_lens[item / p.cache.num_kv_heads]);
  if (count < 0) {
    total[0] += int64_t{sealed} * kBlockSize;
    total[1] += sealed;
    return;
  }
  const int32_t* list = p.indices + item * p.max_kept;
  int32_t before = -1;
  for (int32_t i = 0; i < count && list[i] < sealed * kBlockSize; ++i) {
    const int32_t block = list[i] / kBlockSize;
    ++total[0];
    total[1] += block != before;
    before = block;
  }
}

// Adds what the rows attend to, tokens per KV head, to a counter; to the next two, if there are
// any, those of them in sealed blocks, and these blocks (quantised formats only).
void count_tokens(const AttendParams& p, const std::optional<Tensor>& counter, int64_t* total) {
  const bool sealed = total != nullptr && p.cache.quantised() && counter->size(0) == 3;
  for (int64_t i = 0; total != nullptr && i < p.num_rows * p.cache.num_kv_heads; ++i) {
    const int32_t count = p.counts != nullptr ? p.counts[i] : -1;
    total[0] += count >= 0 ? count : p.seq_lens[i / p.cache.num_kv_heads];
    if (sealed) count_sealed(p, i, count, total + 1);
  }
}

// Adds the lengths of the rows' lists to every KV head's histogram.
void count_kept(const SelectParams& p, int64_t* histogram) {
  for (int64_t i = 0; histogram != nullptr && i < p.num_rows * p.cache.num_kv_heads; ++i) {
    if (p.counts[i] <= 0) continue;
    int64_t* of_head = histogram + i % p.cache.num_kv_heads * kKeptBins;
    ++of_head[kept_bin(p.counts[i])];
    of_head[kKeptBins - 1] += p.counts[i];
  }
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
                  double top_p,
                  int64_t min_tokens,
                  Tensor& indices,
                  Tensor& counts,
                  std::optional<Tensor> kept_mass,
                  std::optional<Tensor> /*workspace*/,
                  int64_t kv_format) {
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
                                       top_p,
                                       min_tokens,
                                       indices,
                                       counts,
                                       kept_mass,
                                       kv_format);
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
                  double top_p,
                  int64_t min_tokens,
                  Tensor& indices,
                  Tensor& counts,
                  std::optional<Tensor> kept_mass,
                  Tensor& out,
                  std::optional<Tensor> tokens_read,
                  std::optional<Tensor> kept_histogram,
                  std::optional<Tensor> /*workspace*/,
                  int64_t kv_format) {
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
                                       top_p,
                                       min_tokens,
                                       indices,
                                       counts,
                                       kept_mass,
                                       kv_format);
  AttendParams p;
  attend_after(s, p);
  int64_t* total = set_outputs(query, out, tokens_read, p);
  int64_t* histogram = check_histogram(kept_histogram, p.cache);
  if (p.num_rows > 0) kernels().select_attend(s, p);
  count_tokens(p, tokens_read, total);
  count_kept(s, histogram);
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
            std::optional<Tensor> tokens_read,
            std::optional<Tensor> /*workspace*/,
            int64_t kv_format) {
  check_tensor(query, "query", 3);
  AttendParams p;
  p.cache = kv_cache_view(kv_cache, query.size(2), kv_format);
  set_query(query, scale, soft_cap, p);
  p.seq_lens = int_vector(seq_lens, "seq_lens", p.num_rows, "rows");
  p.block_table = check_block_table(block_table, p.num_rows, p.seq_lens, p.cache);
  p.block_table_stride = block_table.stride(0);
  STD_TORCH_CHECK(indices.has_value() == counts.has_value(),
                  "indices and counts must be given together");
  p.indices = nullptr;
  p.counts = nullptr;
  p.max_kept = 0;
  if (indices) {
    p.indices = check_lists(*indices, "indices", 3, p.num_rows, p.cache);
    p.counts = check_lists(*counts, "counts", 2, p.num_rows, p.cache);
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
        STD_TORCH_CHECK(!p.cache.quantised() || j == 0 || p.indices[i * p.max_kept + j - 1] < token,
                        "indices must ascend in quantised formats");
      }
    }
  }
  p.kept_mass = check_mass(kept_mass, query);
  STD_TORCH_CHECK(p.kept_mass == nullptr || p.cache.has_mean,
                  "kept_mass needs a format whose blocks hold the mean of V");
  int64_t* total = set_outputs(query, out, tokens_read, p);
  if (p.num_rows > 0) kernels().attend(p);
  count_tokens(p, tokens_read, total);
}

std::string cpu_isa() { return kernels().name; }

}  // namespace vllm_sparse::cpu
