// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// Scores of all sealed blocks, ahead of selection.
// Warps of a fixed grid take equal shares of the blocks of all rows, two at a time.
#include "common/launch.cuh"
#include "select/score_blocks.cuh"

namespace vllm_sparse::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kSlots = 3;  // steps of a warp under way

// Work of one item: pairs of sealed blocks, then groups of the tokens after them.
__device__ inline int pairs_of(const RowPlan& plan) { return (plan.sealed + 1) / 2; }
__device__ inline int units_of(const RowPlan& plan) {
  const int tail = plan.length - plan.sealed * kBlockSize;
  return pairs_of(plan) + (tail + kTailTokens - 1) / kTailTokens;
}

struct Share {
  int row, unit;  // where it begins, among the units of a row's KV heads
  int count;
};

// Units of a row that needs scores, 0 of others.
__device__ inline int row_units(const SelectArgs& p, int row) {
  const RowPlan plan = plan_row(p, row);
  return plan.all ? 0 : units_of(plan) * p.cache.num_kv_heads;
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
template <bool kFast, bool kCap, int kGroups>
__device__ void score_item(const SelectArgs& p,
                           uint32_t ring,
                           int row,
                           int head,
                           const RowPlan& plan,
                           int first_unit,
                           int count) {
  const int lane = threadIdx.x % 32, length = plan.length, sealed = plan.sealed;
  const int64_t item = int64_t{row} * p.cache.num_kv_heads + head;
  const PreparedItem prepared(p, item);
  const int32_t* table = p.table(row);
  const int64_t stat_row = item * (p.max_blocks + kBlockSize / kTailTokens);
  const int pairs = max(0, min(count, pairs_of(plan) - first_unit));
  const auto tail = [&]() {
    for (int unit = first_unit + pairs; unit < first_unit + count; ++unit) {
      const int group = unit - pairs_of(plan);
      float2* stats = p.stats + (stat_row + sealed + group) * 2 * p.pairs;
      if (p.cache.dtype == Dtype::kHalf) {
        score_tail<__half, kGroups != 0>(p, prepared, table, head, length, group, stats);
      } else {
        score_tail<__nv_bfloat16, kGroups != 0>(p, prepared, table, head, length, group, stats);
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
  score_blocks<kFast, kCap, kSlots, kGroups>(
      p, prepared, table, head, {2 * first_unit, 2, pairs, sealed - 1}, ring, tail, emit);
}

// Thread blocks of a multiprocessor: products of groups take more registers.
__host__ __device__ constexpr int resident(int groups) { return groups == 4 ? 1 : 2; }
__host__ __device__ constexpr int ring_bytes(int groups) {
  return kSlots * slot_bytes(groups == 4 ? 16 : 4);
}

template <bool kFast, bool kCap, int kGroups>
__global__ void __launch_bounds__(kThreads, resident(kGroups)) score_kernel(SelectArgs p) {
  extern __shared__ __align__(128) uint8_t dynamic[];
  const uint32_t ring = shared_address(dynamic) + threadIdx.x / 32 * ring_bytes(kGroups);
  let_next_begin();
  Share share = find_share(p);
  wait_for_previous();
  while (share.count > 0) {
    const RowPlan plan = plan_row(p, share.row);
    const int units = plan.all ? 0 : units_of(plan);
    if (units > 0) {
      const int head = share.unit / units, first = share.unit - head * units;
      const int count = min(share.count, units - first);
      score_item<kFast, kCap, kGroups>(p, ring, share.row, head, plan, first, count);
      share.count -= count;
      share.unit += count;
    }
    if (share.unit == units * p.cache.num_kv_heads) {
      ++share.row;
      share.unit = 0;
    }
  }
}

template <int kGroups>
void launch_groups(const Device& device, const SelectArgs& p) {
  const bool fast = p.rank <= kStepChannels && p.group <= 4;
  const auto kernel =
      p.soft_cap > 0 ? fast ? score_kernel<true, true, kGroups> : score_kernel<false, true, kGroups>
      : fast         ? score_kernel<true, false, kGroups>
                     : score_kernel<false, false, kGroups>;
  const dim3 grid(resident(kGroups) * device.num_sms);
  launch(device, kernel, 1, grid, kThreads, kWarps * ring_bytes(kGroups), p, true);
}

}  // namespace

void launch_score(const Device& device, const SelectArgs& p) {
  if (!p.cache.quantised()) return launch_groups<0>(device, p);
  p.cache.key_groups == 4 ? launch_groups<4>(device, p) : launch_groups<1>(device, p);
}

}  // namespace vllm_sparse::cuda
