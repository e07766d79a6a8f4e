// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// SparQ's approximate logits (arXiv 2312.04985, section 3) of all sealed blocks from 4-bit codes.
// A fixed grid cuts the blocks of all rows into equal shares; a warp takes two blocks at a time.
#include "channels.cuh"

namespace vllm_sparse::cuda {

namespace {

constexpr int kSlots = 3;  // steps of a warp under way
constexpr int kCodesOfStep = kStepChannels * kCodeBytes;
constexpr int kSlotBytes = 2 * (kCodesOfStep + kStepChannels * 4);
constexpr int kRingBytes = kScoreWarps * kSlots * kSlotBytes;

struct Shared {
  int padded_rank, padded_group;
  __host__ __device__ explicit Shared(const SelectArgs& p)
      : padded_rank(pad_to(p.rank, kStepChannels)), padded_group(pad_to(p.group, 4)) {}
  __host__ __device__ int query() const { return kRingBytes; }
  __host__ __device__ int lengths() const { return query() + padded_group * padded_rank * 2; }
  __host__ int64_t bytes(int64_t num_rows) const { return lengths() + num_rows * 4; }
};

__device__ inline int pairs_of(int length) { return (length / kBlockSize + 1) / 2; }

struct Share {
  int row, unit;  // where it begins: a pair of blocks of a row's KV heads
  int64_t count;
};

// This thread block's equal part of the pairs of all rows that need scores. `lengths` receives
// every row's length, 0 where everything is kept.
__device__ Share find_share(const SelectArgs& p, int* lengths) {
  __shared__ int warp_sums[kScoreWarps], begin_row, begin_unit;
  const int rows = static_cast<int>(p.num_rows), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int per_thread = (rows + kScoreThreads - 1) / kScoreThreads;
  const int first = min(rows, threadIdx.x * per_thread), end = min(rows, first + per_thread);
  int sum = 0;
  for (int row = first; row < end; ++row) {
    const RowPlan plan = plan_row(p, row);
    lengths[row] = plan.all ? 0 : plan.length;
    sum += pairs_of(lengths[row]);
  }
  int inclusive = sum;
  for (int i = 1; i < 32; i *= 2) {
    const int y = __shfl_up_sync(kFullMask, inclusive, i);
    if (lane >= i) inclusive += y;
  }
  if (lane == 31) warp_sums[warp] = inclusive;
  __syncthreads();
  int64_t before = inclusive - sum, total = 0;
  for (int w = 0; w < kScoreWarps; ++w) {
    if (w < warp) before += warp_sums[w];
    total += warp_sums[w];
  }
  const int heads = p.cache.num_kv_heads;
  total *= heads;
  before *= heads;
  const int64_t from = total * blockIdx.x / gridDim.x, to = total * (blockIdx.x + 1) / gridDim.x;
  if (before <= from && from < before + int64_t{sum} * heads) {
    int64_t rest = from - before;
    int row = first;
    for (; rest >= int64_t{pairs_of(lengths[row])} * heads; ++row) {
      rest -= int64_t{pairs_of(lengths[row])} * heads;
    }
    begin_row = row;
    begin_unit = static_cast<int>(rest);
  }
  __syncthreads();
  return {begin_row, begin_unit, to - from};
}

__device__ inline float fast_tanh(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// A capped logit in units of log2.
__device__ inline float cap_logit(float x, float soft_cap) {
  return soft_cap * kLog2e * fast_tanh(x / soft_cap);
}

__device__ inline __half2 max_over_tokens(__half2 x) {
#pragma unroll
  for (int i = 4; i < 32; i *= 2) {
    x = __hmax2(x, as_half2(__shfl_xor_sync(kFullMask, as_word(x), i)));
  }
  return x;
}

// Products of two blocks with four heads. Columns 0 to 3 of a tile are the first block's heads,
// columns 4 to 7 the second's: each block's codes meet zeros in the other's columns. Tile 2 n + ab
// holds, in rows 0 to 7 and 8 to 15, tokens t and t + 4 with t = 8 ab + 16 n + 64 (row & 1) + row /
// 2. Codes are taken less 8, which keeps the sums small; tiles of odd n are 16 times too large.
struct Products {
  float acc[8][4], center[4], offset[4];

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < 4; ++i) center[i] = offset[i] = 0;
#pragma unroll
    for (int k = 0; k < 8; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[k][i] = 0;
    }
  }

