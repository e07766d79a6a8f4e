// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// Exact attention over listed tokens or whole contexts in fp16 and bf16. A fixed grid cuts the
// tokens of all (row, KV head) lists into equal shares; every warp streams tiles of 16 tokens
// through its own part of shared memory. Lists that several thread blocks share are merged by the
// last of them.
#include "attend/shares.cuh"
#include "attend/store_result.cuh"
#include "common/instructions.cuh"
#include "common/launch.cuh"

namespace vllm_sparse::cuda {

namespace {

constexpr int kMergeFloats = 1024;  // results of a warp that are merged at once
constexpr int kStaticShared = 2 * 1024;

// kD: head sizes up to this; kRows: query heads up to this, 8 or 16.
template <int kD, int kRows>
struct Config {
  static constexpr int kSlots = kD > 128 ? 3 : 4;
  static constexpr int kColumns = kD * kRows > kMergeFloats ? kMergeFloats / kRows : kD;
  static constexpr int kMergePitch = kColumns + 4;  // no bank conflicts in Accumulator::store
  static constexpr int kMergeBytes = kRows * kMergePitch * 4;
  static __host__ __device__ int pitch(int head_size) { return 4 * head_size + 16; }
  static __host__ __device__ int warp_bytes(int head_size) {
    return kSlots * kTile * pitch(head_size) + kMergeBytes;
  }
};

// A tile on its way: the token of the lane, then its block.
struct Fetch {
  int token, head, row;
  int32_t id;
};

template <int kD>
__device__ inline void copy_tile(const AttendArgs& p,
                                 const Fetch& f,
                                 uint32_t slot,
                                 int head_size) {
  // Lanes of one token's row, and how many times they have to copy 16 bytes.
  constexpr int kLanes = kD <= 64 ? 16 : 32, kTimes = kD <= 128 ? 1 : 2;
  const int lane = threadIdx.x % 32, chunks = head_size / 4;
  const int pitch = 4 * head_size + 16;
  const uint8_t* row = chunk_of(p.cache, safe_block(p.cache, f.id), f.head) +
                       int64_t{f.token % kBlockSize} * 4 * head_size;
  const uint64_t address = reinterpret_cast<uint64_t>(row);
#pragma unroll 4
  for (int i = 0; i < kTile * kLanes / 32; ++i) {
    const int t = i * (32 / kLanes) + lane / kLanes;
    const uint64_t from = __shfl_sync(kFullMask, address, t);
#pragma unroll
    for (int n = 0; n < kTimes; ++n) {
      const int chunk = lane % kLanes + n * kLanes;
      if (chunk < chunks) {
        copy_async_16(slot + t * pitch + chunk * 16,
                      reinterpret_cast<const uint8_t*>(from) + chunk * 16);
      }
    }
  }
}

template <class T, int kD, int kRows, bool kExact>
__global__ void __launch_bounds__(32 * kMaxWarps, 1)
    attend_rows_kernel(const __grid_constant__ AttendArgs p) {
  using C = Config<kD, kRows>;
  extern __shared__ __align__(128) uint8_t dynamic[];
  __shared__ float2 ends[kMaxWarps][kRows];
  __shared__ bool is_last;
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int head_size = kExact ? kD : p.cache.head_size, pitch = C::pitch(head_size);
  const int subs = (p.group + 15) / 16, slot_bytes = kTile * pitch;
  const int items = static_cast<int>(p.num_rows) * p.cache.num_kv_heads * subs;
  float* merge = reinterpret_cast<float*>(dynamic);  // [warps][kRows][kMergePitch]
  const uint32_t ring =
      shared_address(dynamic) + warps * C::kMergeBytes + warp * C::kSlots * slot_bytes;
  if (p.budgets == nullptr) wait_for_previous();
  let_next_begin();
  const Share share = find_share(p, subs, items);

  // Ahead of the products run, for every tile: its tokens, their blocks, their rows.
  Cursor ahead;
  ahead.item = share.item;
  ahead.first = share.item_first;
  if (share.begin < share.end) ahead.load(p, subs);
  Cursor here = ahead;
  int next = share.begin + warp;  // tile whose tokens are looked up next
  const auto look_up_tokens = [&]() {
    Fetch f = {0, -1, 0, 0};
    if (next < share.end) {
      ahead.advance(p, subs, next);
      const int at = (next - ahead.first) * kTile + lane % kTile;
      f.row = ahead.row;
      f.head = ahead.head;
      f.token = min(at, max(ahead.tokens.count - 1, 0));
      if (!ahead.tokens.all && ahead.tokens.count > 0) {
        f.token = p.indices[int64_t{ahead.list} * p.max_kept + f.token];
      }
      f.id = ahead.tokens.length - 1;  // until the block is known
    }
    next += warps;
    return f;
  };
  const auto look_up_block = [&](Fetch& f) {
    if (f.head < 0) return;
    f.token = min(max(f.token, 0), max(f.id, 0));
    f.id = p.block_table[int64_t{f.row} * p.block_table_stride + f.token / kBlockSize];
  };
  uint32_t fill = ring, slot = ring;
  const uint32_t ring_end = ring + C::kSlots * slot_bytes;
  const auto copy = [&](const Fetch& f) {
    if (f.head >= 0) copy_tile<kD>(p, f, fill, head_size);
    copy_commit();
    fill = fill + slot_bytes == ring_end ? ring : fill + slot_bytes;
  };
  // Queries need no selection: they are read while it may still run.
  Accumulator<T, kD, kRows> a;
  const auto begin_item = [&]() {
    const int first_head = here.item % subs * 16;
    a.begin(reinterpret_cast<const T*>(static_cast<const uint8_t*>(p.query) +
                                       here.row * p.query_stride) +
                (here.head * p.group + first_head) * head_size,
            min(16, p.group - first_head),
            head_size);
  };
  if (share.begin < share.end) begin_item();
  if (p.budgets != nullptr) wait_for_previous();

  Fetch with_token, with_block;
  {
    Fetch first[C::kSlots];
#pragma unroll
    for (int i = 0; i < C::kSlots; ++i) first[i] = look_up_tokens();
    with_token = look_up_tokens();
#pragma unroll
    for (int i = 0; i < C::kSlots; ++i) look_up_block(first[i]);
#pragma unroll
    for (int i = 0; i < C::kSlots - 1; ++i) copy(first[i]);
    with_block = first[C::kSlots - 1];
  }

  const float scale = p.soft_cap > 0 ? p.scale : p.scale * kLog2e;
  int tile = share.begin + warp;
  for (int begin = share.begin; begin < share.end;) {
    here.advance(p, subs, begin);
    const int end = min(share.end, here.first + here.tiles);
    const int first_head = here.item % subs * 16;
    const int heads = min(16, p.group - first_head);
    const int query_head = here.head * p.group + first_head;
    if (begin != share.begin) begin_item();
    for (; tile < end; tile += warps) {
      copy_wait<C::kSlots - 2>();
      __syncwarp();
      copy(with_block);
      look_up_block(with_token);
      with_block = with_token;
      with_token = look_up_tokens();
      const int left = here.tokens.count - (tile - here.first) * kTile;
      uint32_t probabilities[kRows / 8][2];
      a.add_keys(slot, pitch, head_size, left, scale, p.soft_cap, probabilities);
      a.add_values(slot + 2 * head_size, pitch, head_size, probabilities);
      slot = slot + slot_bytes == ring_end ? ring : slot + slot_bytes;
    }
    // Merge the warps, a range of columns at a time.
    const bool whole = begin == here.first && end == here.first + here.tiles;
    const int starter = share.block_of(here.first);
    float* mine = p.partials + (2 * int64_t{blockIdx.x} + (blockIdx.x == starter)) *
                                   partial_floats(p.group, head_size);
#pragma unroll
    for (int column = 0; column < kD; column += C::kColumns) {
      __syncthreads();
      a.store(column,
              column + C::kColumns,
              heads,
              merge + warp * kRows * C::kMergePitch,
              C::kMergePitch,
              ends[warp]);
      __syncthreads();
      const int columns = min(C::kColumns, head_size - column);
      for (int i = threadIdx.x; i * 4 < heads * columns; i += blockDim.x) {
        const int row = i * 4 / columns, d = i * 4 % columns;
        Merged merged;
        float4 sum = {};
        for (int w = 0; w < warps; ++w) {
          merged.add(
              ends[w][row].x,
              ends[w][row].y,
              *reinterpret_cast<const float4*>(merge + (w * kRows + row) * C::kMergePitch + d),
              sum);
        }
        if (whole) {
          store_four<T, false>(p,
                               here.row,
                               here.head,
                               query_head + row,
                               column + d,
                               here.tokens.length,
                               merged,
                               sum);
        } else {
          float* to = mine + row * (head_size + 4);
          reinterpret_cast<float4*>(to)[0] = make_float4(merged.top, merged.total, 0, 0);
          *reinterpret_cast<float4*>(to + 4 + column + d) = sum;
        }
      }
    }
    if (!whole) {
      const int last = share.block_of(here.first + here.tiles - 1);
      __threadfence();
      __syncthreads();
      if (threadIdx.x == 0) {
        // Wraps to zero with the last arrival, for the next launch.
        const uint32_t others = last - starter;
        is_last = atomicInc(p.arrivals + starter, others) == others;
      }
      __syncthreads();
      if (is_last) {
        __threadfence();
        for (int i = threadIdx.x; i * 4 < heads * head_size; i += blockDim.x) {
          const int row = i * 4 / head_size, d = i * 4 % head_size;
          Merged merged;
          float4 sum = {};
#pragma unroll 8
          for (int b = starter; b <= last; ++b) {
            const float* from =
                p.partials +
                (2 * int64_t{b} + (b == starter)) * partial_floats(p.group, head_size) +
                row * (head_size + 4);
            const float4 head = __ldcg(reinterpret_cast<const float4*>(from));
            merged.add(head.x, head.y, __ldcg(reinterpret_cast<const float4*>(from + 4 + d)), sum);
          }
          store_four<T, false>(
              p, here.row, here.head, query_head + row, d, here.tokens.length, merged, sum);
        }
      }
    }
    begin = end;
  }
  copy_wait<0>();
}

template <class T, int kD, int kRows, bool kExact>
void launch_kernel(const Device& device, const AttendArgs& p) {
  const int bytes = Config<kD, kRows>::warp_bytes(p.cache.head_size);
  int warps = kMaxWarps;
  while (warps > 1 && warps * bytes > device.max_shared - kStaticShared) warps /= 2;
  const dim3 grid(device.num_sms < kMaxGrid ? device.num_sms : kMaxGrid);
  launch(device,
         attend_rows_kernel<T, kD, kRows, kExact>,
         1,
         grid,
         32 * warps,
         warps * bytes,
         p,
         true);
}

template <class T, int kD>
void launch_size(const Device& device, const AttendArgs& p) {
  if (p.group > 8) return launch_kernel<T, kD, 16, false>(device, p);
  p.cache.head_size == kD ? launch_kernel<T, kD, 8, true>(device, p)
                          : launch_kernel<T, kD, 8, false>(device, p);
}

template <class T>
void launch_typed(const Device& device, const AttendArgs& p) {
  if (p.cache.head_size <= 64) return launch_size<T, 64>(device, p);
  if (p.cache.head_size <= 128) return launch_size<T, 128>(device, p);
  launch_size<T, 256>(device, p);
}

}  // namespace

void launch_attend_rows(const Device& device, const AttendArgs& p) {
  p.cache.dtype == Dtype::kHalf ? launch_typed<__half>(device, p)
                                : launch_typed<__nv_bfloat16>(device, p);
}

}  // namespace vllm_sparse::cuda
