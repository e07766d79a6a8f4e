// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// SparQ's choice (arXiv 2312.04985, section 3) from scored blocks. A cluster of thread blocks
// serves one (row, KV head): it pools probabilities over the query heads, finds the threshold that
// enough tokens reach from a histogram, and writes the list in order.
#include "common/launch.cuh"
#include "select/threshold.cuh"

namespace vllm_sparse::cuda {

namespace {

constexpr int kStaticShared = 20 * 1024;  // what the kernel declares, and 1 KiB of the system's

// Probability mass of this thread block's part of the list, by head.
__device__ void sum_kept(const SelectArgs& p,
                         int64_t item,
                         int2 part,
                         const float2* stats,
                         const float* lse,
                         float* mass) {
  __shared__ float partial[kSelectWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int32_t* list = p.indices + item * p.max_kept;
  for (int g = 0; g < p.group; ++g) {
    float sum = 0;
    for (int i = part.x + threadIdx.x; i < min(int64_t{part.y}, p.max_kept); i += kSelectThreads) {
      const int t = list[i] % kBlockSize;
      const int64_t block = item * p.max_blocks + list[i] / kBlockSize;
      const int s = stored_at(t);
      const uint32_t word = __ldcg(
          reinterpret_cast<const uint32_t*>(p.scores + (block * p.pairs + g / 2) * kPairBytes) +
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
      for (int w = 0; w < kSelectWarps; ++w) all += partial[w];
      mass[g] = all;
    }
    __syncthreads();
  }
}

__global__ void __launch_bounds__(kSelectThreads, 2) select_kernel(SelectArgs p) {
  __shared__ __align__(16) uint32_t histogram[kBins];
  __shared__ __align__(16) Sums sums[kMaxCluster][kCoarseBins];  // others write it
  __shared__ float shift;
  extern __shared__ __align__(16) uint8_t dynamic[];
  let_next_begin();
  const int C = p.cluster, rank = blockIdx.x % C;
  const int64_t item = blockIdx.x / C, row = item / p.cache.num_kv_heads;
  const RowPlan plan = plan_row(p, row);
  for (int i = threadIdx.x; i < kBins; i += kSelectThreads) histogram[i] = 0;
  wait_for_previous();
  if (plan.all) {
    if (rank == 0 && threadIdx.x == 0) p.counts[item] = -1;
    for (int g = threadIdx.x; rank == 0 && p.kept_mass != nullptr && g < p.group;
         g += kSelectThreads) {
      p.kept_mass[item * p.group + g] = 1.0f;
    }
    return;
  }
  cluster_arrive(C);
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
  cluster_wait(C);  // all have begun
  __syncthreads();
  send_sums<kSelectThreads>(histogram, sums, p.top_p < 1, rank, C);
  cluster_sync(C);
  const Target target = target_of(p, plan, fast_exp2(shift));
  const Threshold threshold = cluster_threshold<kSelectThreads>(histogram, sums, target, rank, C);
  const int64_t listed = threshold.listed;
  int32_t* out = p.indices + item * p.max_kept;
  cluster_arrive(C);  // is through with the others' histograms
  const int2 part = write_list<kSelectWarps>(threshold, keys, first, count, out, p.max_kept);
  if (rank == C - 1 && threadIdx.x < tail && listed + threadIdx.x < p.max_kept) {
    out[listed + threadIdx.x] = plan.sealed * kBlockSize + threadIdx.x;
  }
  if (rank == 0 && threadIdx.x == 0) {
    const int count = static_cast<int>(min(listed + tail, p.max_kept));
    p.counts[item] = count;
    count_kept(p, static_cast<int>(item - row * p.cache.num_kv_heads), count);
  }
  cluster_wait(C);
  if (p.kept_mass != nullptr) {
    __syncthreads();
    sum_kept(p, item, part, stats, lse, mass);
    cluster_sync(C);
    for (int g = threadIdx.x; rank == 0 && g < p.group; g += kSelectThreads) {
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
  p.cluster = cluster_size(device.clusters, device.num_sms, p.num_rows * p.cache.num_kv_heads);
  while (device.clusters && p.cluster < kMaxCluster && p.cluster * half < p.max_blocks) {
    p.cluster *= 2;
  }
  const int64_t wanted = (p.max_blocks + p.cluster - 1) / p.cluster;
  p.key_blocks = static_cast<int>(wanted <= whole ? wanted : half);
}

int64_t most_blocks(const SelectArgs& p) {
  return int64_t{p.cluster} * kSelectWarps * kCountedBlocks;
}

void launch_select(const Device& device, const SelectArgs& p) {
  const dim3 grid(p.num_rows * p.cache.num_kv_heads);
  const size_t bytes = 4 * p.pairs * sizeof(float) + size_t(p.key_blocks) * kBlockSize * 2;
  launch(device, select_kernel, p.cluster, grid, kSelectThreads, bytes, p, true);
}

}  // namespace vllm_sparse::cuda
