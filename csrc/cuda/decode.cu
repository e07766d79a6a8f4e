// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// SparQ decoding (arXiv 2312.04985, section 3) in one kernel: a cluster of thread blocks serves a
// (row, KV head) from its channels to its result. Each thread block scores a part of the blocks and
// lists that part's tokens; then all share the list. Rows that keep everything skip to attention.
#include "decode_attend.cuh"
#include "decode_list.cuh"

namespace vllm_sparse::cuda {

namespace {

constexpr int64_t kManyBlocks = 512;  // of a context; from here on clusters of 16 may pay

template <class T, int kD, bool kFast>
__global__ void __launch_bounds__(kThreads, 2) decode_kernel(const __grid_constant__ DecodeArgs p) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) uint8_t dynamic[];
  __shared__ Shared shared;
  let_next_begin();
  cluster_arrive(p.cluster);
  const int rank = blockIdx.x % p.cluster;
  const unsigned item = blockIdx.x / p.cluster, row = item / p.cache.num_kv_heads;
  const int head = item - row * p.cache.num_kv_heads;
  const int size = p.cache.head_size;
  wait_for_previous();
  const RowPlan plan = plan_row(p, row);
  const int32_t* table = p.block_table + row * p.block_table_stride;
  const T* query =
      reinterpret_cast<const T*>(static_cast<const uint8_t*>(p.query) + row * p.query_stride) +
      int64_t{head} * p.group * size;
  int count = plan.length;
  if (!plan.all) {
    count = list_tokens<T, kFast>(p, plan, item, head, rank, query, table, dynamic, shared);
  }
  Accumulator<T, kD, 8> a;
  a.begin(query, p.group, size);
  plan.all ? cluster_wait(p.cluster) : cluster_sync(p.cluster);  // the list is complete
  if (rank == 0 && threadIdx.x == 0) {
    p.counts[item] = plan.all ? -1 : count;
    if (p.tokens_read != nullptr) {
      atomicAdd(reinterpret_cast<unsigned long long*>(p.tokens_read), count);
    }
  }
  const int tiles = (count + kTile - 1) / kTile;
  const Part share = share_of(tiles, rank, p.cluster);
  const TileReader reader = {p,
                             plan.all ? nullptr : p.indices + item * p.max_kept,
                             table,
                             head,
                             plan.length,
                             count,
                             share.first + share.count,
                             static_cast<uint32_t>(p.cache.block_stride / 64)};
  const uint32_t ring = shared_address(dynamic) + threadIdx.x / 32 * 3 * kTile * (2 * size + 16);
  attend_tiles<T, kD>(reader, share.first, p.scale * kLog2e, ring, a);
  float* merge = reinterpret_cast<float*>(dynamic);  // in place of the ring
  merge_warps<T, kD>(p, a, merge, rank, shared);
  cluster_sync(p.cluster);
  T* out = reinterpret_cast<T*>(static_cast<uint8_t*>(p.out) + row * p.out_stride);
  merge_cluster(p, rank, out + int64_t{head} * p.group * size, shared);
#endif
}

template <class T, int kD>
auto kernel_for(const DecodeArgs& p) {
  return p.rank <= kStepChannels && p.group <= 4 ? decode_kernel<T, kD, true>
                                                 : decode_kernel<T, kD, false>;
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
  const int list = kRing + static_cast<int>(sizeof(Coarse) + score_bytes((p.group + 1) / 2));
  if (dynamic_bytes(device) < (attend > list ? attend : list)) return false;
  // Attention addresses rows in units of 64 bytes with 32 bits.
  const int64_t units = p.cache.block_stride / 64;
  if (p.cache.block_stride % 64 != 0 || units * p.cache.num_blocks > UINT32_MAX) return false;
  return device.clusters && p.cache.dtype != Dtype::kFloat && p.cache.head_size <= kMaxSize &&
         p.group <= kMaxHeads && p.soft_cap == 0 && p.kept_mass == nullptr;
}

void launch_decode(const Device& device, DecodeArgs p) {
  p.cluster = decode_cluster(device, p.num_rows * p.cache.num_kv_heads, p.max_blocks);
  const int bytes = dynamic_bytes(device);
  p.held_blocks =
      (bytes - kRing - static_cast<int>(sizeof(Coarse))) / static_cast<int>(score_bytes(p.pairs));
  const auto kernel = p.cache.dtype == Dtype::kHalf ? kernel_for_type<__half>(p)
                                                    : kernel_for_type<__nv_bfloat16>(p);
  if (p.cluster > kMaxCluster) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  }
  const dim3 grid(p.num_rows * p.cache.num_kv_heads);
  launch(device, kernel, p.cluster, grid, kThreads, bytes, p, true);
}

}  // namespace vllm_sparse::cuda
