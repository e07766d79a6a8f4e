// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// Exact attention over quantised blocks on the tensor cores, in fp16 and bf16. A fixed grid cuts
// the blocks of all (row, KV head) lists into equal shares, as rows.cu does with tiles of rows.
// Every warp has room for one block: K of the next comes while V of this one is read, and so on.
#include "attend/block_accumulator.cuh"
#include "attend/block_lists.cuh"
#include "attend/merge_items.cuh"
#include "attend/store_result.cuh"
#include "common/launch.cuh"

namespace vllm_sparse::cuda {

namespace {

constexpr int kMostWarps = 8;
constexpr int kStaticShared = 2 * 1024;

// The lists as one sequence of units: sealed blocks, then parts of the tail. An item is a (row, KV
// head, kBlockHeads query heads).
struct Units {
  int item, first, tiles;
  int row, list, head;
  int length, sealed, blocks;
  bool all;

  __device__ void load(const AttendArgs& p, int subs) {
    list = item / subs;
    row = list / p.cache.num_kv_heads;
    head = list - row * p.cache.num_kv_heads;
    length =
        static_cast<int>(min(int64_t{max(p.seq_lens[row], 0)}, p.max_blocks * int64_t{kBlockSize}));
    sealed = p.cache.sealed_blocks(length);
    const int listed = p.indices == nullptr ? -1 : BlockList(p, list).head->blocks;
    all = listed < 0;
    blocks = all ? sealed : listed;
    const int tail = length - sealed * kBlockSize;
    tiles = max(1, blocks + (tail + kTailUnit - 1) / kTailUnit);
  }
  __device__ void advance(const AttendArgs& p, int subs, int tile) {
    while (tile >= first + tiles) {
      first += tiles;
      ++item;
      load(p, subs);
    }
  }
};

// What a warp does next.
struct Unit {
  int32_t id;        // of a sealed block; negative: ~ the tail's part, or nothing
  int head;          // KV head
  uint32_t mask[4];  // tokens; of a tail's part in mask[0]
};
constexpr int32_t kNoUnit = -100;

__device__ inline Unit unit_of(const AttendArgs& p, const Units& u, int at) {
  Unit unit = {kNoUnit, u.head, {~0u, ~0u, ~0u, ~0u}};
  const int part = at - u.blocks;
  if (part < 0) {
    if (u.all) {
      unit.id = p.table(u.row)[at];
    } else {
      const BlockList listed(p, u.list);
      unit.id = listed.ids[at];
      const uint4 mask = listed.masks[at];
      unit.mask[0] = mask.x, unit.mask[1] = mask.y, unit.mask[2] = mask.z, unit.mask[3] = mask.w;
    }
    // A bad id reads block 0, not foreign memory.
    if (unit.id < 0 || unit.id >= p.cache.num_blocks) unit.id = 0;
    return unit;
  }
  const int left = u.length - u.sealed * kBlockSize - part * kTailUnit;
  if (left <= 0) return unit;
  unit.id = ~part;
  unit.mask[0] =
      u.all ? (left >= 32 ? ~0u : (1u << left) - 1) : BlockList(p, u.list).head->tail[part];
  if (unit.mask[0] == 0) unit.id = kNoUnit;
  return unit;
}

template <class S, class T>
__global__ void __launch_bounds__(32 * kMostWarps, 1)
    attend_code_blocks_kernel(const __grid_constant__ AttendArgs p) {
  constexpr int D = S::kSize, kPitch = D + 4;
  extern __shared__ __align__(128) uint8_t dynamic[];
  __shared__ float2 ends[kMostWarps][kBlockHeads];
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32;
  const int subs = (p.group + kBlockHeads - 1) / kBlockHeads;
  const int items = static_cast<int>(p.num_rows) * p.cache.num_kv_heads * subs;
  const uint32_t slot = shared_address(dynamic) + warp * S::kBytes;
  float* merge = reinterpret_cast<float*>(dynamic + warps * S::kBytes);  // [warps][heads][kPitch]
  wait_for_previous();
  let_next_begin();
  const Share share = find_share<kMostWarps, Units>(p, subs, items);

  Units ahead;
  ahead.item = share.item;
  ahead.first = share.item_first;
  if (share.begin < share.end) ahead.load(p, subs);
  Units here = ahead;
  const auto look_up = [&](int at) {
    if (at >= share.end) return Unit{kNoUnit, 0, {}};
    ahead.advance(p, subs, at);
    return unit_of(p, ahead, at - ahead.first);
  };
  const auto issue_keys = [&](const Unit& u) {
    if (u.id >= 0) copy_keys<S>(chunk_of(p.cache, u.id, u.head), slot);
    copy_commit();
  };
  const auto issue_values = [&](const Unit& u) {
    if (u.id >= 0) {
      copy_values<S>(chunk_of(p.cache, u.id, u.head) + S::kKeyBytes, u.mask, slot + S::kKeyBytes);
    }
    copy_commit();
  };
  int tile = share.begin + warp;
  Unit unit = look_up(tile);
  issue_keys(unit);
  issue_values(unit);
  Unit next = look_up(tile + warps);

  BlockAccumulator<S, T> a;
  const float scale = p.soft_cap > 0 ? p.scale : p.scale * kLog2e;
  for (int begin = share.begin; begin < share.end;) {
    here.advance(p, subs, begin);
    const int end = min(share.end, here.first + here.tiles);
    const int first_head = here.item % subs * kBlockHeads;
    const int heads = min(kBlockHeads, p.group - first_head);
    const int query_head = here.head * p.group + first_head;
    const T* query = reinterpret_cast<const T*>(static_cast<const uint8_t*>(p.query) +
                                                here.row * p.query_stride) +
                     query_head * D;
    a.begin(query, heads);
    for (; tile < end; tile += warps) {
      uint32_t weights[8][2];
      copy_wait<1>();
      __syncwarp();
      if (unit.id >= 0) a.keys(slot, unit.mask, scale, p.soft_cap, weights);
      __syncwarp();
      issue_keys(next);
      copy_wait<1>();
      __syncwarp();
      if (unit.id >= 0) {
        a.values(slot + S::kKeyBytes, unit.mask, weights);
      } else if (unit.id != kNoUnit) {
        const int32_t* table = p.table(here.row);
        const int first = ~unit.id * kTailUnit;
        a.rows(p, table, here.head, here.sealed, first, unit.mask[0], query, heads, scale);
      }
      __syncwarp();
      issue_values(next);
      unit = next;
      next = look_up(tile + 2 * warps);
    }
    const auto finish = [&](int h, int d, const Merged& merged, const float4& sum) {
      store_four<T, true>(p, here.row, here.head, query_head + h, d, here.length, merged, sum);
    };
    __syncthreads();
    a.store(merge + warp * kBlockHeads * kPitch, kPitch, ends[warp]);
    merge_item<kBlockHeads, D>(p, share, here, begin, end, heads, merge, ends, finish);
    begin = end;
  }
  copy_wait<0>();
}

template <class S>
int warps_of(const Device& device) {
  const int bytes = S::kBytes + kBlockHeads * (S::kSize + 4) * 4;
  const int most = (device.max_shared - kStaticShared) / bytes;
  return most < kMostWarps ? most : kMostWarps;
}

// Calls with(BlockShape) for the shape that covers a cache, or returns false.
template <class With>
bool with_shape(const KvCache& cache, const With& with) {
  const auto attempt = [&](auto shape) {
    if (!decltype(shape)::covers(cache)) return false;
    with(shape);
    return true;
  };
  return attempt(BlockShape<128, 4, 4>()) || attempt(BlockShape<128, 4, 8>()) ||
         attempt(BlockShape<128, 8, 8>()) || attempt(BlockShape<64, 4, 4>()) ||
         attempt(BlockShape<64, 4, 8>()) || attempt(BlockShape<64, 8, 8>());
}

}  // namespace

bool attend_code_blocks_covers(const Device& device, const AttendArgs& p) {
  if (p.max_blocks * 16 > device.max_shared - kStaticShared) return false;
  bool fits = false;
  with_shape(p.cache, [&](auto shape) { fits = warps_of<decltype(shape)>(device) >= 2; });
  return fits;
}

void launch_attend_code_blocks(const Device& device, const AttendArgs& args) {
  AttendArgs p = args;
  p.budgets = nullptr;  // lists are there before this kernel begins
  if (p.indices != nullptr) launch_block_lists(device, p);
  with_shape(p.cache, [&](auto shape) {
    using S = decltype(shape);
    const int warps = warps_of<S>(device);
    const size_t bytes = warps * (S::kBytes + kBlockHeads * (S::kSize + 4) * 4);
    const dim3 grid(device.num_sms < kMaxGrid ? device.num_sms : kMaxGrid);
    const auto kernel = p.cache.dtype == Dtype::kHalf ? attend_code_blocks_kernel<S, __half>
                                                      : attend_code_blocks_kernel<S, __nv_bfloat16>;
    launch(device, kernel, 1, grid, 32 * warps, bytes, p, true);
  });
}

}  // namespace vllm_sparse::cuda
