// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// Exact attention over quantised blocks that hold K by token, in fp16 and bf16: as rows.cu, a
// fixed grid cuts the tokens of all (row, KV head) lists into equal shares, and every warp streams
// tiles of 16 tokens through its own part of shared memory. Tokens that are not sealed are read
// where they lie.
#include "attend/code_tile.cuh"
#include "attend/merge_items.cuh"
#include "attend/store_result.cuh"
#include "common/launch.cuh"
#include "common/tails.cuh"

namespace vllm_sparse::cuda {

namespace {

constexpr int kWarps = 8;
constexpr int kHeads = 8;  // query heads of an item
constexpr int kSlots = 6;

template <int D>
constexpr int warp_bytes() {
  return kSlots * CodeTile<D>::kBytes + kHeads * (D + 4) * 4;
}

// A tile on its way: the token of the lane, then its block.
struct Fetch {
  int token, head, row, length;
  int32_t id;
  uint32_t tail;  // tokens that are not sealed
};

template <class T, int D>
__global__ void __launch_bounds__(32 * kWarps, 1)
    attend_code_rows_kernel(const __grid_constant__ AttendArgs p) {
  using Tile = CodeTile<D>;
  static_assert(Tile::kTokens == kTile);
  constexpr int kPitch = D + 4;
  extern __shared__ __align__(128) uint8_t dynamic[];
  __shared__ float2 ends[kWarps][kHeads];
  __shared__ uint32_t tails[kWarps][kSlots];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int subs = (p.group + kHeads - 1) / kHeads;
  const int items = static_cast<int>(p.num_rows) * p.cache.num_kv_heads * subs;
  float* merge = reinterpret_cast<float*>(dynamic);  // [kWarps][kHeads][kPitch]
  const uint32_t ring =
      shared_address(merge + kWarps * kHeads * kPitch) + warp * kSlots * Tile::kBytes;
  if (p.budgets == nullptr) wait_for_previous();
  let_next_begin();
  const Share share = find_share<kWarps>(p, subs, items);

  // Ahead of the products run, for every tile: its tokens, their blocks, their rows.
  Cursor ahead;
  ahead.item = share.item;
  ahead.first = share.item_first;
  if (share.begin < share.end) ahead.load(p, subs);
  Cursor here = ahead;
  const auto token_of = [&](const Cursor& c, int at) {
    const int last = c.tokens.count - 1;
    at = min(at, max(last, 0));
    if (!c.tokens.all && last >= 0) at = p.indices[int64_t{c.list} * p.max_kept + at];
    return at;
  };
  const auto inside = [](int token, int length) { return min(max(token, 0), max(length - 1, 0)); };
  int next = share.begin + warp;  // tile whose tokens are looked up next
  const auto look_up_tokens = [&]() {
    Fetch f = {0, -1, 0, 0, 0, 0};
    if (next < share.end) {
      ahead.advance(p, subs, next);
      f.row = ahead.row;
      f.head = ahead.head;
      f.length = ahead.tokens.length;
      f.token = token_of(ahead, (next - ahead.first) * kTile + lane % kTile);
    }
    next += kWarps;
    return f;
  };
  const auto look_up_block = [&](Fetch& f) {
    if (f.head < 0) return;
    f.token = inside(f.token, f.length);
    const bool exact = f.token / kBlockSize >= p.cache.sealed_blocks(f.length);
    f.tail = __ballot_sync(kFullMask, exact);
    if (f.tail == kFullMask) return;
    // Another one's codes in place of those that it has not.
    const int sealed = __shfl_sync(kFullMask, f.token, __ffs(~f.tail) - 1);
    if (exact) f.token = sealed;
    f.id = p.block_table[int64_t{f.row} * p.block_table_stride + f.token / kBlockSize];
  };
  const uint32_t units = static_cast<uint32_t>(p.cache.block_stride / Tile::kUnit);
  int fill = 0, slot = 0;
  const auto copy = [&](const Fetch& f) {
    if (f.head >= 0) {
      if (lane == 0) tails[warp][fill] = f.tail;
      if (f.tail != kFullMask) {
        copy_code_tile<D>(p.cache.data + f.head * p.cache.head_stride,
                          p.codes,
                          static_cast<uint32_t>(safe_block(p.cache, f.id)) * units,
                          f.token % kBlockSize,
                          ring + fill * Tile::kBytes);
      }
    }
    copy_commit();
    fill = fill == kSlots - 1 ? 0 : fill + 1;
  };
  if (p.budgets != nullptr) wait_for_previous();

  Fetch with_token, with_block;
  {
    Fetch first[kSlots];
#pragma unroll
    for (int i = 0; i < kSlots; ++i) first[i] = look_up_tokens();
    with_token = look_up_tokens();
#pragma unroll
    for (int i = 0; i < kSlots; ++i) look_up_block(first[i]);
#pragma unroll
    for (int i = 0; i < kSlots - 1; ++i) copy(first[i]);
    with_block = first[kSlots - 1];
  }

  CodeAccumulator<T, D> a;
  const float scale = p.soft_cap > 0 ? p.scale : p.scale * kLog2e;
  int tile = share.begin + warp;
  for (int begin = share.begin; begin < share.end;) {
    here.advance(p, subs, begin);
    const int end = min(share.end, here.first + here.tiles);
    const int first_head = here.item % subs * kHeads;
    const int heads = min(kHeads, p.group - first_head);
    const int query_head = here.head * p.group + first_head;
    const T* query = reinterpret_cast<const T*>(static_cast<const uint8_t*>(p.query) +
                                                here.row * p.query_stride) +
                     query_head * D;
    a.begin(query, heads);
    for (; tile < end; tile += kWarps) {
      copy_wait<kSlots - 2>();
      __syncwarp();
      copy(with_block);
      look_up_block(with_token);
      with_block = with_token;
      with_token = look_up_tokens();
      const int at = (tile - here.first) * kTile, left = here.tokens.count - at;
      const uint32_t valid = left >= kTile ? 0xffffu : (1u << max(left, 0)) - 1;
      const uint32_t tail = tails[warp][slot], from = ring + slot * Tile::kBytes;
      if (tail != kFullMask) {
        uint32_t probabilities[2];
        a.add_keys(from, valid & ~tail, scale, p.soft_cap, probabilities);
        a.add_values(from, probabilities);
      }
      if (valid & tail) {
        const int any = __ffs(valid & tail) - 1;
        const auto row_of = [&](int t) {
          const int token =
              inside(token_of(here, at + (valid & tail & 1u << t ? t : any)), here.tokens.length);
          const int32_t* table = p.table(here.row);
          return reinterpret_cast<const T*>(
              tail_row(p, table, here.head, token / kBlockSize, token % kBlockSize));
        };
        a.add_rows(
            row_of(lane / 4), row_of(lane / 4 + 8), valid & tail, query, heads, scale, p.soft_cap);
      }
      slot = slot == kSlots - 1 ? 0 : slot + 1;
    }
    const auto finish = [&](int h, int d, const Merged& merged, const float4& sum) {
      const int length = here.tokens.length;
      store_four<T, true>(p, here.row, here.head, query_head + h, d, length, merged, sum);
    };
    __syncthreads();
    a.store(heads, merge + warp * kHeads * kPitch, kPitch, ends[warp]);
    merge_item<kHeads, D>(p, share, here, begin, end, heads, merge, ends, finish);
    begin = end;
  }
  copy_wait<0>();
}

template <int D>
void launch_size(const Device& device, const AttendArgs& p) {
  const auto kernel = p.cache.dtype == Dtype::kHalf ? attend_code_rows_kernel<__half, D>
                                                    : attend_code_rows_kernel<__nv_bfloat16, D>;
  const dim3 grid(device.num_sms < kMaxGrid ? device.num_sms : kMaxGrid);
  launch(device, kernel, 1, grid, 32 * kWarps, kWarps * warp_bytes<D>(), p, true);
}

}  // namespace

bool attend_code_rows_covers(const Device& device, const AttendArgs& p) {
  constexpr int kStaticShared = 2 * 1024;
  const int most = device.max_shared - kStaticShared;
  return CodeTile<64>::covers(p.cache)    ? kWarps * warp_bytes<64>() <= most
         : CodeTile<128>::covers(p.cache) ? kWarps * warp_bytes<128>() <= most
                                          : false;
}

void launch_attend_code_rows(const Device& device, const AttendArgs& p) {
  p.cache.head_size == 64 ? launch_size<64>(device, p) : launch_size<128>(device, p);
}

}  // namespace vllm_sparse::cuda
