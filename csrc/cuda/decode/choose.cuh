// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// The decode kernel's first half: from a (row, KV head) to its list of tokens.
#pragma once

#include "decode/shared.cuh"
#include "select/channels.cuh"
#include "select/score_blocks.cuh"
#include "select/threshold.cuh"

namespace vllm_sparse::cuda {

// Scores of this thread block's blocks, and the heads' largest logits after them: in shared memory,
// the last ones in global memory when there are too many. Keys replace a block's first scores, or
// go where the ring was.
struct Scores {
  uint8_t *shared, *global, *ring;
  int held, in_ring;  // blocks in shared memory; keys of the next ones that the ring has room for
  int bytes, pairs;   // of a block
  __device__ uint8_t* at(int block) const {
    return (block < held ? shared : global) + int64_t{block} * bytes;
  }
  __device__ float* tops(int block) const {
    return reinterpret_cast<float*>(at(block) + pairs * kPairBytes);
  }
  __device__ uint16_t* of(int block) const {
    uint8_t* keys = static_cast<uint32_t>(block - held) < static_cast<uint32_t>(in_ring)
                        ? ring + (block - held) * kBlockSize * 2
                        : at(block);
    return reinterpret_cast<uint16_t*>(keys);
  }
};

constexpr int kHistogramBytes = kBins * 4;  // in the ring's place once all is scored, before keys

// A lane's running (top, sum) of two heads; lanes differ in blocks and heads.
struct RunningSum {
  float4 s = {-INFINITY, 0, -INFINITY, 0};
  __device__ void add(const float4& x) {
    const float2 top = {fmaxf(s.x, x.x), fmaxf(s.z, x.z)};
    s.y = s.y * fast_exp2(s.x - top.x) + x.y * fast_exp2(x.x - top.x);
    s.w = s.w * fast_exp2(s.z - top.y) + x.w * fast_exp2(x.z - top.y);
    s.x = top.x;
    s.z = top.y;
  }
};

template <class T, bool kFast, int kGroups>
__device__ void score_part(const DecodeArgs& p,
                           const RowPlan& plan,
                           const PreparedItem& prepared,
                           const int32_t* table,
                           int head,
                           const int& C,
                           const Part& part,
                           uint32_t ring,
                           const Scores& scores,
                           Shared& shared) {
  constexpr int kQuads = kFast ? 1 : 2;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int pairs = (part.count + 1) / 2;
  const WarpBlocks blocks = {part.first + 2 * warp,
                             2 * kWarps,
                             (pairs - warp + kWarps - 1) / kWarps,
                             part.first + part.count - 1};
  if (lane < kMaxHeads) {
    shared.select.stats[warp][lane] = shared.select.stats[kWarps + warp][lane] = {-INFINITY, 0};
  }
  __syncwarp();
  const auto tail = [&]() {
    // Groups go to the thread blocks and warps that have least to score.
    const int group = (kWarps - 1 - warp) * C + C - 1 - rank_of(C);
    if (plan.sealed * kBlockSize + group * kTailTokens < plan.length) {
      score_tail<T, kGroups != 0, kGroups != 0>(
          p, prepared, table, head, plan.length, group, shared.select.stats[kWarps + warp]);
    }
  };
  RunningSum running[kQuads];
  const auto emit = [&](int block, int pair, const uint32_t (&words)[8], const float4& stats) {
    uint4* to =
        reinterpret_cast<uint4*>(scores.at(block - part.first) + pair * kPairBytes) + lane / 4 * 2;
    to[0] = make_uint4(words[0], words[1], words[2], words[3]);
    to[1] = make_uint4(words[4], words[5], words[6], words[7]);
    if (lane < 4) {
      reinterpret_cast<float2*>(scores.tops(block - part.first))[pair] = {stats.x, stats.z};
    }
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      if (kQuads == 1 || pair / 2 == i) running[i].add(stats);
    }
  };
  score_blocks<kFast, false, kSlots, kGroups>(p, prepared, table, head, blocks, ring, tail, emit);
#pragma unroll
  for (int i = 0; i < kQuads; ++i) {
    float4& s = running[i].s;
    const float4 other = {__shfl_xor_sync(kFullMask, s.x, 2),
                          __shfl_xor_sync(kFullMask, s.y, 2),
                          __shfl_xor_sync(kFullMask, s.z, 2),
                          __shfl_xor_sync(kFullMask, s.w, 2)};
    if (other.y > 0 || other.w > 0) running[i].add(other);
    if (lane < 2) {
      const int h = 4 * i + 2 * lane;
      if (s.y > 0) shared.select.stats[warp][h] = {s.x, s.y};
      if (s.w > 0) shared.select.stats[warp][h + 1] = {s.z, s.w};
    }
  }
}

// (top, sum) of the lanes' entries together; entries of sum 0 say nothing.
__device__ inline float2 combine(float2 x) {
  const float top = warp_max(x.y > 0 ? x.x : -INFINITY);
  return {top, warp_sum(x.y > 0 ? x.y * fast_exp2(x.x - top) : 0.0f)};
}

// What weighs a head's probabilities before they are pooled: a lane has head lane % 8. The shift is
// such that pooled probabilities have a largest value near 2^14 and never reach fp16's end; `unit`
// is what a head's are together then. The cluster meets.
__device__ inline float log_weight(
    const DecodeArgs& p, int rank, int C, Shared& shared, float& unit) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const float2 mine =
      combine(lane < 2 * kWarps ? shared.select.stats[lane][warp] : float2{-INFINITY, 0});
  cluster_wait(C);  // all have begun
  if (lane < C) *cluster_at(&shared.select.totals[rank][warp], lane, C) = mine;
  cluster_sync(C);
  const int head = lane % kMaxHeads;
  constexpr int kParts = 32 / kMaxHeads;
  float top = -INFINITY, sum = 0;
