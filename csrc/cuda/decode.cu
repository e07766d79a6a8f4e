// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// SparQ decoding (arXiv 2312.04985, section 3) in one kernel: a cluster of thread blocks serves a
// (row, KV head) from its channels to its result. Each thread block scores a part of the blocks and
// lists that part's tokens; then all share the list. Rows that keep everything skip to attention.
#include "decode_list.cuh"
#include "decode_parts.cuh"

namespace vllm_sparse::cuda {

namespace {

constexpr int64_t kManyBlocks = 512;  // of a context; from here on clusters of 16 may pay

// A list, or a part of it, that a thread block attends to; with others if it is its cluster's own.
template <class T>
struct Job {
  unsigned item, row;
  int head, length, count;
  const T* query;
  const int32_t *table, *list;  // list: null for all tokens
  T* out;

  __device__ Job(const DecodeArgs& p, unsigned item)
      : item(item), row(item / p.cache.num_kv_heads) {
    head = item - row * p.cache.num_kv_heads;
    const int64_t first = int64_t{head} * p.group * p.cache.head_size;
    table = p.block_table + row * p.block_table_stride;
    query = at<const T>(static_cast<const uint8_t*>(p.query) + row * p.query_stride) + first;
    out = at<T>(static_cast<uint8_t*>(p.out) + row * p.out_stride) + first;
  }
  __device__ void keep(const DecodeArgs& p, const RowPlan& plan, int listed) {
    length = plan.length;
    count = plan.all ? plan.length : listed;
    list = plan.all ? nullptr : p.indices + int64_t{item} * p.max_kept;
  }
  template <class U, class V>
  __device__ static U* at(V* bytes) {
    return reinterpret_cast<U*>(bytes);
  }
};

template <class T, int kD, bool kFast, bool kShares>
__global__ void __launch_bounds__(kThreads, 2) decode_kernel(const __grid_constant__ DecodeArgs p) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) uint8_t dynamic[];
  __shared__ Shared shared;
  __shared__ Taken taken;
  let_next_begin();
  cluster_arrive(p.cluster);
  int rank = blockIdx.x % p.cluster, C = p.cluster;
  Job<T> job(p, blockIdx.x / p.cluster);
  wait_for_previous();
  const RowPlan plan = plan_row(p, job.row);
  int listed = 0;
  if (!plan.all) {
    listed = list_tokens<T, kFast>(
        p, plan, job.item, job.head, rank, job.query, job.table, dynamic, shared);
  }
  job.keep(p, plan, listed);
  Accumulator<T, kD, 8> a;
  a.begin(job.query, p.group, p.cache.head_size);
  plan.all ? cluster_wait(C) : cluster_sync(C);  // the list is complete
  Cut cut = cut_list<kShares>(p, job.count);
  if (rank == 0 && threadIdx.x == 0) {
    p.counts[job.item] = plan.all ? -1 : job.count;
    if (!plan.all) count_kept(p, job.head, job.count);
    if (p.tokens_read != nullptr) {
      atomicAdd(reinterpret_cast<unsigned long long*>(p.tokens_read), job.count);
    }
    if (kShares && cut.parts > 0) offer_parts(p, job.item, cut.parts);
  }
  const uint32_t ring =
      shared_address(dynamic) + threadIdx.x / 32 * 3 * kTile * (2 * p.cache.head_size + 16);
  float* merge = reinterpret_cast<float*>(dynamic);  // in place of the ring
  Part tiles = share_of(cut.own, rank, C);
  int part = 0;
  while (true) {
    const TileReader reader = {p,
                               job.list,
                               job.table,
                               job.head,
                               job.length,
                               job.count,
                               tiles.first + tiles.count,
                               static_cast<uint32_t>(p.cache.block_stride / 64)};
    attend_tiles<T, kD>(reader, tiles.first, p.scale * kLog2e, ring, a);
    merge_warps<T, kD>(p, a, merge, rank, C, shared);
    cluster_sync(C);
    if (!kShares || cut.parts == 0) {
      merge_cluster(p, rank, C, job.out, shared);
    } else {
      store_partial(p, rank, C, partial_of(p, job.item, part), shared);
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
    job.keep(p, plan_row(p, job.row), __ldcg(p.counts + job.item));
    cut = cut_list<kShares>(p, job.count);
    tiles.first = cut.own + (part - 1) * cut.each;
    tiles.count = min(cut.each, tiles_of(job.count) - tiles.first);
    rank = 0;
    C = 1;
    a.begin(job.query, p.group, p.cache.head_size);
  }
#endif
}

template <class T, int kD>
auto kernel_for(const DecodeArgs& p) {
  const bool fast = p.rank <= kStepChannels && p.group <= 4, shares = p.max_parts > 0;
  return fast     ? shares ? decode_kernel<T, kD, true, true> : decode_kernel<T, kD, true, false>
         : shares ? decode_kernel<T, kD, false, true>
                  : decode_kernel<T, kD, false, false>;
}

template <class T>
auto kernel_for_type(const DecodeArgs& p) {
  return p.cache.head_size <= 64 ? kernel_for<T, 64>(p) : kernel_for<T, kMaxSize>(p);
}

// As many thread blocks as there are multiprocessors, in powers of two; or two, for a long context
// beside many short ones. Each multiprocessor holds two thread blocks, but large clusters that need
// nearly all places leave gaps, and the last ones wait for a second round.
int decode_cluster(const Device& device, int64_t items, int64_t max_blocks) {
  const int most = device.large_clusters && max_blocks > kManyBlocks ? kMaxPeers : kMaxCluster;
  int size = 2;
  while (size < most && 2 * size * items <= device.num_sms) size *= 2;
  return size;
}

// Half of a multiprocessor's shared memory, of which each thread block costs 1 KiB more.
int dynamic_bytes(const Device& device) { return (device.max_shared + 1024) / 2 - kStaticShared; }

}  // namespace

