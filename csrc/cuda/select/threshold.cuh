// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// Which tokens a (row, KV head) keeps, from the histograms of a cluster's thread blocks: so many,
// or as many as hold enough mass. In two steps, 32 bins at a time and then one, so that little of
// the others' shared memory is read.
#pragma once

#include "select/write_list.cuh"

namespace vllm_sparse::cuda {

constexpr int kFineBins = 32, kCoarseBins = kBins / kFineBins;

// Tokens of a thread block in 32 bins, and their mass: the sum of what their keys stand for.
struct Sums {
  uint32_t count;
  float mass;
};

constexpr int kSumsBytes = kCoarseBins * sizeof(Sums);  // of a thread block

// What a key of a bin stands for; forced tokens have no mass that could be left out.
__device__ inline float value_of(uint32_t bin) {
  const uint32_t middle = bin << kKeyShift | 1 << (kKeyShift - 1);
  return middle < kForced ? __half2float(__ushort_as_half(middle)) : 0;
}

// What to keep of the sealed blocks' tokens, forced ones included: from `least` to `most`, and in
// between as few as leave a mass of `room` or less. With least == most it is their number alone.
struct Target {
  uint32_t least, most;
  float room;
};

// `unit`: the mass of a query head's probabilities together.
__device__ inline Target target_of(const SelectArgs& p, const RowPlan& plan, float unit) {
  const int inside = plan.sinks + plan.sealed * kBlockSize - plan.recent;  // forced, and sealed
  const uint32_t most = inside + plan.wanted;
  if (p.top_p >= 1) return {most, most, 0};
  const int forced = plan.sinks + plan.length - plan.recent;
  const int least = inside + min(plan.wanted, max(0, p.min_tokens - forced));
  return {static_cast<uint32_t>(least), most, (1 - p.top_p) * unit};
}

// Tokens of bins: of the whole cluster, and of the thread blocks before this one.
struct Count {
  uint32_t all, before;
  float mass;
  __device__ void operator+=(const Count& x) { all += x.all, before += x.before, mass += x.mass; }
};

// The first of a warp's bins, lane 0 the highest, at which the target is reached; 32 if none.
// `seen` are those above the lane's bin, and are returned for that bin (if none, for the lowest).
// `enough`: mass to keep.
__device__ inline int find_bin(const Count& mine, const Target& target, float enough, Count& seen) {
  const int lane = threadIdx.x % 32;
  Count sum = mine;
  for (int i = 1; i < 32; i *= 2) {
    const Count x = {__shfl_up_sync(kFullMask, sum.all, i),
                     __shfl_up_sync(kFullMask, sum.before, i),
                     __shfl_up_sync(kFullMask, sum.mass, i)};
    if (lane >= i) sum += x;
  }
  const uint32_t n = seen.all + sum.all;
  const bool reaches = n >= target.most || (n >= target.least && seen.mass + sum.mass >= enough);
  const uint32_t reached = __ballot_sync(kFullMask, reaches);
  const int bin = reached ? __ffs(reached) - 1 : 32, last = min(bin, 31);
  const Count above = {sum.all - mine.all, sum.before - mine.before, sum.mass - mine.mass};
  seen += {__shfl_sync(kFullMask, above.all, last),
           __shfl_sync(kFullMask, above.before, last),
           __shfl_sync(kFullMask, above.mass, last)};
  return bin;
}

// Sums of 32 bins each into every thread block's sums[rank], before the cluster meets.
template <int kThreads>
__device__ void send_sums(
    const uint32_t* histogram, Sums (*sums)[kCoarseBins], bool with_mass, int rank, int C) {
  constexpr int kEach = kBins / kThreads, kLanes = kFineBins / kEach;
  const uint4* from = reinterpret_cast<const uint4*>(histogram + threadIdx.x * kEach);
  Sums sum = {};
#pragma unroll
  for (int i = 0; i < kEach / 4; ++i) {
    const uint4 x = from[i];
    sum.count += x.x + x.y + x.z + x.w;
    if (with_mass) {
      const uint32_t bin = threadIdx.x * kEach + 4 * i;
      sum.mass += x.x * value_of(bin) + x.y * value_of(bin + 1);
      sum.mass += x.z * value_of(bin + 2) + x.w * value_of(bin + 3);
    }
  }
#pragma unroll
  for (int i = 1; i < kLanes; i *= 2) {
    sum.count += __shfl_xor_sync(kFullMask, sum.count, i);
    sum.mass += __shfl_xor_sync(kFullMask, sum.mass, i);
  }
  Sums* to = &sums[rank][threadIdx.x / kLanes];
#pragma unroll 1
  for (int r = threadIdx.x % kLanes; r < C; r += kLanes) *cluster_at(to, r, C) = sum;
}

// After the cluster has met. All of its threads find the same.
template <int kThreads>
__device__ Threshold cluster_threshold(const uint32_t* histogram,
                                       const Sums (*sums)[kCoarseBins],
                                       const Target& target,
                                       int rank,
                                       int C) {
  constexpr int kWarps = kThreads / 32;
  __shared__ uint2 fine_of[kWarps][kFineBins];  // (all, before)
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (target.most == 0) return {kNothing, 0, 0, 0, 0};
  // Every warp looks for itself. A lane has two coarse bins, from the top.
  Count pair[2] = {};
#pragma unroll 2
  for (int r = 0; r < C; ++r) {
    const uint4 x = reinterpret_cast<const uint4*>(sums[r])[kCoarseBins / 2 - 1 - lane];
    pair[0] += {x.z, r < rank ? x.z : 0, __uint_as_float(x.w)};
    pair[1] += {x.x, r < rank ? x.x : 0, __uint_as_float(x.y)};
  }
  static_assert(kCoarseBins == 64);
  const float enough = warp_sum(pair[0].mass + pair[1].mass) - target.room;
  Count seen = {}, both = pair[0];
  both += pair[1];
  const int found = find_bin(both, target, enough, seen);
  if (found == 32) return {kNothing, 0, 0, 0, 0};  // there are not that many
  const Count upper = {__shfl_sync(kFullMask, pair[0].all, found),
                       __shfl_sync(kFullMask, pair[0].before, found),
                       __shfl_sync(kFullMask, pair[0].mass, found)};
  int group = kCoarseBins - 1 - 2 * found;
  const uint32_t n = seen.all + upper.all;
  if (n < target.most && (n < target.least || seen.mass + upper.mass < enough)) {
    seen += upper;
    --group;
  }
  uint2 part = {};
#pragma unroll 1
  for (int r = warp; r < C; r += kWarps) {
    const uint32_t x = *cluster_at(histogram + group * kFineBins + lane, r, C);
    part.x += x;
    part.y += r < rank ? x : 0;
  }
  fine_of[warp][lane] = part;
  __syncthreads();
  Count mine = {};
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    const uint2 x = fine_of[w][kFineBins - 1 - lane];
    mine += {x.x, x.y, 0};
  }
  mine.mass = mine.all * value_of(group * kFineBins + kFineBins - 1 - lane);
  // Sums in another order may round to a little less: then it is the lowest bin.
  const int last = min(find_bin(mine, target, enough, seen), 31);
  const uint32_t bin = group * kFineBins + kFineBins - 1 - last;
  if (bin > kForced >> kKeyShift) return {kNothing, 0, 0, 0, 0};
  // Of the bin's tokens as many as are needed.
  const int in_bin = __shfl_sync(kFullMask, mine.all, last);
  const float value = value_of(bin);
  const float more = value > 0 ? ceilf(__fdividef(enough - seen.mass, value)) : 0;
  const int above = seen.all;
  int need = static_cast<int>(fminf(fmaxf(more, 0.0f), in_bin));
  need =
      min(max(need, static_cast<int>(target.least) - above), static_cast<int>(target.most) - above);
  return {bin,
          static_cast<uint32_t>(need),
          seen.before,
          __shfl_sync(kFullMask, mine.before, last),
          static_cast<uint32_t>(above + need)};
}

}  // namespace vllm_sparse::cuda
