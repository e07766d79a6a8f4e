// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// SparQ's approximate logits (arXiv 2312.04985, section 3) from 4-bit codes: what one warp does.
#pragma once

#include "common/tails.cuh"
#include "select/grouped_products.cuh"

namespace vllm_sparse::cuda {

// kGroups: 0 for blocks with rows; else of a channel's scales, in quantised blocks.
template <int kGroups>
using ProductsOf = std::conditional_t<kGroups == 4, GroupedProducts, Products>;

// Brings codes and parameters of a step of two blocks into a slot: half a warp a block. With kFast,
// there is one step and the channels' places are kept in registers.
template <bool kFast, int kGroups>
struct Loader {
  static constexpr int kParamBytes = ProductsOf<kGroups>::kParamBytes;
  const int* channel;
  int rank;
  uint32_t params_offset;
  uint32_t code[kFast ? 8 : 1], param[kFast ? 2 : 1];  // bytes from the codes' start, by copy
  uint32_t to_code, to_param;

  __device__ uint32_t code_of(int first, int copy) const {
    return channel[first + 4 * copy + threadIdx.x % 16 / 4] * kCodeBytes + threadIdx.x % 4 * 16;
  }
  __device__ uint32_t param_of(int first, int copy) const {
    return params_offset + channel[first + 16 * copy + threadIdx.x % 16] * kParamBytes;
  }
  __device__ Loader(const SelectArgs& p, const int* channels) : channel(channels), rank(p.rank) {
    const int block = threadIdx.x % 32 / 16, r = threadIdx.x % 16;
    params_offset = kGroups ? p.codes.params : p.cache.head_size * kCodeBytes;
    to_code = block * kCodesOfStep + r / 4 * kCodeBytes + (r % 4 ^ r / 8) * 16;
    to_param = 2 * kCodesOfStep + (block * kStepChannels + r) * kParamBytes;
    if constexpr (kFast) {
#pragma unroll
      for (int i = 0; i < 8; ++i) code[i] = code_of(0, i);
#pragma unroll
      for (int i = 0; i < 2; ++i) param[i] = param_of(0, i);
    }
  }
  __device__ void copy(int step, const uint8_t* codes, uint32_t slot) const {
    const int first = step * kStepChannels;
    const uint32_t even = slot + to_code, odd = slot + (to_code ^ 32);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      // Padding repeats a channel, except where there may be much of it.
      const uint32_t to = (i % 2 ? odd : even) + i * 4 * kCodeBytes;
      if (kFast) {
        copy_async_16(to, codes + code[i]);
      } else if (4 * i + static_cast<int>(threadIdx.x) % 16 / 4 < rank - first) {
        copy_async_16(to, codes + code_of(first, i));
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      // Padding is 0: NaN times 0 would be NaN.
      const bool inside = static_cast<int>(threadIdx.x) % 16 + 16 * i < rank - first;
      const uint32_t to = slot + to_param + i * 16 * kParamBytes;
      const uint8_t* from = codes + (kFast ? param[i] : param_of(first, i));
      if constexpr (kParamBytes == 16) {
        copy_async_16(to, from, inside ? 16 : 0);
      } else {
        copy_async_4(to, from, inside ? 4 : 0);
      }
    }
  }
};

// (top, sum) of a group of tokens that are not sealed, from exact keys: two lanes a token.
// kAhead: the same warp's attention reads their values soon.
template <class T, bool kCodes = false, bool kAhead = false>
__device__ void score_tail(const SelectArgs& p,
                           const PreparedItem& item,
                           const int32_t* table,
                           int head,
                           int length,
                           int group,
                           float2* stats) {
  const int first_token = group * kTailTokens;
  const int sealed = kCodes ? p.cache.sealed_blocks(length) : length / kBlockSize;
  const int count = min(kTailTokens, length - sealed * kBlockSize - first_token);
  const int lane = threadIdx.x % 32, t = lane / 2, part = lane % 2;
  const int token = first_token + min(t, count - 1);
  const T* key;
  if constexpr (kCodes) {
    key = reinterpret_cast<const T*>(tail_row(p, table, head, sealed, token));
    if constexpr (kAhead) {
      const T* value = key + p.cache.head_size + part * p.cache.head_size / 2;
      prefetch_l2(value);
      prefetch_l2(value + p.cache.head_size / 4);
    }
  } else {
    const uint8_t* chunk = chunk_of(p.cache, safe_block(p.cache, table[sealed]), head);
    key = reinterpret_cast<const T*>(chunk) + int64_t{token} * 2 * p.cache.head_size;
  }
#pragma unroll 1
  for (int first = 0; first < 2 * p.pairs; first += 4) {
    float x[4] = {};
#pragma unroll 1
    for (int begin = 2 * part; begin < p.rank; begin += 16) {
      float k[4][2];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int c = begin + 4 * i;
        const bool inside = c < p.rank;
        const int2 at = *reinterpret_cast<const int2*>(item.channel + (inside ? c : 0));
        k[i][0] = inside ? to_float(key[at.x]) : 0;
        k[i][1] = inside ? to_float(key[at.y]) : 0;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int h = 0; h < 4; ++h) {
          const __half* query = item.query + (first + h) * item.padded_rank + begin + 4 * i;
          const float2 q = __half22float2(*reinterpret_cast<const __half2*>(query));
          x[h] = fmaf(q.x, k[i][0], fmaf(q.y, k[i][1], x[h]));
        }
      }
    }
    float top[4], sum[4];
#pragma unroll
    for (int h = 0; h < 4; ++h) {
      x[h] = (x[h] + __shfl_xor_sync(kFullMask, x[h], 1)) * (1.0f / (1 << kQueryShift));
      if (p.soft_cap > 0) x[h] = cap_logit(x[h], p.soft_cap);
      if (t >= count) x[h] = -INFINITY;
      top[h] = x[h];
    }
#pragma unroll 1
    for (int i = 2; i < 32; i *= 2) {
#pragma unroll
      for (auto& y : top) y = fmaxf(y, __shfl_xor_sync(kFullMask, y, i));
    }
#pragma unroll
    for (int h = 0; h < 4; ++h) sum[h] = fast_exp2(x[h] - top[h]);
#pragma unroll 1
    for (int i = 2; i < 32; i *= 2) {
#pragma unroll
      for (auto& y : sum) y += __shfl_xor_sync(kFullMask, y, i);
    }
#pragma unroll
    for (int h = 0; h < 4; ++h) {
      if (lane == 0 && first + h < 2 * p.pairs) stats[first + h] = {top[h], sum[h]};
    }
  }
}