  // `query` of the lane's column: channels 2 p, 2 p + 1 and 8 more, of two tiles of 16. With
  // kOnly, this is the first and last step, and sums start from the center.
  template <bool kOnly>
  __device__ void add(uint32_t slot, const uint32_t (&query)[2][2]) {
    const int lane = threadIdx.x % 32, block = lane / 16;
    const uint32_t params = slot + 2 * kCodesOfStep + block * kStepChannels * 4 + lane % 4 * 8;
    constexpr uint32_t kOnes[4] = {0x3c003c00u, 0x3c003c00u, 0x3c003c00u, 0x3c003c00u};
    constexpr uint32_t kMinusEight[4] = {0x80088008u, 0x80088008u, 0x80088008u, 0x80088008u};
    uint32_t b[2][2][2];  // [block][tile of channels][register]
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      uint32_t scaled[2], middle[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        uint32_t x, y;
        asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];"
                     : "=r"(x), "=r"(y)
                     : "r"(params + (16 * s + 8 * j) * 4)
                     : "memory");
        const __half2 scale = as_half2(__byte_perm(x, y, 0x5410));
        const __half2 minimum = as_half2(__byte_perm(x, y, 0x7632));
        const __half2 q = as_half2(query[s][j]);
        scaled[j] = as_word(__hmul2(q, scale));
        // (minimum + 8 scale) without the query's shift
        const __half2 unshifted =
            __hmul2(minimum, __float2half2_rn(1.0f / (1 << kQueryShift)));
        const __half2 mid =
            __hfma2(scale, __float2half2_rn(8.0f / (1 << kQueryShift)), unshifted);
        middle[j] = as_word(__hmul2(q, mid));
        b[0][s][j] = block == 0 ? scaled[j] : 0;
        b[1][s][j] = block == 0 ? 0 : scaled[j];
      }
      mma<__half>(center, kMinusEight, scaled[0], scaled[1], center);
      mma<__half>(offset, kOnes, middle[0], middle[1], offset);
    }
    if constexpr (kOnly) {
#pragma unroll
      for (int k = 0; k < 8; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[k][i] = k & 2 ? 16 * center[i % 2] : center[i % 2];
      }
    }
    // Matrices of 8 channels and 16 bytes; their places are swizzled against bank conflicts.
    const int matrix = lane / 8, r = lane % 8;
    const uint32_t codes =
        slot + (8 * (matrix / 2) + r) * kCodeBytes + ((matrix % 2 ^ r / 2) * 16);
#pragma unroll
    for (int block_of = 0; block_of < 2; ++block_of) {
#pragma unroll
      for (int s = 0; s < 2; ++s) {
#pragma unroll
        for (int ab = 0; ab < 2; ++ab) {
          uint32_t words[4];
          load_matrices_transposed(
              words, (codes ^ (32 * ab)) + block_of * kCodesOfStep + 16 * s * kCodeBytes);
#pragma unroll
          for (int n = 0; n < 4; ++n) {
            uint32_t a[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              a[i] = (words[i] >> (n / 2 * 8)) & (n % 2 ? 0x00f000f0u : 0x000f000fu);
            }
            float(&sum)[4] = acc[2 * n + ab];
            mma<__half>(sum, a, b[block_of][s][0], b[block_of][s][1], sum);
          }
        }
      }
    }
  }

  // Exponentials of the lane's 16 tokens and two heads, relative to the block's maximum; that and
  // their sum as (top, sum) of each head.
  template <bool kCentered, bool kCap>
  __device__ float4 finish(float soft_cap, uint32_t (&words)[8]) {
    constexpr float kUnit = 1 << (24 - kQueryShift);
    if constexpr (!kCentered) {
#pragma unroll
      for (int k = 0; k < 8; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[k][i] += k & 2 ? 16 * center[i] : center[i];
      }
    }
    __half2 e[8][2];
    float2 top;
    if constexpr (kCap) {
      float2 peak = {-INFINITY, -INFINITY};
#pragma unroll
      for (int k = 0; k < 8; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          acc[k][i] = cap_logit(
              fmaf(acc[k][i], k & 2 ? kUnit / 16 : kUnit, offset[i]), soft_cap);
          float& highest = i % 2 ? peak.y : peak.x;
          highest = fmaxf(highest, acc[k][i]);
        }
      }
#pragma unroll
      for (int i = 4; i < 32; i *= 2) {
        peak.x = fmaxf(peak.x, __shfl_xor_sync(kFullMask, peak.x, i));
        peak.y = fmaxf(peak.y, __shfl_xor_sync(kFullMask, peak.y, i));
      }
#pragma unroll
      for (int k = 0; k < 8; ++k) {
#pragma unroll
        for (int t = 0; t < 2; ++t) {
          e[k][t] = exp2_half2(
              __floats2half2_rn(acc[k][2 * t] - peak.x, acc[k][2 * t + 1] - peak.y));
        }
      }
      top = peak;
    } else {
      __half2 highest[2];  // of even and of odd n
#pragma unroll
      for (int k = 0; k < 8; ++k) {
#pragma unroll
        for (int t = 0; t < 2; ++t) {
          e[k][t] = __floats2half2_rn(acc[k][2 * t], acc[k][2 * t + 1]);
          __half2& mine = highest[k / 2 % 2];
          mine = (k == 0 || k == 2) && t == 0 ? e[k][t] : __hmax2(mine, e[k][t]);
        }
      }
      const __half2 units[2] = {__float2half2_rn(kUnit), __float2half2_rn(kUnit / 16)};
      const __half2 peak = max_over_tokens(
          __hmax2(__hmul2(highest[0], units[0]), __hmul2(highest[1], units[1])));
#pragma unroll
      for (int k = 0; k < 8; ++k) {
#pragma unroll
        for (int t = 0; t < 2; ++t) {
          e[k][t] = exp2_half2(__hfma2(e[k][t], units[k / 2 % 2], __hneg2(peak)));
        }
      }
      top = __half22float2(peak);
      top.x += offset[0];
      top.y += offset[1];
    }
    __half2 sums[8];
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      words[k] = pack_exponentials(e[k][0], e[k][1]);
      sums[k] = __hadd2(e[k][0], e[k][1]);
    }
