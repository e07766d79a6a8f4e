// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// Launching the decode kernel: what it covers, and how many thread blocks serve an item.
#include <map>
#include <mutex>
#include <utility>

#include "common/launch.cuh"
#include "decode/attend_codes.cuh"
#include "select/score_format.cuh"
#include "select/threshold.cuh"

namespace vllm_sparse::cuda {

namespace {

constexpr int kLeastCluster = 2;
constexpr int64_t kManyBlocks = 512;  // of a context; from here on clusters of 16 may pay

// As many thread blocks as there are multiprocessors, in powers of two; or two, which may part
// where no context is long beside the others. Each multiprocessor holds two thread blocks, but
// large clusters that need nearly all places leave gaps, and the last ones wait for a second round.
int decode_cluster(const Device& device, int64_t items, int64_t max_blocks) {
  const int most = device.large_clusters && max_blocks > kManyBlocks ? kMaxPeers : kMaxCluster;
  int size = kLeastCluster;
  while (size < most && 2 * size * items <= device.num_sms) size *= 2;
  return size;
}

// Whether thread blocks of a launch may serve items alone, if lengths allow it. With many waves
// nothing is gained by a fuller last one, and those that end at once have to begin, too.
bool may_part(const Device& device, const DecodeArgs& p, int64_t items) {
  return p.cluster == kLeastCluster && items > device.num_sms && items <= 8 * device.num_sms &&
         p.max_blocks <= kWarps * kCountedBlocks;
}

// Whether the device can hold a cluster of such thread blocks at all: a part of a GPU (MIG) may
// not, nor a share of one (MPS).
bool holds_cluster(const Device& device, DecodeKernel kernel, int size, int bytes) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, bool> known;  // by kernel and device
  const std::lock_guard lock(mutex);
  const auto key = std::pair(reinterpret_cast<const void*>(kernel), device.index);
  const auto [found, is_new] = known.try_emplace(key, false);
  if (!is_new) return found->second;
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attribute = cluster_attribute(size);
  config.gridDim = dim3(size);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = bytes;
  config.attrs = &attribute;
  config.numAttrs = 1;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  int clusters = 0;
  check(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config));
  return found->second = clusters > 0;
}

// Half of a multiprocessor's shared memory, of which each thread block costs 1 KiB more.
int dynamic_bytes(const Device& device) { return (device.max_shared + 1024) / 2 - kStaticShared; }

// Where a warp keeps tiles on their way.
int ring_bytes(const KvCache& cache) {
  const int tile = cache.head_size == 64 ? CodeTile<64>::kBytes : CodeTile<128>::kBytes;
  return cache.quantised() ? kCodeSlots * tile : 3 * kTile * (2 * cache.head_size + 16);
}

}  // namespace

bool decode_covers(const Device& device, const SelectArgs& p) {
  if (p.max_blocks > kLeastCluster * kWarps * kCountedBlocks) return false;
  const int attend = kWarps * ring_bytes(p.cache);
  const int list =
      kRing + kMaxPeers * kSumsBytes + static_cast<int>(score_bytes((p.group + 1) / 2));
  if (dynamic_bytes(device) < (attend > list ? attend : list)) return false;
  if (p.cache.quantised()) {
    if (!CodeTile<64>::covers(p.cache) && !CodeTile<128>::covers(p.cache)) return false;
  } else {
    // Attention addresses rows in units of 64 bytes with 32 bits.
    const int64_t units = p.cache.block_stride / 64;
    if (p.cache.block_stride % 64 != 0 || units * p.cache.num_blocks > UINT32_MAX) return false;
  }
  return device.clusters && p.cache.head_size <= kMaxSize && p.group <= kMaxHeads &&
         p.soft_cap == 0 && p.kept_mass == nullptr;
}

void launch_decode(const Device& device, DecodeArgs p) {
  const int64_t items = p.num_rows * p.cache.num_kv_heads;
  // Lists of one length need no sharing.
  const bool shares = p.top_p < 1 && items <= kMaxSharedItems;
  p.max_parts = shares ? kMaxParts : 0;
  const int bytes = dynamic_bytes(device);
  const DecodeKernel kernel =
      p.cache.quantised() ? decode_kernel_of_codes(p) : decode_kernel_of_rows(p);
  p.cluster = decode_cluster(device, items, p.max_blocks);
  if (p.cluster > kMaxCluster && !holds_cluster(device, kernel, p.cluster, bytes)) {
    p.cluster = kMaxCluster;
  }
  p.num_sms = !shares && may_part(device, p, items) ? device.num_sms : 0;
  p.held_blocks = (bytes - kRing - p.cluster * kSumsBytes) / static_cast<int>(score_bytes(p.pairs));
  launch(device, kernel, p.cluster, dim3(items), kThreads, bytes, p, true);
}

}  // namespace vllm_sparse::cuda
