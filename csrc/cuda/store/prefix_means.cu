// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// Means of V up to the ends of the blocks that a call's tokens alone fill.
#include "common/instructions.cuh"
#include "common/launch.cuh"
#include "store/new_tokens.cuh"

namespace vllm_sparse::cuda {

namespace {

constexpr int kChunk = 128;  // jobs whose places are in shared memory at once
constexpr int kAhead = 8;    // means in flight

// One thread block per KV head takes the jobs in the order of their places: a prefix that one
// request stores may be shared by the next.
__global__ void prefix_means_kernel(StoreArgs p) {
  __shared__ SealJob sorted[kChunk];
  __shared__ int number[kChunk];  // of a job, as block_mean has it
  wait_for_previous();
  let_next_begin();
  const int head = blockIdx.x, size = p.cache.head_size, d = threadIdx.x;
  int* order = p.order + int64_t{head} * p.max_jobs;
  int count = 0;
  for (int j = d; j - d < p.max_jobs; j += blockDim.x) {
    count += __syncthreads_count(j < p.max_jobs && p.jobs[j].index >= 0);
  }
  for (int j = d; j < count; j += blockDim.x) {
    const int mine = p.jobs[j].index;
    int rank = 0;
    for (int k = 0; k < count; ++k) {
      const int other = p.jobs[k].index;
      rank += other < mine || (other == mine && k < j);
    }
    order[rank] = j;
  }
  int last_id = 0;
  float last = 0;
  for (int first = 0; first < count; first += kChunk) {
    const int jobs = min(kChunk, count - first);
    __syncthreads();
    for (int k = d; k < jobs; k += blockDim.x) {
      number[k] = order[first + k];
      sorted[k] = p.jobs[number[k]];
    }
    __syncthreads();
    for (int k = 0; k < jobs && d < size; k += kAhead) {
      float means[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int64_t job = number[min(k + i, jobs - 1)];
        means[i] = p.block_mean[(job * p.cache.num_kv_heads + head) * size + d];
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (k + i >= jobs) break;
        const SealJob job = sorted[k + i];
        if (job.id == 0) continue;
        const bool known = job.index > 0 && job.previous == last_id;
        last = store_mean(p, job, head, d, means[i], known ? last : load_mean(p, job, head, d));
        last_id = job.id;
      }
    }
  }
}

}  // namespace

void launch_prefix_means(const Device& device, const StoreArgs& p) {
  if (p.max_jobs == 0 || !p.cache.has_mean) return;
  const int threads = (p.cache.head_size + 31) / 32 * 32;
  launch(device, prefix_means_kernel, 1, dim3(p.cache.num_kv_heads), threads, 0, p, true);
}

}  // namespace vllm_sparse::cuda
