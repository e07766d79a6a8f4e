// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// SparQ's choice (arXiv 2312.04985, section 3) from scored blocks. A cluster of thread blocks
// serves one (row, KV head): it pools probabilities over the query heads, finds the threshold that
// enough tokens reach from a histogram, and writes the list in order.
#include "scores.cuh"

namespace vllm_sparse::cuda {

namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kBins = 2048;
constexpr int kKeyShift = 4;              // from a key to its bin
constexpr uint32_t kForced = 0x7c00;      // key of a token that is kept in any case: infinity
constexpr uint32_t kNothing = 0x7c1;      // a bin above all keys
constexpr int kStaticShared = 12 * 1024;  // what the kernel declares, and 1 KiB of the system's

// Keys of a thread block's blocks; a block's tokens stand in the scores' order. Shared or global.
struct Keys {
  uint16_t* data;
  __device__ uint4* words(int block) const {
    return reinterpret_cast<uint4*>(data + int64_t{block} * kBlockSize);
  }
  __device__ uint32_t at(int block, int token) const {
    return data[int64_t{block} * kBlockSize + stored_at(token)];
  }
};

// The largest of a warp's numbers: integers that sort like them are reduced by one instruction.
__device__ inline float warp_max(float x) {
  const int bits = __float_as_int(x), sign = bits >> 31 & 0x7fffffff;
  const int top = __reduce_max_sync(kFullMask, bits ^ sign);
  return __int_as_float(top ^ (top >> 31 & 0x7fffffff));
}

// log2 of every head's normaliser into lse[2 * pairs]; also `shift`, such that pooled
// probabilities times 2^shift have a largest value near 2^14 and never reach fp16's end.
__device__ void find_normalisers(
    const SelectArgs& p, const float2* stats, int entries, float* lse, float* shift) {
  __shared__ float4 partial[kWarps];
  constexpr int kHeld = 4;  // entries of a lane at once
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float peaks = 0;  // largest probabilities of all heads
  for (int first = 0; first < p.pairs; first += kWarps) {
    // Warps share the pairs of heads; several warps a pair if there are enough.
    const int here = min(kWarps, p.pairs - first), sharers = kWarps / here;
    const int pair = first + warp % here, part = warp / here;
    const float4* from = reinterpret_cast<const float4*>(stats) + pair;
    float2 top = {-INFINITY, -INFINITY}, sum = {0, 0};
    const int step = sharers * 32;
    for (int base = part * 32; part < sharers && base < entries; base += kHeld * step) {
      float4 x[kHeld];
      float2 peak = top;
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        const int at = base + i * step + lane;
        x[i] = at < entries ? __ldcg(from + int64_t{at} * p.pairs)
                            : make_float4(-INFINITY, 0, -INFINITY, 0);
      }
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        peak.x = fmaxf(peak.x, x[i].x);
        peak.y = fmaxf(peak.y, x[i].z);
      }
      peak.x = warp_max(peak.x);
      peak.y = warp_max(peak.y);
      sum.x *= fast_exp2(top.x - peak.x);
      sum.y *= fast_exp2(top.y - peak.y);
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        sum.x += x[i].y * fast_exp2(x[i].x - peak.x);
        sum.y += x[i].w * fast_exp2(x[i].z - peak.y);
      }
      top = peak;
    }
    sum.x = warp_sum(sum.x);
    sum.y = warp_sum(sum.y);
    if (lane == 0) partial[warp] = make_float4(top.x, sum.x, top.y, sum.y);
    __syncthreads();
    if (warp == 0) {
      float peak = -INFINITY, all = 0;
      const int head = 2 * first + lane;
      if (lane < 2 * here) {
        for (int w = lane / 2; w < sharers * here; w += here) {
          peak = fmaxf(peak, lane % 2 ? partial[w].z : partial[w].x);
        }
        for (int w = lane / 2; w < sharers * here; w += here) {
          const float4 s = partial[w];
          // A warp without entries has a sum of 0.
          const float t = lane % 2 ? s.z : s.x, y = lane % 2 ? s.w : s.y;
          all += y > 0 ? y * fast_exp2(t - peak) : 0;
        }
        lse[head] = peak + log2f(all);
      }
      peaks += warp_sum(lane < 2 * here && head < p.group ? 1 / all : 0);
      if (lane == 0) *shift = 14 - log2f(peaks);
    }
    __syncthreads();
  }
}

