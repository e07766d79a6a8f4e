// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// What scoring hands to selection, and which rows need either.
//
// Of every sealed block and query head: the largest logit (in units of log2), the sum of 2^(logit -
// largest) over its tokens, and these exponentials in 8 bits: 4 of exponent and 4 of mantissa, the
// bits 13 to 6 of an fp16 number of at most 1. They are off by 3 % at most, down to 2^-14.
//
// Two heads (h, h + 1) of a block take 64 words in an order that suits the tensor cores' lanes. A
// word holds the tokens t and t + 4 as bytes (t, h), (t, h + 1), (t + 4, h), (t + 4, h + 1).
#pragma once

#include "kernels.h"
#include "pipeline.cuh"

namespace vllm_sparse::cuda {

constexpr int kPairBytes = 2 * kBlockSize;

#ifdef __CUDACC__

// Where a block's token stands among the 16-bit halves of its 64 words.
__device__ inline int stored_at(int token) { return token >> 2 | (token & 3) << 5; }

// Two words' worth of fp16 exponentials to bytes: x of token t, y of token t + 4, heads (h, h + 1).
__device__ inline uint32_t pack_exponentials(__half2 x, __half2 y) {
  const uint32_t half_unit = 0x00800080u;
  return __byte_perm(as_word(x) * 4 + half_unit, as_word(y) * 4 + half_unit, 0x7531);
}

// (t, t + 4) of the first head of a word, and of the second.
__device__ inline __half2 first_head(uint32_t word) { return as_half2(word << 6 & 0x3fc03fc0u); }
__device__ inline __half2 second_head(uint32_t word) { return as_half2(word >> 2 & 0x3fc03fc0u); }

struct RowPlan {
  int length, sealed;  // tokens, full blocks
  int sinks, recent;   // tokens before and from here on are kept
  int wanted;          // how many others
  bool all;            // everything is kept, nothing needs scores
};

// values on the device are not checked: a length beyond the block table is cut
__device__ inline RowPlan plan_row(const SelectArgs& p, int64_t row) {
  RowPlan r;
  r.length =
      static_cast<int>(min(int64_t{max(p.seq_lens[row], 0)}, p.max_blocks * int64_t{kBlockSize}));
  const int budget = p.budgets[row];
  r.sealed = r.length / kBlockSize;
  r.recent = max(0, min(r.length - p.local_window, r.sealed * kBlockSize));
  r.all = budget < 0 || budget >= r.length || r.recent <= p.sink_tokens;
  r.sinks = min(p.sink_tokens, r.recent);
  r.wanted = max(0, budget - r.sinks - (r.length - r.recent));
  return r;
}

#endif  // __CUDACC__

}  // namespace vllm_sparse::cuda
