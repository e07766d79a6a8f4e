// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// The launchers behind the checked entry points. None of them waits for the device.
#pragma once

#include "common/device.h"
#include "params.h"

namespace vllm_sparse::cuda {

// A block whose last token a call stores.
struct alignas(16) SealJob {
  int row, index;    // index: place in the context; negative: there are no more jobs
  int id, previous;  // 0: nothing to seal; the block before it
};

struct StoreArgs : StoreParams {
  Codes codes;
  int max_jobs;  // blocks that new tokens alone may fill
  // Workspace for these: an order for each KV head, and means of V.
  SealJob* jobs;      // [max_jobs]
  int* order;         // [num_kv_heads, max_jobs]
  float* block_mean;  // [max_jobs, num_kv_heads, head_size]
};

struct GatherArgs : GatherParams {
  Codes codes;
};

// Between scoring and selection. An item is a (row, KV head); heads come in pairs, the last of an
// odd group is padding.
struct SelectArgs : SelectParams {
  Codes codes;
  int pairs;          // pairs of query heads of a KV head
  uint8_t* prepared;  // [items] channels and queries, see PreparedItem
  float2* stats;      // [items, stat_blocks, pairs, 2] largest logit (log2), sum of exponentials
  uint8_t* scores;    // [items, max_blocks, pairs, kPairBytes] exponentials, see score_format.cuh
  uint16_t* keys;     // [items, max_blocks, kBlockSize], or null: keys fit into shared memory
  int key_blocks;     // blocks whose keys fit into a thread block's shared memory
  int cluster;        // thread blocks of an item
};

// Tokens that are not sealed are scored in groups of this many; each has its own entry in `stats`.
constexpr int kTailTokens = 16;
inline int64_t stat_blocks(int64_t max_blocks) { return max_blocks + kBlockSize / kTailTokens; }

constexpr int kStepChannels = 32;  // channels of one step of the products: ranks are padded to it

__host__ __device__ inline int pad_to(int value, int multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Bytes of an item's channels (int) and of its queries (fp16) restricted to them.
__host__ __device__ inline int64_t prepared_bytes(int rank, int group) {
  return int64_t{pad_to(rank, kStepChannels)} * (4 + 2 * pad_to(group, 4));
}

// Bytes of a block's scores with its heads' largest logits, as decode/choose.cuh keeps them.
__host__ __device__ inline int64_t score_bytes(int pairs) {
  return pad_to(pairs * (2 * kBlockSize + 8), 16);
}

// Parts of long lists that any thread block may take (decode/parts.cuh). Zero at first.
constexpr int kMaxParts = 31;          // of an item, beside what its cluster does itself
constexpr int kMaxSharedItems = 4096;  // of a call; larger ones share nothing
struct SharedParts {
  uint32_t arrivals[kMaxSharedItems];  // thread blocks through with a part of an item
  uint32_t offers[kMaxSharedItems];    // parts of an item << 16 | how many came for one
};

// Floats of a part's result.
__host__ __device__ inline int64_t partial_size(int64_t group, int64_t head_size) {
  return group * head_size + pad_to(static_cast<int>(2 * group), 4);
}

// Selection and attention in one kernel.
struct DecodeArgs : SelectArgs {
  void* out;           // [num_rows, num_kv_heads * group, head_size]
  int64_t out_stride;  // bytes between rows
  int held_blocks;     // blocks whose scores fit into a thread block's shared memory
  SharedParts* shared;
  float* part_results;  // [items, kMaxParts + 1, partial_size]
  int max_parts;        // of an item; 0: lists are not shared
  int num_sms;          // where clusters of two may part, see decode/waves.cuh; else 0
};

struct AttendArgs : AttendParams {
  Codes codes;
  const int32_t* budgets;  // [num_rows] of the selection ahead, or null: `counts` say
  int local_window, sink_tokens;
  uint32_t* arrivals;    // [kMaxGrid] zero between launches
  float* partials;       // [thread blocks, 2] results of lists that thread blocks share
  uint8_t* block_lists;  // [num_rows, num_kv_heads] see attend/block_lists.cuh
};

// Floats of a shared list's partial result: of each query head (top, total) in 16 bytes, then sums.
__host__ __device__ inline int64_t partial_floats(int64_t group, int64_t head_size) {
  return (group < 16 ? group : 16) * (head_size + 4);
}

// Memory that the kernels of a call share. Arrivals come first, where no other shape of call
// writes anything else: they are zeroed once, and every launch leaves them zero.
struct WorkspacePlan {
  int64_t partials, part_results, prepared, stats, scores, keys, bytes;  // offsets; size of all
};

constexpr int kMaxGrid = 1024;
constexpr int64_t kArrivalBytes = kMaxGrid * 4 + sizeof(SharedParts);
static_assert(kArrivalBytes % 16 == 0);

// Fills in what selection decides before a launch: cluster, pairs, key_blocks.
void plan_select(const Device& device, SelectArgs& args);
// The longest contexts that launch_select serves then.
int64_t most_blocks(const SelectArgs& args);

inline WorkspacePlan plan_workspace(const Device& device, const SelectArgs& args, bool selects) {
  const auto padded = [](int64_t bytes) { return (bytes + 255) / 256 * 256; };
  const bool global_keys = int64_t{args.cluster} * args.key_blocks < args.max_blocks;
  WorkspacePlan plan;
  plan.partials = kArrivalBytes;
  const int64_t items = selects ? args.num_rows * args.cache.num_kv_heads : 0;
  const int64_t blocks = items * args.max_blocks;
  const int grid = device.num_sms < kMaxGrid ? device.num_sms : kMaxGrid;
  plan.part_results =
      plan.partials + padded(8ll * grid * partial_floats(args.group, args.cache.head_size));
  // Never less for more rows, also where they are too many to share.
  const int64_t shared_items = args.top_p >= 1           ? 0
                               : items < kMaxSharedItems ? items
                                                         : kMaxSharedItems;
  plan.prepared = plan.part_results + padded(4 * shared_items * (kMaxParts + 1) *
                                             partial_size(args.group, args.cache.head_size));
  // As for the largest rank: the size is asked for without one.
  plan.stats = plan.prepared + padded(items * prepared_bytes(args.cache.head_size, args.group));
  plan.scores =
      plan.stats + padded(items * stat_blocks(args.max_blocks) * args.pairs * 2 * sizeof(float2));
  plan.keys = plan.scores + padded(blocks * score_bytes(args.pairs));
  plan.bytes = plan.keys + (global_keys ? blocks * kBlockSize * 2 : 0);
  return plan;
}

void launch_store_rows(const Device& device, const StoreArgs& args);
void launch_store_codes(const Device& device, const StoreArgs& args);
void launch_prefix_means(const Device& device, const StoreArgs& args);
void launch_gather_rows(const Device& device, const GatherArgs& args);
void launch_gather_codes(const Device& device, const GatherArgs& args);
void launch_channels(const Device& device, const SelectArgs& args);
void launch_score(const Device& device, const SelectArgs& args);
void launch_select(const Device& device, const SelectArgs& args);
// Whether one kernel does what channels, score, select and attend do.
bool decode_covers(const Device& device, const SelectArgs& args);
void launch_decode(const Device& device, DecodeArgs args);
using DecodeKernel = void (*)(DecodeArgs);
DecodeKernel decode_kernel_of_rows(const DecodeArgs& args);
DecodeKernel decode_kernel_of_codes(const DecodeArgs& args);
void launch_attend_rows(const Device& device, const AttendArgs& args);
// Whether the tensor cores' kernels cover a quantised format: one for blocks that hold K by token,
// one for blocks that do not.
bool attend_code_rows_covers(const Device& device, const AttendArgs& args);
bool attend_code_blocks_covers(const Device& device, const AttendArgs& args);
void launch_attend_code_rows(const Device& device, const AttendArgs& args);
void launch_attend_code_blocks(const Device& device, const AttendArgs& args);
void launch_block_lists(const Device& device, const AttendArgs& args);
// All other formats and head sizes.
void launch_attend_codes(const Device& device, const AttendArgs& args);

}  // namespace vllm_sparse::cuda