// Pooled probabilities of this thread block's blocks as keys, and how many tokens have which.
template <int kPairs>
__device__ void pool(const SelectArgs& p,
                     const RowPlan& plan,
                     const float2* stats,
                     int entries,
                     const uint8_t* scores,
                     int first,
                     int count,
                     float* lse,
                     float* shift,
                     const Keys& keys,
                     uint32_t* histogram) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, part = lane % 16;
  const int pairs = kPairs ? kPairs : p.pairs;
  stats += int64_t{first} * 2 * pairs;
  scores += int64_t{first} * pairs * kPairBytes;
  // Half a warp takes a block. The next block's scores are under way.
  constexpr int kHeld = kPairs ? kPairs : 1;
  uint4 next[kHeld] = {};
  float next_top = 0;
  const auto score = [&](int b, int pair) {
    const uint8_t* from = scores + (int64_t{b} * pairs + pair) * kPairBytes;
    return __ldcg(reinterpret_cast<const uint4*>(from) + part);
  };
  const auto load = [&](int b) {
    if (b >= count) return;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) next[i] = score(b, i);
    if (part < 2 * pairs) next_top = __ldcg(&stats[int64_t{b} * 2 * pairs + part]).x;
  };
  int b = 2 * warp + lane / 16;
  load(b);
  find_normalisers(p, stats - int64_t{first} * 2 * pairs, entries, lse, shift);
  for (int base = 2 * warp; base < count; base += 2 * kWarps, b += 2 * kWarps) {
    uint4 words[kHeld];
#pragma unroll
    for (int i = 0; i < kHeld; ++i) words[i] = next[i];
    float top = next_top;
    load(b + 2 * kWarps);
    __half2 pooled[8];
#pragma unroll
    for (auto& x : pooled) x = __float2half2_rn(0);
#pragma unroll
    for (int i = 0; i < (kPairs ? kPairs : pairs); ++i) {
      if constexpr (kPairs == 0) {
        if (i > 0 && b < count) words[0] = score(b, i);
        if (i % 8 == 0 && i > 0 && part < 2 * (pairs - i) && b < count) {
          top = __ldcg(&stats[int64_t{b} * 2 * pairs + 2 * i + part]).x;
        }
      }
      // A lane of each half weighs a head: its share of the probability at the block's maximum.
      const int head = (i & ~7) * 2 + part;
      const float weight = head < p.group ? fast_exp2(top - lse[head] + *shift) : 0.0f;
      const uint32_t both = as_word(__float2half2_rn(fminf(weight, 65504.0f)));
      const __half2 w0 = as_half2(__shfl_sync(kFullMask, both, lane / 16 * 16 + i % 8 * 2));
      const __half2 w1 = as_half2(__shfl_sync(kFullMask, both, lane / 16 * 16 + i % 8 * 2 + 1));
      const uint4 w = words[kPairs ? i : 0];
      const uint32_t word[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        pooled[k] = __hfma2(first_head(word[k]), w0, pooled[k]);
        pooled[k + 4] = __hfma2(second_head(word[k]), w1, pooled[k + 4]);
      }
    }
    if (b >= count) continue;
    uint32_t key[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      // The smaller of NaN and a number is the number: keys are always ordered.
      key[k] = as_word(__hmin2(__hadd2(pooled[k], pooled[k + 4]), __float2half2_rn(65504.0f)));
    }
    const int position = (first + b) * kBlockSize;
    if (position < plan.sinks || position + kBlockSize > plan.recent) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int s = 8 * part + 2 * k;  // the halves' place, stored_at's inverse
        const int t = position + ((s & 31) << 2 | s >> 5);
        if (t < plan.sinks || t >= plan.recent) key[k] = (key[k] & 0xffff0000u) | kForced;
        if (t + 4 < plan.sinks || t + 4 >= plan.recent) key[k] = (key[k] & 0xffff) | kForced << 16;
      }
    }
    keys.words(b)[part] = make_uint4(key[0], key[1], key[2], key[3]);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      atomicAdd(&histogram[key[k] >> kKeyShift & (kBins - 1)], 1);
      atomicAdd(&histogram[key[k] >> (16 + kKeyShift)], 1);
    }
  }
}

