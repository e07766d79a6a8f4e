// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// What a row keeps, and the token lists of its KV heads.
#pragma once

#include "common/kernels.h"
#include "common/primitives.cuh"

namespace vllm_sparse::cuda {

struct RowPlan {
  int length, sealed;  // tokens, full blocks
  int sinks, recent;   // tokens before and from here on are kept
  int wanted;          // how many others
  bool all;            // everything is kept, nothing needs scores
};

// Values on the device are not checked: a length beyond the block table is cut.
template <class Args>
__device__ inline RowPlan plan_row(const Args& p, int64_t row) {
  RowPlan r;
  r.length =
      static_cast<int>(min(int64_t{max(p.seq_lens[row], 0)}, p.max_blocks * int64_t{kBlockSize}));
  const int budget = p.budgets[row];
  r.sealed = p.cache.sealed_blocks(r.length);
  r.recent = max(0, min(r.length - p.local_window, r.sealed * kBlockSize));
  r.all = budget < 0 || budget >= r.length || r.recent <= p.sink_tokens;
  r.sinks = min(p.sink_tokens, r.recent);
  r.wanted = max(0, budget - r.sinks - (r.length - r.recent));
  return r;
}

// Counts the length of an item's list.
__device__ inline void count_kept(const SelectArgs& p, int head, int count) {
  if (p.kept_histogram == nullptr || count <= 0) return;
  auto* bins = reinterpret_cast<unsigned long long*>(p.kept_histogram) + head * kKeptBins;
  atomicAdd(bins + kept_bin(count), 1);
  atomicAdd(bins + kKeptBins - 1, count);
}

// Tokens of one (row, KV head): listed ones, or with `all` the first `count` of its context.
struct TokenList {
  int length, count;
  bool all;
};

// Behind a selection of the same call, counts follow from the row before selection is through. Not
// inlined: it is called in many places, rarely, and instructions have to be fetched, too.
static __device__ __noinline__ TokenList token_list(const AttendArgs& p, int row, int item) {
  TokenList t;
  int64_t listed;
  if (p.budgets != nullptr) {
    const RowPlan plan = plan_row(p, row);
    t.length = plan.length;
    listed = plan.all ? -1 : plan.sinks + plan.wanted + plan.length - plan.recent;
  } else {
    t.length =
        static_cast<int>(min(int64_t{max(p.seq_lens[row], 0)}, p.max_blocks * int64_t{kBlockSize}));
    listed = p.counts == nullptr ? -1 : p.counts[item];
  }
  t.all = listed < 0;
  t.count = t.all ? t.length : static_cast<int>(min(listed, p.max_kept));
  return t;
}

}  // namespace vllm_sparse::cuda
