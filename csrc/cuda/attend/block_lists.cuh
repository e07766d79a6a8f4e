// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// Token lists by blocks: which blocks have listed tokens, and which tokens these are.
#pragma once

#include "common/kernels.h"

namespace vllm_sparse::cuda {

// Of one (row, KV head), in the workspace: a head, then of each block with listed tokens a mask,
// then their ids.
struct BlockListHead {
  int blocks;  // negative: everything is attended to
  int unused[3];
  uint32_t tail[4];  // listed tokens after the sealed blocks
};

__device__ inline int64_t block_list_bytes(int64_t max_blocks) {
  return sizeof(BlockListHead) + (20 * max_blocks + 15) / 16 * 16;
}

struct BlockList {
  BlockListHead* head;
  uint4* masks;
  int32_t* ids;
  __device__ BlockList(const AttendArgs& p, int64_t list) {
    uint8_t* data = p.block_lists + list * block_list_bytes(p.max_blocks);
    head = reinterpret_cast<BlockListHead*>(data);
    masks = reinterpret_cast<uint4*>(head + 1);
    ids = reinterpret_cast<int32_t*>(masks + p.max_blocks);
  }
};

}  // namespace vllm_sparse::cuda