// Tokens above bin `bin` are kept, and of those in it the first `need`.
struct Threshold {
  uint32_t bin, need;
  uint32_t above_before, equal_before;  // in the thread blocks before this one
};

// Every thread block looks through the sum of the cluster's histograms by itself.
__device__ Threshold find_threshold(uint32_t* histogram, uint32_t wanted, int rank, int C) {
  __shared__ uint32_t sums[kWarps][2];
  __shared__ Threshold found;
  static_assert(kBins == 4 * kThreads);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (threadIdx.x == 0) found = {kNothing, 0, 0, 0};
  cluster_sync(C);
  // Threads go from the top: the largest keys come first.
  const int group = kThreads - 1 - threadIdx.x;
  uint4 all = {}, before = {};
#pragma unroll 8
  for (int r = 0; r < C; ++r) {
    const uint4 h = reinterpret_cast<const uint4*>(cluster_at(histogram, r, C))[group];
    all = make_uint4(all.x + h.x, all.y + h.y, all.z + h.z, all.w + h.w);
    if (r < rank) {
      before = make_uint4(before.x + h.x, before.y + h.y, before.z + h.z, before.w + h.w);
    }
  }
  const uint32_t bins[4] = {all.w, all.z, all.y, all.x};
  const uint32_t earlier[4] = {before.w, before.z, before.y, before.x};
  const uint32_t sum = all.x + all.y + all.z + all.w;
  const uint32_t sum_before = before.x + before.y + before.z + before.w;
  uint32_t seen = sum, seen_before = sum_before;
  for (int i = 1; i < 32; i *= 2) {
    const uint32_t x = __shfl_up_sync(kFullMask, seen, i);
    const uint32_t y = __shfl_up_sync(kFullMask, seen_before, i);
    if (lane >= i) seen += x, seen_before += y;
  }
  if (lane == 31) sums[warp][0] = seen, sums[warp][1] = seen_before;
  __syncthreads();
  for (int w = 0; w < warp; ++w) seen += sums[w][0], seen_before += sums[w][1];
  seen -= sum;
  seen_before -= sum_before;
  if (seen < wanted && seen + sum >= wanted) {
    int i = 0;
    while (seen + bins[i] < wanted) {
      seen += bins[i];
      seen_before += earlier[i++];
    }
    found = {static_cast<uint32_t>(4 * group + 3 - i), wanted - seen, seen_before, earlier[i]};
  }
  __syncthreads();
  return found;
}

