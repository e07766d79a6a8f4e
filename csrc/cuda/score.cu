// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// Scores of all sealed blocks, ahead of selection.
// Warps of a fixed grid take equal shares of the blocks of all rows, two at a time.
#include "score.cuh"

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
    const int end = warp_scan(units);
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
  const auto tail = [&]() {
    for (int unit = first_unit + pairs; unit < first_unit + count; ++unit) {
      const int group = unit - pairs_of(length);
      float2* stats = p.stats + (stat_row + sealed + group) * 2 * p.pairs;
      switch (p.cache.dtype) {
        case Dtype::kHalf:
          score_tail<__half>(p, prepared, table, head, length, group, stats);
          break;
        case Dtype::kBFloat16:
          score_tail<__nv_bfloat16>(p, prepared, table, head, length, group, stats);
          break;
        default: score_tail<float>(p, prepared, table, head, length, group, stats);
      }
    }
  };
  const auto emit = [&](int block, int pair, const uint32_t (&words)[8], const float4& stats) {
    const int64_t at = (item * p.max_blocks + block) * p.pairs + pair;
    uint4* to = reinterpret_cast<uint4*>(p.scores + at * kPairBytes) + lane / 4 * 2;
    to[0] = make_uint4(words[0], words[1], words[2], words[3]);
    to[1] = make_uint4(words[4], words[5], words[6], words[7]);
    if (lane < 4) {
      reinterpret_cast<float4*>(p.stats)[(stat_row + block) * p.pairs + pair] = stats;
    }
  };
  score_blocks<kFast, kCap, kSlots>(
      p, prepared, table, head, {2 * first_unit, 2, pairs, sealed - 1}, ring, tail, emit);
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