// A warp's blocks of an item: pairs of neighbours, one pair every `stride` blocks.
struct WarpBlocks {
  int first, stride, pairs;
  int last;  // no block beyond this one
};

// Scores of a warp's blocks, through its `ring` of kSlots steps. Calls `meanwhile` once when the
// first steps are under way, and emit(block, pair of heads, words, stats) with the exponentials of
// the lane's 16 tokens and the block's (top, sum) of both heads, see score_format.cuh.
template <bool kFast, bool kCap, int kSlots, int kGroups = 0, class Meanwhile, class Emit>
__device__ void score_blocks(const SelectArgs& p,
                             const PreparedItem& prepared,
                             const int32_t* table,
                             int head,
                             const WarpBlocks& blocks,
                             uint32_t ring,
                             const Meanwhile& meanwhile,
                             const Emit& emit) {
  using Product = ProductsOf<kGroups>;
  constexpr int kBytes = slot_bytes(Product::kParamBytes);
  const int lane = threadIdx.x % 32;
  // Blocks of the lane's half; the pair after the next one is looked up.
  int looked_up = blocks.first + lane / 16;
  const auto look_up = [&]() {
    const int32_t id = table[min(looked_up, blocks.last)];
    looked_up += blocks.stride;
    return id;
  };
  int32_t id = 0, next_id = 0;
  if (blocks.pairs > 0) id = look_up(), next_id = look_up();
  const uint8_t* base = p.cache.data + head * p.cache.head_stride;
  if (kGroups == 0) base += int64_t{kBlockSize} * 2 * p.cache.head_size * p.cache.element_size;
  const uint32_t num_blocks = static_cast<uint32_t>(p.cache.num_blocks);
  // A pair takes `parts` passes of the ring: steps of channels, again for every four heads.
  const int steps = kFast ? 1 : prepared.padded_rank / kStepChannels;
  const int parts = kFast ? 1 : steps * (prepared.padded_group / 4);
  const int total = blocks.pairs * parts;
  const Loader<kFast, kGroups> loader(p, prepared.channel);
  const int column = lane / 4 % 4;
  uint32_t query[2][2];
  const auto load_query = [&](int first_head, int step) {
    const __half* from = prepared.query + (first_head + column) * prepared.padded_rank +
                         step * kStepChannels + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      query[i / 2][i % 2] = *reinterpret_cast<const uint32_t*>(from + i * 8);
    }
  };
  if (kFast) load_query(0, 0);
  int issued_pair = 0, issued_part = 0;
  uint32_t issue_slot = ring, slot = ring;
  const uint32_t ring_end = ring + kSlots * kBytes;
  const auto issue = [&]() {
    if (issued_pair < blocks.pairs) {
      const uint32_t block = static_cast<uint32_t>(id) < num_blocks ? id : 0;
      loader.copy(kFast ? 0 : issued_part % steps, base + block * p.cache.block_stride, issue_slot);
      if (kFast || ++issued_part == parts) {
        issued_part = 0;
        ++issued_pair;
        id = next_id;
        next_id = look_up();
      }
    }
    copy_commit();
    issue_slot = issue_slot + kBytes == ring_end ? ring : issue_slot + kBytes;
  };
#pragma unroll 1
  for (int i = 0; i < kSlots - 1; ++i) issue();
  meanwhile();

  Product products;
  int pair = 0, part = 0;
  for (int i = 0; i < total; ++i) {
    copy_wait<kSlots - 2>();
    __syncwarp();
    issue();
    const int step = kFast ? 0 : part % steps, first_head = kFast ? 0 : part / steps * 4;
    if (step == 0) products.clear();
    if (!kFast) load_query(first_head, step);
    products.template add<kFast>(slot, query);
    slot = slot + kBytes == ring_end ? ring : slot + kBytes;
    if (step == steps - 1) {
      uint32_t words[8];
      const float4 stats = products.template finish<kFast, kCap>(p.soft_cap, words);
      const int block = blocks.first + pair * blocks.stride + Product::lane_block();
      const int pair_of_heads = first_head / 2 + lane % 2;
      if (block <= blocks.last && pair_of_heads < p.pairs) {
        emit(block, pair_of_heads, words, stats);
      }
    }
    if (kFast || ++part == parts) {
      part = 0;
      ++pair;
    }
  }
  copy_wait<0>();
  __syncwarp();
}

}  // namespace vllm_sparse::cuda
