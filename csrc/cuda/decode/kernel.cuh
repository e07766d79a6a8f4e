// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// SparQ decoding (arXiv 2312.04985, section 3) in one kernel: a cluster of thread blocks, or one,
// serves a (row, KV head) from its channels to its result. Each thread block scores a part of the
// blocks and lists that part's tokens; then all share the list. Rows that keep everything skip to
// attention.
#pragma once

#include "decode/attend_codes.cuh"
#include "decode/choose.cuh"
#include "decode/waves.cuh"

namespace vllm_sparse::cuda {

// A list, or a part of it, that a thread block attends to; with others if it is its cluster's own.
template <class T>
struct Job {
  unsigned item, row;
  int head, length, count;
  int tiled;  // of these, what tiles are made of: with kCodes, those that are sealed
  const T* query;
  const int32_t *table, *list;  // list: null for all tokens
  T* out;

  __device__ Job(const DecodeArgs& p, unsigned item)
      : item(item), row(item / p.cache.num_kv_heads) {
    head = item - row * p.cache.num_kv_heads;
    const int64_t first = int64_t{head} * p.group * p.cache.head_size;
    table = p.table(row);
    query = at<const T>(static_cast<const uint8_t*>(p.query) + row * p.query_stride) + first;
    out = at<T>(static_cast<uint8_t*>(p.out) + row * p.out_stride) + first;
  }
  template <bool kCodes>
  __device__ void keep(const DecodeArgs& p, const RowPlan& plan, int listed) {
    length = kCodes ? plan.sealed * kBlockSize : plan.length;
    count = plan.all ? plan.length : listed;
    tiled = kCodes ? max(count - (plan.length - length), 0) : count;
    list = plan.all ? nullptr : p.indices + int64_t{item} * p.max_kept;
  }
  template <class U, class V>
  __device__ static U* at(V* bytes) {
    return reinterpret_cast<U*>(bytes);
  }
};

// kCodes: blocks hold K by token, else they hold rows.
template <class T, int kD, bool kFast, bool kShares, bool kCodes>
__global__ void __launch_bounds__(kThreads, 2) decode_kernel(const __grid_constant__ DecodeArgs p) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) uint8_t dynamic[];
  __shared__ Shared shared;
  __shared__ Taken taken;
  __shared__ int parted;  // thread blocks of an item, where clusters may part
  let_next_begin();
  cluster_arrive(p.cluster);
  wait_for_previous();
  if constexpr (!kShares) {
    const bool alone = serves_alone(p);
    if (alone) {
      cluster_wait(p.cluster);
      if (blockIdx.x >= p.num_rows * p.cache.num_kv_heads) return;
    }
    if (threadIdx.x == 0) parted = alone ? 1 : p.cluster;
    __syncthreads();
  }
  const int& size = kShares ? p.cluster : parted;
  Job<T> job(p, blockIdx.x / size);
  const RowPlan plan = plan_row(p, job.row);
  int listed = 0;
  if (!plan.all) {
    listed = list_tokens<T, kFast, kCodes ? 1 : 0>(
        p, plan, job.item, job.head, size, job.query, job.table, dynamic, shared);
  }
  job.template keep<kCodes>(p, plan, listed);
  int C = size;
  std::conditional_t<kCodes, CodeAccumulator<T, kD>, Accumulator<T, kD, 8>> a;
  const auto begin = [&]() {
    if constexpr (kCodes) {
      a.begin(job.query, p.group);
    } else {
      a.begin(job.query, p.group, p.cache.head_size);
    }
  };
  const float scale = p.scale * kLog2e;
  if constexpr (kCodes) {
    if (!plan.all) cluster_release(C);
    a.clear();
    attend_tail(
        p, plan.length, plan.sealed, job.table, job.head, job.query, rank_of(C), C, scale, a);
    a.load(job.query, p.group);
    cluster_wait(C);
  } else {
    begin();
    plan.all ? cluster_wait(C) : cluster_sync(C);
  }
  // The list is complete, and all are through with the memory that attention takes.
  Cut cut = cut_list<kShares>(p, job.tiled);
  if (rank_of(C) == 0 && threadIdx.x == 0) {
    p.counts[job.item] = plan.all ? -1 : job.count;
    if (!plan.all) count_kept(p, job.head, job.count);
    if (kShares && cut.parts > 0) offer_parts(p, job.item, cut.parts);
  }
  const int ring_bytes =
      kCodes ? kCodeSlots * CodeTile<kD>::kBytes : 3 * kTile * (2 * p.cache.head_size + 16);
  const uint32_t ring = shared_address(dynamic) + threadIdx.x / 32 * ring_bytes;
  float* merge = reinterpret_cast<float*>(dynamic);  // in place of the ring
  Part tiles = share_of(cut.own, rank_of(C), C);
  int part = 0;
  while (true) {
    const int end = tiles.first + tiles.count;
    if constexpr (kCodes) {
      const CodeReader reader = {p, job.list, job.table, job.head, job.tiled, end, job.length};
      attend_code_tiles<T, kD>(reader, tiles.first, scale, ring, a);
    } else {
      const uint32_t units = static_cast<uint32_t>(p.cache.block_stride / 64);
      const TileReader reader = {
          p, job.list, job.table, job.head, job.length, job.tiled, end, units};
      attend_tiles<T, kD>(reader, tiles.first, scale, ring, a);
    }
    merge_warps<kD>(p, a, merge, rank_of(C), C, shared);
    cluster_sync(C);
    if (!kShares || cut.parts == 0) {
      merge_cluster(p, job.item, rank_of(C), C, job.out, shared);
    } else {
      store_partial(p, rank_of(C), C, partial_of(p, job.item, part), shared);
      if (arrive_last(p, job.item, p.cluster + cut.parts)) {
        join_parts(p, job.item, cut.parts, job.out);
      }
    }
    if (!kShares) return;
    if (threadIdx.x < 32) {
      const Taken found = take_part(p, job.item);
      if (threadIdx.x == 0) taken = found;
    }
    __syncthreads();
    if (taken.item == kNone) return;
    job = Job<T>(p, taken.item);
    part = taken.part;
    job.template keep<kCodes>(p, plan_row(p, job.row), __ldcg(p.counts + job.item));
    cut = cut_list<kShares>(p, job.tiled);
    tiles.first = cut.own + (part - 1) * cut.each;
    tiles.count = min(cut.each, tiles_of(job.tiled) - tiles.first);
    C = 1;
    begin();
  }
#endif
}

template <class T, int kD, bool kCodes>
auto decode_kernel_for(const DecodeArgs& p) {
  const bool fast = p.rank <= kStepChannels && p.group <= 4, shares = p.max_parts > 0;
  return fast     ? shares ? decode_kernel<T, kD, true, true, kCodes>
                           : decode_kernel<T, kD, true, false, kCodes>
         : shares ? decode_kernel<T, kD, false, true, kCodes>
                  : decode_kernel<T, kD, false, false, kCodes>;
}

template <bool kCodes>
DecodeKernel decode_kernel_of(const DecodeArgs& p) {
  const bool half = p.cache.dtype == Dtype::kHalf, small = p.cache.head_size <= 64;
  using Half = __half;
  using Bfloat16 = __nv_bfloat16;
  return half    ? small ? decode_kernel_for<Half, 64, kCodes>(p)
                         : decode_kernel_for<Half, kMaxSize, kCodes>(p)
         : small ? decode_kernel_for<Bfloat16, 64, kCodes>(p)
                 : decode_kernel_for<Bfloat16, kMaxSize, kCodes>(p);
}

}  // namespace vllm_sparse::cuda