#pragma unroll
    for (int i = 4; i > 0; i /= 2) {
#pragma unroll
      for (int k = 0; k < i; ++k) sums[k] = __hadd2(sums[k], sums[k + i]);
    }
#pragma unroll
    for (int i = 4; i < 32; i *= 2) {
      sums[0] = __hadd2(sums[0], as_half2(__shfl_xor_sync(kFullMask, as_word(sums[0]), i)));
    }
    const float2 sum = __half22float2(sums[0]);
    return {top.x, sum.x, top.y, sum.y};
  }
};

// Brings codes and parameters of a step of two blocks into a slot: half a warp a block.
template <bool kFast>
struct Loader {
  int64_t codes_offset;
  uint32_t code[kFast ? 8 : 1], param[kFast ? 2 : 1];  // bytes from the codes' start, by copy
  uint32_t to_code, to_param;

  __device__ static int local(int copy) { return 4 * copy + threadIdx.x % 16 / 4; }
  __device__ uint32_t code_of(const int* channel, int copy) const {
    return channel[local(copy)] * kCodeBytes + threadIdx.x % 4 * 16;
  }
  __device__ uint32_t param_of(const SelectArgs& p, const int* channel, int copy) const {
    return p.cache.head_size * kCodeBytes + channel[threadIdx.x % 16 + 16 * copy] * 4;
  }
  __device__ Loader(const SelectArgs& p, const int* channel) {
    const int block = threadIdx.x % 32 / 16, r = threadIdx.x % 16;
    codes_offset = int64_t{kBlockSize} * 2 * p.cache.head_size * p.cache.element_size;
    to_code = block * kCodesOfStep + r / 4 * kCodeBytes + (r % 4 ^ r / 8) * 16;
    to_param = 2 * kCodesOfStep + (block * kStepChannels + r) * 4;
    if constexpr (kFast) {
#pragma unroll
      for (int i = 0; i < 8; ++i) code[i] = code_of(channel, i);
#pragma unroll
      for (int i = 0; i < 2; ++i) param[i] = param_of(p, channel, i);
    }
  }
  __device__ void copy(
      const SelectArgs& p, const int* channel, int step, const uint8_t* chunk, uint32_t slot) {
    const uint8_t* codes = chunk + codes_offset;
    const int left = p.rank - step * kStepChannels;
    channel += step * kStepChannels;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t to = slot + (to_code ^ (i % 2 * 32)) + i * 4 * kCodeBytes;
      if (4 * i < left - local(0)) copy_async_16(to, codes + (kFast ? code[i] : code_of(channel, i)));
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int bytes = threadIdx.x % 16 + 16 * i < left ? 4 : 0;  // NaN times 0 would be NaN
      copy_async_4(slot + to_param + i * 64,
                   codes + (kFast ? param[i] : param_of(p, channel, i)),
                   bytes);
    }
  }
};

