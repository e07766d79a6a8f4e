// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// What scoring hands to selection.
//
// Of every sealed block and query head: the largest logit (in units of log2), the sum of 2^(logit -
// largest) over its tokens, and these exponentials in 8 bits: 4 of exponent and 4 of mantissa, the
// bits 13 to 6 of an fp16 number of at most 1. They are off by 3 % at most, down to 2^-14.
//
// Two heads (h, h + 1) of a block take 64 words in an order that suits the tensor cores' lanes. A
// word holds the tokens t and t + 4 as bytes (t, h), (t, h + 1), (t + 4, h), (t + 4, h + 1).
#pragma once

#include "common/instructions.cuh"
#include "common/token_lists.cuh"

namespace vllm_sparse::cuda {

constexpr int kPairBytes = 2 * kBlockSize;

// fp16 queries carry this factor, so that products with codes, which enter as fp16 denormals, leave
// as fp16 numbers: logits times 2^(kQueryShift - 24).
constexpr int kQueryShift = 9;

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

// What channels.cuh leaves of an item.
struct PreparedItem {
  int padded_rank, padded_group;
  int* channel;   // [padded_rank] ascending; padding is channel 0
  __half* query;  // [padded_group, padded_rank] times scale, temperature and 2^kQueryShift (and
                  // log2 e, unless capped); 0 in padding
  __device__ PreparedItem(const SelectArgs& p, int* channel, __half* query)
      : padded_rank(pad_to(p.rank, kStepChannels)),
        padded_group(pad_to(p.group, 4)),
        channel(channel),
        query(query) {}
  __device__ PreparedItem(const SelectArgs& p, int64_t item) : PreparedItem(p, nullptr, nullptr) {
    channel = reinterpret_cast<int*>(p.prepared + item * prepared_bytes(p.rank, p.group));
    query = reinterpret_cast<__half*>(channel + padded_rank);
  }
};

}  // namespace vllm_sparse::cuda