// Writes this thread block's part of the list and returns where it begins and ends in it.
__device__ int2 write_list(const Threshold& t,
                           const Keys& keys,
                           int first,
                           int count,
                           int32_t* out,
                           int64_t max_kept) {
  __shared__ uint32_t sums[kWarps][2];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t low = t.bin << kKeyShift, high = (t.bin + 1) << kKeyShift;
  const int begin = count * warp / kWarps, end = count * (warp + 1) / kWarps;
  // Keys are compared as numbers; beyond infinity stand NaNs, which nothing reaches.
  const __half2 lows = as_half2(low * 0x10001), highs = as_half2(high * 0x10001);
  __half2 reached = __float2half2_rn(0), above = __float2half2_rn(0);
  for (int b = begin + lane / 16; b < end; b += 2) {
    const uint4 k = keys.words(b)[lane % 16];
    reached = __hadd2(reached, __hadd2(__hadd2(__hge2(as_half2(k.x), lows), __hge2(as_half2(k.y), lows)),
                                       __hadd2(__hge2(as_half2(k.z), lows), __hge2(as_half2(k.w), lows))));
    above = __hadd2(above, __hadd2(__hadd2(__hge2(as_half2(k.x), highs), __hge2(as_half2(k.y), highs)),
                                   __hadd2(__hge2(as_half2(k.z), highs), __hge2(as_half2(k.w), highs))));
  }
  const float2 r = __half22float2(reached), a = __half22float2(above);
  const uint32_t all_above = __reduce_add_sync(kFullMask, static_cast<uint32_t>(a.x + a.y));
  const uint32_t all_reached = __reduce_add_sync(kFullMask, static_cast<uint32_t>(r.x + r.y));
  if (lane == 0) sums[warp][0] = all_above, sums[warp][1] = all_reached - all_above;
  __syncthreads();
  uint32_t place = t.above_before, equal = t.equal_before;
  uint32_t total = place, total_equal = equal;
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) place += sums[w][0], equal += sums[w][1];
    total += sums[w][0];
    total_equal += sums[w][1];
  }
  const int2 mine = {static_cast<int>(t.above_before + min(t.equal_before, t.need)),
                     static_cast<int>(total + min(total_equal, t.need))};
  place += min(equal, t.need);
  const uint32_t before = (1u << lane) - 1;
  for (int b = begin; b < end; ++b) {
    uint32_t key[4], kept[4];
#pragma unroll
    for (int v = 0; v < 4; ++v) key[v] = keys.at(b, 4 * lane + v);
    bool any_equal = false;
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      kept[v] = key[v] >= high;
      any_equal |= key[v] >= low && key[v] < high;
    }
    if (__any_sync(kFullMask, any_equal)) {
      uint32_t masks[4], e = equal;
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        masks[v] = __ballot_sync(kFullMask, key[v] >= low && key[v] < high);
        e += __popc(masks[v] & before);
        equal += __popc(masks[v]);
      }
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        const bool is = masks[v] >> lane & 1;
        if (is) kept[v] = e++ < t.need;
      }
    }
    uint32_t at = place;
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      const uint32_t mask = __ballot_sync(kFullMask, kept[v]);
      at += __popc(mask & before);
      place += __popc(mask);
    }
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      if (!kept[v]) continue;
      if (at < max_kept) out[at] = (first + b) * kBlockSize + 4 * lane + v;
      ++at;
    }
  }
  return mine;
}

// Probability mass of this thread block's part of the list, by head.
__device__ void sum_kept(const SelectArgs& p,
                         int64_t item,
                         int2 part,
                         const float2* stats,
                         const float* lse,
                         float* mass) {
  __shared__ float partial[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int32_t* list = p.indices + item * p.max_kept;
  for (int g = 0; g < p.group; ++g) {
    float sum = 0;
    for (int i = part.x + threadIdx.x; i < min(int64_t{part.y}, p.max_kept); i += kThreads) {
      const int t = list[i] % kBlockSize;
      const int64_t block = item * p.max_blocks + list[i] / kBlockSize;
      const int s = stored_at(t);
      const uint32_t word = __ldcg(reinterpret_cast<const uint32_t*>(
                                       p.scores + (block * p.pairs + g / 2) * kPairBytes) +
                                   s / 2);
      const float2 e = __half22float2(g % 2 ? second_head(word) : first_head(word));
      const float top = __ldcg(&stats[int64_t{list[i] / kBlockSize} * 2 * p.pairs + g]).x;
      sum += (s % 2 ? e.y : e.x) * fast_exp2(top - lse[g]);
    }
    sum = warp_sum(sum);
    if (lane == 0) partial[warp] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
      float all = 0;
      for (int w = 0; w < kWarps; ++w) all += partial[w];
      mass[g] = all;
    }
    __syncthreads();
  }
}