// (top, sum) of the block that is not sealed, from exact keys: two threads a token.
template <class T>
__device__ void score_tail(
    const SelectArgs& p, const Channels& s, const uint8_t* chunk, int count, float2* stats) {
  float(&logits)[4][kBlockSize] = *s.logits;
  const int t = threadIdx.x / 2, part = threadIdx.x % 2, warp = threadIdx.x / 32;
  const T* key = reinterpret_cast<const T*>(chunk) + int64_t{t} * 2 * p.cache.head_size;
  for (int first = 0; first < 2 * p.pairs; first += 4) {
    float x[4] = {};
#pragma unroll 8
    for (int c = part; c < p.rank && t < count; c += 2) {
      const float k = to_float(key[s.channel[c]]);
#pragma unroll
      for (int h = 0; h < 4; ++h) {
        x[h] = fmaf(__half2float(s.query[(first + h) * s.padded_rank + c]), k, x[h]);
      }
    }
#pragma unroll
    for (int h = 0; h < 4; ++h) {
      x[h] = (x[h] + __shfl_xor_sync(kFullMask, x[h], 1)) / (1 << kQueryShift);
      if (p.soft_cap > 0) x[h] = cap_logit(x[h], p.soft_cap);
      if (part == 0) logits[h][t] = t < count ? x[h] : -INFINITY;
    }
    __syncthreads();
    if (warp < 4 && first + warp < 2 * p.pairs) {
      const int lane = threadIdx.x % 32;
      const float4 l = reinterpret_cast<const float4*>(logits[warp])[lane];
      float top = fmaxf(fmaxf(l.x, l.y), fmaxf(l.z, l.w));
      for (int i = 16; i > 0; i /= 2) top = fmaxf(top, __shfl_xor_sync(kFullMask, top, i));
      const float sum = warp_sum(fast_exp2(l.x - top) + fast_exp2(l.y - top) +
                                 fast_exp2(l.z - top) + fast_exp2(l.w - top));
      if (lane == 0) stats[first + warp] = {top, sum};
    }
    __syncthreads();
  }
}

template <bool kFast, bool kCap>
__device__ void score_item(const SelectArgs& p,
                           const Channels& s,
                           uint32_t ring,
                           int row,
                           int head,
                           int length,
                           int first_pair,
                           int count) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, sealed = length / kBlockSize;
  const int32_t* table = p.block_table + row * p.block_table_stride;
  const auto block_of = [&](int i) {  // of the warp's pair i, for the lane's half
    return min(2 * (first_pair + min(warp + i * kScoreWarps, count - 1)) + lane / 16, sealed - 1);
  };
  int32_t id = table[block_of(0)], next_id = table[block_of(1)];
  __syncthreads();  // the item before is through with shared memory
  switch (p.cache.dtype) {
    case Dtype::kHalf: prepare_channels<__half>(p, s, row, head); break;
    case Dtype::kBFloat16: prepare_channels<__nv_bfloat16>(p, s, row, head); break;
    default: prepare_channels<float>(p, s, row, head);
  }
  // A pair takes `parts` passes of the ring: steps of channels, again for every four heads.
  const int steps = kFast ? 1 : s.padded_rank / kStepChannels;
  const int parts = kFast ? 1 : steps * (s.padded_group / 4);
  const int pairs = warp < count ? (count - warp + kScoreWarps - 1) / kScoreWarps : 0;
  const int total = pairs * parts;
  Loader<kFast> loader(p, s.channel);
  int issued_pair = 0, issued_part = 0;
  uint32_t issue_slot = ring, slot = ring;
  const uint32_t ring_end = ring + kSlots * kSlotBytes;
  const auto issue = [&]() {
    if (issued_pair < pairs) {
      const uint8_t* chunk = chunk_of(p.cache, safe_block(p.cache, id), head);
      loader.copy(p, s.channel, kFast ? 0 : issued_part % steps, chunk, issue_slot);
      if (kFast || ++issued_part == parts) {
        issued_part = 0;
        ++issued_pair;
        id = next_id;
        next_id = table[block_of(issued_pair + 1)];
      }
    }
    copy_commit();
    issue_slot = issue_slot + kSlotBytes == ring_end ? ring : issue_slot + kSlotBytes;
  };
