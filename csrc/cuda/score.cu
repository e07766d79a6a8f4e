// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// SparQ's approximate logits (arXiv 2312.04985, section 3) of all sealed blocks from 4-bit codes.
// Warps of a fixed grid take equal shares of the blocks of all rows, two at a time.
#include "scores.cuh"

namespace vllm_sparse::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kSlots = 3;  // steps of a warp under way
constexpr int kCodesOfStep = kStepChannels * kCodeBytes;
constexpr int kSlotBytes = 2 * (kCodesOfStep + kStepChannels * 4);

// Work of one item: pairs of sealed blocks, then groups of the tokens after them.
__device__ inline int pairs_of(int length) { return (length / kBlockSize + 1) / 2; }
__device__ inline int units_of(int length) {
  return pairs_of(length) + (length % kBlockSize + kTailTokens - 1) / kTailTokens;
}

struct Share {
  int row, unit;  // where it begins, among the units of a row's KV heads
  int count;
};

// Units of a row that needs scores, 0 of others.
__device__ inline int row_units(const SelectArgs& p, int row) {
  const RowPlan plan = plan_row(p, row);
  return plan.all ? 0 : units_of(plan.length) * p.cache.num_kv_heads;
}

// The warp's equal part of all units.
__device__ Share find_share(const SelectArgs& p) {
  const int rows = static_cast<int>(p.num_rows), lane = threadIdx.x % 32;
  int total = 0;
#pragma unroll 4
  for (int row = lane; row < rows; row += 32) total += row_units(p, row);
  total = __reduce_add_sync(kFullMask, total);
  // Few units are spread over all multiprocessors.
  const int warps = gridDim.x * kWarps, warp = threadIdx.x / 32 * gridDim.x + blockIdx.x;
  const int each = total / warps, more = total - each * warps;
  const int begin = each * warp + min(warp, more), count = each + (warp < more);
  int before = 0;
  for (int first = 0; count > 0; first += 32) {
    const int units = first + lane < rows ? row_units(p, first + lane) : 0;
    int end = units;
    for (int i = 1; i < 32; i *= 2) {
      const int y = __shfl_up_sync(kFullMask, end, i);
      if (lane >= i) end += y;
    }
    const uint32_t beyond = __ballot_sync(kFullMask, before + end > begin);
    if (beyond) {
      const int found = __ffs(beyond) - 1;
      const int start = before + __shfl_sync(kFullMask, end - units, found);
      return {first + found, begin - start, count};
    }
    before += __shfl_sync(kFullMask, end, 31);
  }
  return {0, 0, 0};
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
  __device__ void begin(const SelectArgs& p, const int* channel) {
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

// (top, sum) of a group of tokens that are not sealed, from exact keys: two lanes a token.
template <class T>
__device__ void score_tail(
    const SelectArgs& p, const PreparedItem& item, const uint8_t* chunk, int first_token, int count,
    float2* stats) {
  const int lane = threadIdx.x % 32, t = lane / 2, part = lane % 2;
  const T* key = reinterpret_cast<const T*>(chunk) +
                 int64_t{first_token + min(t, count - 1)} * 2 * p.cache.head_size;
  for (int first = 0; first < 2 * p.pairs; first += 4) {
    float x[4] = {};
#pragma unroll 8
    for (int c = 2 * part; c < p.rank; c += 4) {
      const int2 channel = *reinterpret_cast<const int2*>(item.channel + c);
      const float k0 = to_float(key[channel.x]), k1 = to_float(key[channel.y]);
#pragma unroll
      for (int h = 0; h < 4; ++h) {
        const float2 q = __half22float2(*reinterpret_cast<const __half2*>(
            item.query + (first + h) * item.padded_rank + c));
        x[h] = fmaf(q.x, k0, fmaf(q.y, k1, x[h]));
      }
    }
#pragma unroll
    for (int h = 0; h < 4; ++h) {
      x[h] = (x[h] + __shfl_xor_sync(kFullMask, x[h], 1)) / (1 << kQueryShift);
      if (p.soft_cap > 0) x[h] = cap_logit(x[h], p.soft_cap);
      if (t >= count) x[h] = -INFINITY;
      float top = x[h];
#pragma unroll
      for (int i = 2; i < 32; i *= 2) top = fmaxf(top, __shfl_xor_sync(kFullMask, top, i));
      float sum = fast_exp2(x[h] - top);
#pragma unroll
      for (int i = 2; i < 32; i *= 2) sum += __shfl_xor_sync(kFullMask, sum, i);
      if (lane == 0 && first + h < 2 * p.pairs) stats[first + h] = {top, sum};
    }
  }
}

// Units [first_unit, first_unit + count) of one item.
template <bool kFast, bool kCap>
__device__ void score_item(const SelectArgs& p,
                           uint32_t ring,
                           int row,
                           int head,
                           int length,
                           int first_unit,
                           int count) {
  const int lane = threadIdx.x % 32, sealed = length / kBlockSize;
  const int64_t item = int64_t{row} * p.cache.num_kv_heads + head;
  const PreparedItem prepared(p, item);
  const int32_t* table = p.block_table + row * p.block_table_stride;
  const int64_t stat_row = item * (p.max_blocks + kBlockSize / kTailTokens);
  const int pairs = max(0, min(count, pairs_of(length) - first_unit));
  for (int unit = first_unit + pairs; unit < first_unit + count; ++unit) {
    const int group = unit - pairs_of(length), from = group * kTailTokens;
    const int tokens = min(kTailTokens, length % kBlockSize - from);
    const uint8_t* chunk = chunk_of(p.cache, safe_block(p.cache, table[sealed]), head);
    float2* stats = p.stats + (stat_row + sealed + group) * 2 * p.pairs;
    switch (p.cache.dtype) {
      case Dtype::kHalf: score_tail<__half>(p, prepared, chunk, from, tokens, stats); break;
      case Dtype::kBFloat16:
        score_tail<__nv_bfloat16>(p, prepared, chunk, from, tokens, stats);
        break;
      default: score_tail<float>(p, prepared, chunk, from, tokens, stats);
    }
  }
  if (pairs == 0) return;
  const auto block_of = [&](int pair) {  // for the lane's half
    return min(2 * (first_unit + min(pair, pairs - 1)) + lane / 16, sealed - 1);
  };
  int32_t id = table[block_of(0)], next_id = table[block_of(1)];
  // A pair takes `parts` passes of the ring: steps of channels, again for every four heads.
  const int steps = kFast ? 1 : prepared.padded_rank / kStepChannels;
  const int parts = kFast ? 1 : steps * (prepared.padded_group / 4);
  const int total = pairs * parts;
  Loader<kFast> loader;
  loader.begin(p, prepared.channel);
  const int column = lane / 4 % 4;
  uint32_t query[2][2];
  const auto load_query = [&](int first_head, int step) {
    const __half* from = prepared.query + (first_head + column) * prepared.padded_rank +
                         step * kStepChannels + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      query[i / 2][i % 2] = *reinterpret_cast<const uint32_t*>(from + i * 8);
    }
  };
  if (kFast) load_query(0, 0);
  int issued_pair = 0, issued_part = 0;
  uint32_t issue_slot = ring, slot = ring;
  const uint32_t ring_end = ring + kSlots * kSlotBytes;
  const auto issue = [&]() {
    if (issued_pair < pairs) {
      const uint8_t* chunk = chunk_of(p.cache, safe_block(p.cache, id), head);
      loader.copy(p, prepared.channel, kFast ? 0 : issued_part % steps, chunk, issue_slot);
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
#pragma unroll 1
  for (int i = 0; i < kSlots - 1; ++i) issue();

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
      const int block = 2 * (first_unit + pair) + lane % 4 / 2;
      const int pair_of_heads = first_head / 2 + lane % 2;
      if (block < sealed && pair_of_heads < p.pairs) {
        const int64_t at = (item * p.max_blocks + block) * p.pairs + pair_of_heads;
        uint4* to = reinterpret_cast<uint4*>(p.scores + at * kPairBytes) + lane / 4 * 2;
        to[0] = make_uint4(words[0], words[1], words[2], words[3]);
        to[1] = make_uint4(words[4], words[5], words[6], words[7]);
        if (lane < 4) {
          reinterpret_cast<float4*>(p.stats)[(stat_row + block) * p.pairs + pair_of_heads] = stats;
        }
      }
    }
    if (kFast || ++part == parts) {
      part = 0;
      ++pair;
    }
  }
  copy_wait<0>();
  __syncwarp();
}

template <bool kFast, bool kCap>
__global__ void __launch_bounds__(kThreads, 2) score_kernel(SelectArgs p) {
  extern __shared__ __align__(128) uint8_t dynamic[];
  const uint32_t ring = shared_address(dynamic) + threadIdx.x / 32 * kSlots * kSlotBytes;
  let_next_begin();
  Share share = find_share(p);
  wait_for_previous();
  while (share.count > 0) {
    const RowPlan plan = plan_row(p, share.row);
    const int units = plan.all ? 0 : units_of(plan.length);
    if (units > 0) {
      const int head = share.unit / units, first = share.unit - head * units;
      const int count = min(share.count, units - first);
      score_item<kFast, kCap>(p, ring, share.row, head, plan.length, first, count);
      share.count -= count;
      share.unit += count;
    }
    if (share.unit == units * p.cache.num_kv_heads) {
      ++share.row;
      share.unit = 0;
    }
  }
}

}  // namespace

void launch_score(const Device& device, const SelectArgs& p) {
  const bool fast = p.rank <= kStepChannels && p.group <= 4;
  const auto kernel = p.soft_cap > 0 ? fast ? score_kernel<true, true> : score_kernel<false, true>
                      : fast         ? score_kernel<true, false>
                                     : score_kernel<false, false>;
  const dim3 grid(2 * device.num_sms);
  launch(device, kernel, 1, grid, kThreads, kWarps * kSlots * kSlotBytes, p, true);
}

}  // namespace vllm_sparse::cuda
