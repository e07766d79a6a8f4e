// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// SparQ's approximate logits (arXiv 2312.04985, section 3) of all sealed blocks from 4-bit codes.
// Warps of a fixed grid take equal shares of the blocks of all rows, two at a time.
#include "products.cuh"

namespace vllm_sparse::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kSlots = 3;  // steps of a warp under way

// Work of one item: pairs of sealed blocks, then groups of the tokens after them.
__device__ inline int pairs_of(int length) { return (length / kBlockSize + 1) / 2; }
__device__ inline int units_of(int length) {
  return pairs_of(length) + (length % kBlockSize + kTailTokens - 1) / kTailTokens;
}

struct Share {
  int row, unit;  // where it begins, among the units of a row's KV heads
  int count;
};

// Units of a row that needs scores, 0 of others.
__device__ inline int row_units(const SelectArgs& p, int row) {
  const RowPlan plan = plan_row(p, row);
  return plan.all ? 0 : units_of(plan.length) * p.cache.num_kv_heads;
}

// The warp's equal part of all units.
__device__ Share find_share(const SelectArgs& p) {
  const int rows = static_cast<int>(p.num_rows), lane = threadIdx.x % 32;
  int total = 0;
#pragma unroll 4
  for (int row = lane; row < rows; row += 32) total += row_units(p, row);
  total = __reduce_add_sync(kFullMask, total);
  // Few units are spread over all multiprocessors.
  const int warps = gridDim.x * kWarps, warp = threadIdx.x / 32 * gridDim.x + blockIdx.x;
  const int each = total / warps, more = total - each * warps;
  const int begin = each * warp + min(warp, more), count = each + (warp < more);
  int before = 0;
  for (int first = 0; count > 0; first += 32) {
    const int units = first + lane < rows ? row_units(p, first + lane) : 0;
    int end = units;
    for (int i = 1; i < 32; i *= 2) {
      const int y = __shfl_up_sync(kFullMask, end, i);
      if (lane >= i) end += y;
    }
    const uint32_t beyond = __ballot_sync(kFullMask, before + end > begin);
    if (beyond) {
      const int found = __ffs(beyond) - 1;
      const int start = before + __shfl_sync(kFullMask, end - units, found);
      return {first + found, begin - start, count};
    }
    before += __shfl_sync(kFullMask, end, 31);
  }
  return {0, 0, 0};
}

// Brings codes and parameters of a step of two blocks into a slot: half a warp a block. With kFast,
// there is one step and the channels' places are kept in registers.
template <bool kFast>
struct Loader {
  const int* channel;
  int rank;
  uint32_t params_offset;
  uint32_t code[kFast ? 8 : 1], param[kFast ? 2 : 1];  // bytes from the codes' start, by copy
  uint32_t to_code, to_param;

  __device__ uint32_t code_of(int first, int copy) const {
    return channel[first + 4 * copy + threadIdx.x % 16 / 4] * kCodeBytes + threadIdx.x % 4 * 16;
  }
  __device__ uint32_t param_of(int first, int copy) const {
    return params_offset + channel[first + 16 * copy + threadIdx.x % 16] * 4;
  }
  __device__ Loader(const SelectArgs& p, const int* channels) : channel(channels), rank(p.rank) {
    const int block = threadIdx.x % 32 / 16, r = threadIdx.x % 16;
    params_offset = p.cache.head_size * kCodeBytes;
    to_code = block * kCodesOfStep + r / 4 * kCodeBytes + (r % 4 ^ r / 8) * 16;
    to_param = 2 * kCodesOfStep + (block * kStepChannels + r) * 4;
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
      const int bytes = static_cast<int>(threadIdx.x) % 16 + 16 * i < rank - first ? 4 : 0;
      copy_async_4(
          slot + to_param + i * 64, codes + (kFast ? param[i] : param_of(first, i)), bytes);
    }
  }
};

// (top, sum) of a group of tokens that are not sealed, from exact keys: two lanes a token.
template <class T>
__device__ void score_tail(const SelectArgs& p,
                           const PreparedItem& item,
                           const uint8_t* chunk,
                           int first_token,
                           int count,
                           float2* stats) {
  const int lane = threadIdx.x % 32, t = lane / 2, part = lane % 2;
  const T* key = reinterpret_cast<const T*>(chunk) +
                 int64_t{first_token + min(t, count - 1)} * 2 * p.cache.head_size;
  for (int first = 0; first < 2 * p.pairs; first += 4) {
    float x[4] = {};
#pragma unroll 8
    for (int c = 2 * part; c < p.rank; c += 4) {
      const int2 channel = *reinterpret_cast<const int2*>(item.channel + c);
      const float k0 = to_float(key[channel.x]), k1 = to_float(key[channel.y]);
#pragma unroll
      for (int h = 0; h < 4; ++h) {
        const float2 q = __half22float2(
            *reinterpret_cast<const __half2*>(item.query + (first + h) * item.padded_rank + c));
        x[h] = fmaf(q.x, k0, fmaf(q.y, k1, x[h]));
      }
    }
#pragma unroll
    for (int h = 0; h < 4; ++h) {
      x[h] = (x[h] + __shfl_xor_sync(kFullMask, x[h], 1)) / (1 << kQueryShift);
      if (p.soft_cap > 0) x[h] = cap_logit(x[h], p.soft_cap);
      if (t >= count) x[h] = -INFINITY;
      float top = x[h];
#pragma unroll
      for (int i = 2; i < 32; i *= 2) top = fmaxf(top, __shfl_xor_sync(kFullMask, top, i));
      float sum = fast_exp2(x[h] - top);
#pragma unroll
      for (int i = 2; i < 32; i *= 2) sum += __shfl_xor_sync(kFullMask, sum, i);
      if (lane == 0 && first + h < 2 * p.pairs) stats[first + h] = {top, sum};
    }
  }
}