#pragma unroll
  for (int i = 0; i < kSlots - 1; ++i) issue();

  const int64_t item = int64_t{row} * p.cache.num_kv_heads + head;
  const int tail = length % kBlockSize;
  if (tail > 0 && 2 * (first_pair + count) >= sealed) {
    const uint8_t* chunk = chunk_of(p.cache, safe_block(p.cache, table[sealed]), head);
    float2* stats = p.stats + (item * p.max_blocks + sealed) * 2 * p.pairs;
    switch (p.cache.dtype) {
      case Dtype::kHalf: score_tail<__half>(p, s, chunk, tail, stats); break;
      case Dtype::kBFloat16: score_tail<__nv_bfloat16>(p, s, chunk, tail, stats); break;
      default: score_tail<float>(p, s, chunk, tail, stats);
    }
  }

  const int column = lane / 4 % 4;
  uint32_t query[2][2];
  const auto load_query = [&](int first_head, int step) {
    const __half* from = s.query + (first_head + column) * s.padded_rank + step * kStepChannels;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      query[i / 2][i % 2] =
          *reinterpret_cast<const uint32_t*>(from + i * 8 + lane % 4 * 2);
    }
  };
  if (kFast) load_query(0, 0);
  Products products;
  int pair = 0, part = 0;
  for (int i = 0; i < total; ++i) {
    copy_wait<kSlots - 2>();
    __syncwarp();
    issue();
    const int step = kFast ? 0 : part % steps, first_head = kFast ? 0 : part / steps * 4;
    if (step == 0) products.clear();
    if (!kFast) load_query(first_head, step);
    products.template add<kFast>(slot, query);
    slot = slot + kSlotBytes == ring_end ? ring : slot + kSlotBytes;
    if (step == steps - 1) {
      uint32_t words[8];
      const float4 stats = products.template finish<kFast, kCap>(p.soft_cap, words);
      const int block = 2 * (first_pair + warp + pair * kScoreWarps) + lane % 4 / 2;
      const int pair_of_heads = first_head / 2 + lane % 2;
      if (block < sealed && pair_of_heads < p.pairs) {
        const int64_t at = (item * p.max_blocks + block) * p.pairs + pair_of_heads;
        uint4* to = reinterpret_cast<uint4*>(p.scores + at * kPairBytes) + lane / 4 * 2;
        to[0] = make_uint4(words[0], words[1], words[2], words[3]);
        to[1] = make_uint4(words[4], words[5], words[6], words[7]);
        if (lane < 4) reinterpret_cast<float4*>(p.stats)[at] = stats;
      }
    }
    if (kFast || ++part == parts) {
      part = 0;
      ++pair;
    }
  }
  copy_wait<0>();
}

template <bool kFast, bool kCap>
__global__ void __launch_bounds__(kScoreThreads, 2) score_kernel(SelectArgs p) {
  extern __shared__ __align__(128) uint8_t dynamic[];
  __shared__ __align__(16) float magnitude[kMaxHeadSize];
  __shared__ int channel[kMaxHeadSize];
  __shared__ uint32_t selected[kMaxHeadSize / 32];
  __shared__ __align__(16) float logits[4][kBlockSize];
  wait_for_previous();
  let_next_begin();
  const Shared plan(p);
  const Channels s{magnitude,
                   channel,
                   selected,
                   reinterpret_cast<__half*>(dynamic + plan.query()),
                   &logits,
                   plan.padded_rank,
                   plan.padded_group};
  int* lengths = reinterpret_cast<int*>(dynamic + plan.lengths());
  const uint32_t ring = shared_address(dynamic) + threadIdx.x / 32 * kSlots * kSlotBytes;
  Share share = find_share(p, lengths);
  while (share.count > 0) {
    const int length = lengths[share.row], pairs = pairs_of(length);
    if (pairs > 0) {
      const int head = share.unit / pairs, first = share.unit % pairs;
      const int count = static_cast<int>(min(share.count, int64_t{pairs - first}));
      score_item<kFast, kCap>(p, s, ring, share.row, head, length, first, count);
      share.count -= count;
      share.unit += count;
    }
    if (share.unit == pairs * p.cache.num_kv_heads) {
      ++share.row;
      share.unit = 0;
    }
  }
}

}  // namespace

void launch_score(const Device& device, const SelectArgs& p) {
  const Shared plan(p);
  const bool fast = p.rank <= kStepChannels && p.group <= 4;
  const auto kernel = p.soft_cap > 0 ? fast ? score_kernel<true, true> : score_kernel<false, true>
                      : fast         ? score_kernel<true, false>
                                     : score_kernel<false, false>;
  launch(device,
         kernel,
         1,
         dim3(2 * device.num_sms),
         kScoreThreads,
         plan.bytes(p.num_rows),
         p,
         true);
}

}  // namespace vllm_sparse::cuda
