// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// What the parts of the decode kernel share.
#pragma once

#include "select/products.cuh"

namespace vllm_sparse::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kSlots = 2;     // steps of a warp's ring while scoring
constexpr int kMaxHeads = 8;  // query heads of a KV head
constexpr int kMaxPairs = kMaxHeads / 2;
constexpr int kMaxSize = 128;  // head size
constexpr int kTile = 16;
constexpr int kRing = kWarps * kSlots * kSlotBytes;
constexpr int kMaxPeers = 16;             // thread blocks of a cluster
constexpr int kStaticShared = 11 * 1024;  // what the kernel declares, and 1 KiB of the system's

union Shared {
  struct {
    int channel[kMaxSize];
    __align__(16) __half query[kMaxHeads * kMaxSize];
    float2 stats[2 * kWarps][kMaxHeads];  // (top, sum): of the warps, and of tokens not sealed
    float2 totals[kMaxPeers][kMaxHeads];  // of the thread blocks; others write it
  } select;
  struct {
    float2 ends[kWarps][kMaxHeads];
    float2 totals[kMaxPeers][kMaxHeads];  // others write these two
    float4 sums[kMaxHeads * kMaxSize / 4 + kMaxPeers];
  } merge;
};

// This thread block's place among the `C` that make an item's list.
__device__ inline int rank_of(int C) { return blockIdx.x & (C - 1); }

// This thread block's part of a context's blocks, or of a list's tiles.
struct Part {
  int first, count;
};

__device__ inline Part share_of(unsigned total, unsigned rank, unsigned size) {
  const unsigned first = total * rank / size;
  return {static_cast<int>(first), static_cast<int>(total * (rank + 1) / size - first)};
}

}  // namespace vllm_sparse::cuda
