// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// The ops on the CPU, where values are checked, too.
#include "../ops.h"

#include <algorithm>
#include <string>

#include "runtime.h"

namespace vllm_sparse {

namespace {

// Blocks [first, end) of a row are blocks of the cache.
void check_blocks(const Contexts& p, int64_t row, int64_t first, int64_t end) {
  for (int64_t i = first; i < end; ++i) {
    const int32_t id = p.table(row)[i];
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

// Columns of the block table that a context of a row needs.
int64_t blocks_of(const Contexts& p, int64_t row) {
  return (int64_t{p.seq_lens[row]} + kBlockSize - 1) / kBlockSize + p.cache.lookahead_blocks();
}

void check_contexts(const Contexts& p, bool allow_empty = false) {
  for (int64_t row = 0; row < p.num_rows; ++row) {
    const int64_t blocks = blocks_of(p, row);
    STD_TORCH_CHECK(p.seq_lens[row] >= (allow_empty ? 0 : 1) && blocks <= p.max_blocks,
                    "seq_lens[",
                    row,
                    "] = ",
                    p.seq_lens[row],
                    " does not fit a block_table of ",
                    p.max_blocks,
                    " blocks");
    check_blocks(p, row, 0, blocks);
  }
}

// Whether a row brings tokens that are stored, and how they must then be.
bool check_new_tokens(const StoreParams& p, int64_t row) {
  const int32_t first = p.query_start_loc[row], end = p.query_start_loc[row + 1];
  const int32_t length = p.seq_lens[row];
  const auto check_range = [&](bool right) {
    STD_TORCH_CHECK(right,
                    "query_start_loc gives row ",
                    row,
                    " the tokens ",
                    first,
                    " to ",
                    end,
                    " of ",
                    p.num_tokens,
                    ", for a context of ",
                    length);
  };
  check_range(first >= 0 && first <= end && end <= p.num_tokens);
  bool stores = false;
  for (int64_t t = first; t < end; ++t) {
    stores |= has_slot(p.slot_mapping[t]);
    // In quantised formats places come from the block table.
    STD_TORCH_CHECK(
        p.cache.quantised() || p.slot_mapping[t] < p.cache.num_blocks * int64_t{kBlockSize},
        "slot_mapping[",
        t,
        "] = ",
        p.slot_mapping[t],
        " is beyond the cache's ",
        p.cache.num_blocks,
        " blocks");
  }
  if (!stores) return false;
  check_range(end - first <= length);
  const int64_t blocks = blocks_of(p, row);
  STD_TORCH_CHECK(blocks <= p.max_blocks,
                  "block_table has ",
                  p.max_blocks,
                  " columns, row ",
                  row,
                  " needs ",
                  blocks,
                  ", of them ",
                  p.cache.lookahead_blocks(),
                  " beyond its tokens");
  // Tails lie in blocks from the first new token's on; means are read of the one before.
  const int64_t from = (length - (end - first)) / kBlockSize;
  check_blocks(p, row, from > 0 ? from - 1 : 0, blocks);
  return true;
}

// Blocks whose last token is stored, by their place in the context.
std::vector<FilledBlock> filled_blocks(const StoreParams& p) {
  std::vector<FilledBlock> filled;
  for (int64_t row = 0; row < p.num_rows; ++row) {
    if (!check_new_tokens(p, row)) continue;
    const int32_t first = p.query_start_loc[row], length = p.seq_lens[row];
    const int32_t computed = length - (p.query_start_loc[row + 1] - first);
    for (int32_t i = computed / kBlockSize; i < length / kBlockSize; ++i) {
      const int32_t begin = i * kBlockSize, old = std::max(0, computed - begin);
      const int64_t slot = p.slot_mapping[first + begin + kBlockSize - 1 - computed];
      if (!has_slot(slot)) continue;
      const int32_t id = p.cache.quantised() ? p.table(row)[i] : slot / kBlockSize;
      if (id == 0) continue;  // vLLM's null block
      const int32_t previous = i > 0 ? p.table(row)[i - 1] : -1;
      filled.push_back({row, i, id, previous, old, int64_t{first} + begin + old - computed});
    }
  }
  std::stable_sort(filled.begin(), filled.end(), [](const FilledBlock& a, const FilledBlock& b) {
    return a.index < b.index;
  });
  return filled;
}

// Every row's list must have room for what it keeps.
void check_room(const SelectParams& p) {
  for (int64_t row = 0; row < p.num_rows; ++row) {
    const int32_t length = p.seq_lens[row], budget = p.budgets[row];
    const int tail = length - p.cache.sealed_blocks(length) * kBlockSize;
    const int forced = p.sink_tokens + std::max(tail, p.local_window);
    const int64_t kept = std::max(budget, forced);
    STD_TORCH_CHECK(budget < 0 || std::min<int64_t>(kept, length) <= p.max_kept || budget >= length,
                    "indices holds ",
                    p.max_kept,
                    " tokens, row ",
                    row,
                    " keeps ",
                    kept);
  }
}

// Counts the lengths of the rows' lists.
void count_kept(const SelectParams& p) {
  if (p.kept_histogram == nullptr) return;
  const int64_t heads = p.cache.num_kv_heads;
  for (int64_t i = 0; i < p.num_rows * heads; ++i) {
    if (p.counts[i] <= 0) continue;
    int64_t* of_head = p.kept_histogram + i % heads * kKeptBins;
    ++of_head[kept_bin(p.counts[i])];
    of_head[kKeptBins - 1] += p.counts[i];
  }
}

// `item`: a row's KV head.
void check_list(const AttendParams& p, int64_t item) {
  const int64_t row = item / p.cache.num_kv_heads, head = item % p.cache.num_kv_heads;
  const int32_t length = p.seq_lens[row], count = p.counts[item];
  STD_TORCH_CHECK(count != 0 && count <= p.max_kept && count <= length,
                  "counts[",
                  item,
                  "] = ",
                  count,
                  " must be -1 (everything) or from 1 to indices' size and seq_len");
  const int32_t* list = p.indices + item * p.max_kept;
  for (int32_t j = 0; j < count; ++j) {
    STD_TORCH_CHECK(list[j] >= 0 && list[j] < length,
                    "indices[",
                    row,
                    "][",
                    head,
                    "][",
                    j,
                    "] = ",
                    list[j],
                    " is not a token of the row's ",
                    length);
    STD_TORCH_CHECK(!p.cache.quantised() || j == 0 || list[j - 1] < list[j],
                    "indices must ascend in quantised formats");
  }
}

}  // namespace

void run_store(StoreParams& p, const Tensor&) {
  const std::vector<FilledBlock> filled = filled_blocks(p);
  if (p.num_rows == 0) return;
  p.num_tokens = p.query_start_loc[p.num_rows];  // the others are padding
  p.filled = filled.data();
  p.num_filled = p.cache.bare ? 0 : static_cast<int64_t>(filled.size());
  kernels().store(p);
}

void run_gather(const GatherParams& p) {
  check_contexts(p, p.cache.quantised());
  for (int64_t row = 0; row < p.num_rows; ++row) {
    const int64_t end = p.out_start[row] + p.seq_lens[row];
    STD_TORCH_CHECK(p.out_start[row] >= 0 && end <= p.num_out_tokens,
                    "row ",
                    row,
                    " ends at token ",
                    end,
                    ", beyond key or value");
  }
  kernels().gather(p);
}

void run_sparq(const SelectParams& select,
               const AttendParams* attend,
               const std::optional<Tensor>&,
               const Tensor&) {
  check_contexts(select);
  check_room(select);
  attend ? kernels().select_attend(select, *attend) : kernels().select(select);
  count_kept(select);
}

void run_attend(const AttendParams& p, const std::optional<Tensor>&, const Tensor&) {
  check_contexts(p);
  if (p.indices != nullptr) {
    for (int64_t i = 0; i < p.num_rows * p.cache.num_kv_heads; ++i) check_list(p, i);
  }
  kernels().attend(p);
}

std::string cpu_isa() { return kernels().name; }

}  // namespace vllm_sparse

STABLE_TORCH_LIBRARY_IMPL(vllm_sparse, CPU, m) { vllm_sparse::implement_ops(m); }

STABLE_TORCH_LIBRARY_IMPL(vllm_sparse, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&vllm_sparse::cpu_isa));
}