__global__ void __launch_bounds__(kThreads, 2) select_kernel(SelectArgs p) {
  __shared__ __align__(16) uint32_t histogram[kBins];
  __shared__ float shift;
  extern __shared__ __align__(16) uint8_t dynamic[];
  let_next_begin();
  const int C = p.cluster, rank = blockIdx.x % C;
  const int64_t item = blockIdx.x / C, row = item / p.cache.num_kv_heads;
  const RowPlan plan = plan_row(p, row);
  for (int i = threadIdx.x; i < kBins; i += kThreads) histogram[i] = 0;
  wait_for_previous();
  if (plan.all) {
    if (rank == 0 && threadIdx.x == 0) p.counts[item] = -1;
    for (int g = threadIdx.x; rank == 0 && p.kept_mass != nullptr && g < p.group; g += kThreads) {
      p.kept_mass[item * p.group + g] = 1.0f;
    }
    return;
  }
  float* lse = reinterpret_cast<float*>(dynamic);  // [2 * pairs]
  float* mass = lse + 2 * p.pairs;                 // [2 * pairs]
  uint16_t* own = reinterpret_cast<uint16_t*>(mass + 2 * p.pairs);
  const int first = static_cast<int>(int64_t{plan.sealed} * rank / C);
  const int count = static_cast<int>(int64_t{plan.sealed} * (rank + 1) / C) - first;
  const int64_t base = item * p.max_blocks;
  const Keys keys{count > p.key_blocks ? p.keys + (base + first) * kBlockSize : own};
  const int64_t stat_row = item * (p.max_blocks + kBlockSize / kTailTokens);
  const float2* stats = p.stats + stat_row * 2 * p.pairs;
  const uint8_t* scores = p.scores + base * p.pairs * kPairBytes;
  const int tail = plan.length - plan.sealed * kBlockSize;

  const int entries = plan.sealed + (tail + kTailTokens - 1) / kTailTokens;
  if (p.pairs == 2) {
    pool<2>(p, plan, stats, entries, scores, first, count, lse, &shift, keys, histogram);
  } else {
    pool<0>(p, plan, stats, entries, scores, first, count, lse, &shift, keys, histogram);
  }
  const int listed = plan.sinks + plan.wanted + plan.sealed * kBlockSize - plan.recent;
  const Threshold threshold = find_threshold(histogram, listed, rank, C);
  int32_t* out = p.indices + item * p.max_kept;
  cluster_arrive(C);  // is through with the others' histograms
  const int2 part = write_list(threshold, keys, first, count, out, p.max_kept);
  if (rank == C - 1 && threadIdx.x < tail && listed + threadIdx.x < p.max_kept) {
    out[listed + threadIdx.x] = plan.sealed * kBlockSize + threadIdx.x;
  }
  if (rank == 0 && threadIdx.x == 0) {
    p.counts[item] = static_cast<int32_t>(min(int64_t{listed} + tail, p.max_kept));
  }
  cluster_wait(C);
  if (p.kept_mass != nullptr) {
    __syncthreads();
    sum_kept(p, item, part, stats, lse, mass);
    cluster_sync(C);
    for (int g = threadIdx.x; rank == 0 && g < p.group; g += kThreads) {
      float all = 0;
      for (int r = 0; r < C; ++r) all += cluster_at(mass, r, C)[g];
      for (int i = plan.sealed; i < entries; ++i) {
        const float2 s = __ldcg(&stats[int64_t{i} * 2 * p.pairs + g]);
        all += s.y * fast_exp2(s.x - lse[g]);
      }
      p.kept_mass[item * p.group + g] = fminf(all, 1.0f);
    }
    cluster_sync(C);  // others may still read this block's shared memory
  }
}

}  // namespace

void plan_select(const Device& device, SelectArgs& p) {
  p.pairs = (p.group + 1) / 2;
  const int64_t per_block = kBlockSize * 2, heads = 4 * p.pairs * sizeof(float);
  const int64_t half = (device.max_shared / 2 - kStaticShared - heads) / per_block;
  const int64_t whole = (device.max_shared - kStaticShared - heads) / per_block;
  // Enough thread blocks to fill the device, and to keep all keys in shared memory: two of them on
  // a multiprocessor if possible.
  p.cluster =
      cluster_size(device.clusters, device.num_sms, p.num_rows * p.cache.num_kv_heads);
  while (device.clusters && p.cluster < kMaxCluster && p.cluster * half < p.max_blocks) {
    p.cluster *= 2;
  }
  const int64_t wanted = (p.max_blocks + p.cluster - 1) / p.cluster;
  p.key_blocks = static_cast<int>(wanted <= whole ? wanted : half);
}

void launch_select(const Device& device, const SelectArgs& p) {
  const dim3 grid(p.num_rows * p.cache.num_kv_heads);
  const size_t bytes = 4 * p.pairs * sizeof(float) + size_t(p.key_blocks) * kBlockSize * 2;
  launch(device, select_kernel, p.cluster, grid, kThreads, bytes, p, true);
}

}  // namespace vllm_sparse::cuda