bool decode_covers(const Device& device, const SelectArgs& p) {
  const int attend = kWarps * 3 * kTile * (2 * p.cache.head_size + 16);
  const int list =
      kRing + kMaxPeers * kSumsBytes + static_cast<int>(score_bytes((p.group + 1) / 2));
  if (dynamic_bytes(device) < (attend > list ? attend : list)) return false;
  // Attention addresses rows in units of 64 bytes with 32 bits.
  const int64_t units = p.cache.block_stride / 64;
  if (p.cache.block_stride % 64 != 0 || units * p.cache.num_blocks > UINT32_MAX) return false;
  return device.clusters && p.cache.dtype != Dtype::kFloat && p.cache.head_size <= kMaxSize &&
         p.group <= kMaxHeads && p.soft_cap == 0 && p.kept_mass == nullptr;
}

void launch_decode(const Device& device, DecodeArgs p) {
  const int64_t items = p.num_rows * p.cache.num_kv_heads;
  p.cluster = decode_cluster(device, items, p.max_blocks);
  // Lists of one length need no sharing.
  const bool shares = p.top_p < 1 && items <= kMaxSharedItems;
  p.max_parts = shares ? kMaxParts : 0;
  const int bytes = dynamic_bytes(device);
  p.held_blocks = (bytes - kRing - p.cluster * kSumsBytes) / static_cast<int>(score_bytes(p.pairs));
  const auto kernel = p.cache.dtype == Dtype::kHalf ? kernel_for_type<__half>(p)
                                                    : kernel_for_type<__nv_bfloat16>(p);
  if (p.cluster > kMaxCluster) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  }
  const dim3 grid(p.num_rows * p.cache.num_kv_heads);
  launch(device, kernel, p.cluster, grid, kThreads, bytes, p, true);
}

}  // namespace vllm_sparse::cuda