#pragma unroll 1
  for (int r = lane / kMaxHeads; r < C; r += kParts) {
    const float2 x = shared.select.totals[r][head];
    top = fmaxf(top, x.y > 0 ? x.x : -INFINITY);
  }
  for (int i = kMaxHeads; i < 32; i *= 2) top = fmaxf(top, __shfl_xor_sync(kFullMask, top, i));
#pragma unroll 1
  for (int r = lane / kMaxHeads; r < C; r += kParts) {
    const float2 x = shared.select.totals[r][head];
    sum += x.y > 0 ? x.y * fast_exp2(x.x - top) : 0;
  }
  for (int i = kMaxHeads; i < 32; i *= 2) sum += __shfl_xor_sync(kFullMask, sum, i);
  float peaks = head < p.group ? __fdividef(1, sum) : 0;
  for (int i = 1; i < kMaxHeads; i *= 2) peaks += __shfl_xor_sync(kFullMask, peaks, i);
  unit = __fdividef(1 << 14, peaks);
  return 14 - fast_log2(peaks) - (top + fast_log2(sum));
}

// Pooled probabilities of this thread block's blocks as keys, and how many tokens have which.
template <int kPairs>
__device__ void pool_part(const DecodeArgs& p,
                          const RowPlan& plan,
                          const Part& part,
                          const Scores& scores,
                          float log_weight,
                          uint32_t* histogram) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, place = lane % 16;
  const int last = part.count - 1;
  // Half a warp takes a block. The next block's scores are under way.
  uint4 next[kPairs] = {};
  float next_top = 0;
  const auto load = [&](int block) {
    if (block > last) return;
    const uint4* from = reinterpret_cast<const uint4*>(scores.at(block)) + place;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      if (i < p.pairs) next[i] = from[i * (kPairBytes / 16)];
    }
    if (place < p.group) next_top = scores.tops(block)[place];
  };
  load(2 * warp + lane / 16);
#pragma unroll 1
  for (int base = 2 * warp; base < part.count; base += 2 * kWarps) {
    const int b = base + lane / 16;
    const float weight = place < p.group ? fast_exp2(next_top + log_weight) : 0.0f;
    const uint32_t both = as_word(weight_of(weight));
    uint4 words[kPairs];
#pragma unroll
    for (int i = 0; i < kPairs; ++i) words[i] = next[i];
    load(b + 2 * kWarps);
    Pooled pooled;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      if (i >= p.pairs) break;
      pooled.add(words[i],
                 as_half2(__shfl_sync(kFullMask, both, lane / 16 * 16 + 2 * i)),
                 as_half2(__shfl_sync(kFullMask, both, lane / 16 * 16 + 2 * i + 1)));
    }
    if (b <= last) {
      pooled.store(plan, (part.first + b) * kBlockSize, scores.of(b), histogram);
    }
  }
}

// What comes before attention: the item's list of tokens and how many there are. kGroups: see
// score_blocks.
template <class T, bool kFast, int kGroups>
__device__ int list_tokens(const DecodeArgs& p,
                           const RowPlan& plan,
                           int64_t item,
                           int head,
                           const int& C,
                           const T* query,
                           const int32_t* table,
                           uint8_t* dynamic,
                           Shared& shared) {
  const PreparedItem prepared(p, shared.select.channel, shared.select.query);
  choose_channels<T, kThreads, kMaxSize>(p, query, prepared);
  const Part part = share_of(plan.sealed, rank_of(C), C);
  const int bytes = score_bytes(p.pairs);
  // Of the cluster's thread blocks; others write it.
  auto* sums = reinterpret_cast<Sums(*)[kCoarseBins]>(dynamic + kRing);
  const Scores scores = {dynamic + kRing + p.cluster * kSumsBytes,
                         p.scores + (item * p.max_blocks + part.first) * bytes,
                         dynamic + kHistogramBytes,
                         p.held_blocks,
                         (kRing - kHistogramBytes) / (2 * kBlockSize),
                         bytes,
                         p.pairs};
  const uint32_t ring = shared_address(dynamic) + threadIdx.x / 32 * kSlots * kSlotBytes;
  score_part<T, kFast, kGroups>(p, plan, prepared, table, head, C, part, ring, scores, shared);
  __syncthreads();
  uint32_t* histogram = reinterpret_cast<uint32_t*>(dynamic);
#pragma unroll
  for (int i = 0; i < kBins / kThreads / 4; ++i) {
    reinterpret_cast<uint4*>(histogram)[threadIdx.x + i * kThreads] = {};
  }
  float unit;
  const float weight = log_weight(p, rank_of(C), C, shared, unit);
  pool_part<kFast ? 2 : kMaxPairs>(p, plan, part, scores, weight, histogram);
  __syncthreads();
  send_sums<kThreads>(histogram, sums, p.top_p < 1, rank_of(C), C);
  cluster_sync(C);
  const int tail = plan.length - plan.sealed * kBlockSize;
  const Target target = target_of(p, plan, unit);
  const Threshold threshold = cluster_threshold<kThreads>(histogram, sums, target, rank_of(C), C);
  const int64_t listed = threshold.listed;
  int32_t* out = p.indices + item * p.max_kept;
  write_list<kWarps>(threshold, scores, part.first, part.count, out, p.max_kept);
  if (rank_of(C) == C - 1 && threadIdx.x < tail && listed + threadIdx.x < p.max_kept) {
    out[listed + threadIdx.x] = plan.sealed * kBlockSize + threadIdx.x;
  }
  return static_cast<int>(min(listed + tail, p.max_kept));
}

}  // namespace vllm_sparse::cuda