// Units [first_unit, first_unit + count) of one item.
template <bool kFast, bool kCap>
__device__ void score_item(
    const SelectArgs& p, uint32_t ring, int row, int head, int length, int first_unit, int count) {
  const int lane = threadIdx.x % 32, sealed = length / kBlockSize;
  const int64_t item = int64_t{row} * p.cache.num_kv_heads + head;
  const PreparedItem prepared(p, item);
  const int32_t* table = p.block_table + row * p.block_table_stride;
  const int64_t stat_row = item * (p.max_blocks + kBlockSize / kTailTokens);
  const int pairs = max(0, min(count, pairs_of(length) - first_unit));
  // Blocks of the lane's half; the pair after the next one is looked up.
  const int last_block = sealed - 1;
  int looked_up = min(2 * first_unit + lane / 16, last_block);
  const auto look_up = [&]() {
    const int32_t id = table[looked_up];
    looked_up = min(looked_up + 2, last_block);
    return id;
  };
  int32_t id = look_up(), next_id = look_up();
  const uint8_t* base = p.cache.data + head * p.cache.head_stride +
                        int64_t{kBlockSize} * 2 * p.cache.head_size * p.cache.element_size;
  const uint32_t num_blocks = static_cast<uint32_t>(p.cache.num_blocks);
  // A pair takes `parts` passes of the ring: steps of channels, again for every four heads.
  const int steps = kFast ? 1 : prepared.padded_rank / kStepChannels;
  const int parts = kFast ? 1 : steps * (prepared.padded_group / 4);
  const int total = pairs * parts;
  const Loader<kFast> loader(p, prepared.channel);
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
  const uint32_t ring_end = ring + kSlots * kSlotBytes;
  const auto issue = [&]() {
    if (issued_pair < pairs) {
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
    issue_slot = issue_slot + kSlotBytes == ring_end ? ring : issue_slot + kSlotBytes;
  };
#pragma unroll 1
  for (int i = 0; i < kSlots - 1; ++i) issue();

  for (int unit = first_unit + pairs; unit < first_unit + count; ++unit) {
    const int group = unit - pairs_of(length), from = group * kTailTokens;
    const int tokens = min(kTailTokens, length % kBlockSize - from);
    const uint8_t* chunk = chunk_of(p.cache, safe_block(p.cache, table[sealed]), head);
    float2* stats = p.stats + (stat_row + sealed + group) * 2 * p.pairs;
    switch (p.cache.dtype) {
      case Dtype::kHalf: score_tail<__half>(p, prepared, chunk, from, tokens, stats); break;
      case Dtype::kBFloat16:
        score_tail<__nv_bfloat16>(p, prepared, chunk, from, tokens, stats);
        break;
      default: score_tail<float>(p, prepared, chunk, from, tokens, stats);
    }
  }

  Products products;
  int pair = 0, part = 0;
  for (int i = 0; i < total; ++i) {
    copy_wait<kSlots - 2>();
    __syncwarp();
    issue();
    const int step = kFast ? 0 : part % steps, first_head = kFast ? 0 : part / steps * 4;
    if (step == 0) products.clear();
    if (!kFast) load_query(first_head, step);
    products.template add<kFast>(slot, query);
    slot = slot + kSlotBytes == ring_end ? ring : slot + kSlotBytes;
    if (step == steps - 1) {
      uint32_t words[8];
      const float4 stats = products.template finish<kFast, kCap>(p.soft_cap, words);
      const int block = 2 * (first_unit + pair) + lane % 4 / 2;
      const int pair_of_heads = first_head / 2 + lane % 2;
      if (block < sealed && pair_of_heads < p.pairs) {
        const int64_t at = (item * p.max_blocks + block) * p.pairs + pair_of_heads;
        uint4* to = reinterpret_cast<uint4*>(p.scores + at * kPairBytes) + lane / 4 * 2;
        to[0] = make_uint4(words[0], words[1], words[2], words[3]);
        to[1] = make_uint4(words[4], words[5], words[6], words[7]);
        if (lane < 4) {
          reinterpret_cast<float4*>(p.stats)[(stat_row + block) * p.pairs + pair_of_heads] = stats;
        }
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

template <bool kFast, bool kCap>
__global__ void __launch_bounds__(kThreads, 2) score_kernel(SelectArgs p) {
  extern __shared__ __align__(128) uint8_t dynamic[];
  const uint32_t ring = shared_address(dynamic) + threadIdx.x / 32 * kSlots * kSlotBytes;
  let_next_begin();
  Share share = find_share(p);
  wait_for_previous();
  while (share.count > 0) {
    const RowPlan plan = plan_row(p, share.row);
    const int units = plan.all ? 0 : units_of(plan.length);
    if (units > 0) {
      const int head = share.unit / units, first = share.unit - head * units;
      const int count = min(share.count, units - first);
      score_item<kFast, kCap>(p, ring, share.row, head, plan.length, first, count);
      share.count -= count;
      share.unit += count;
    }
    if (share.unit == units * p.cache.num_kv_heads) {
      ++share.row;
      share.unit = 0;
    }
  }
}

}  // namespace

void launch_score(const Device& device, const SelectArgs& p) {
  const bool fast = p.rank <= kStepChannels && p.group <= 4;
  const auto kernel = p.soft_cap > 0 ? fast ? score_kernel<true, true> : score_kernel<false, true>
                      : fast         ? score_kernel<true, false>
                                     : score_kernel<false, false>;
  const dim3 grid(2 * device.num_sms);
  launch(device, kernel, 1, grid, kThreads, kWarps * kSlots * kSlotBytes, p, true);
}

}  // namespace vllm_sparse::cuda
