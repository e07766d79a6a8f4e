// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// SparQ selection (arXiv 2312.04985, section 3). A cluster of thread blocks serves one (row, KV
// head): each block scores its share of the context and keeps the scores in shared memory, then
// they agree on the softmax's normaliser and on the threshold, and write the list in order.
#include "kernels.h"
#include "score.cuh"

namespace vllm_sparse::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kBins = 2048;
constexpr int kStaticShared = 28 * 1024;  // what the kernel declares, and 1 KiB of the system's

__host__ __device__ inline int pad_to(int value, int multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Scores of 128 tokens: half x[group][128] (logits less the block's maximum: fp16's error stays
// small where it matters), float top[group] (those maxima), and uint32 key[128]: the ranking, which
// takes the logits' place where they are not needed any more.
struct Record {
  uint8_t* base;
  int group;
  bool keep_logits;
  __host__ __device__ static int logit_bytes(int group) {
    return kBlockSize * 2 * (group > 2 ? group : 2);
  }
  __host__ __device__ static int bytes(int group, bool keep_logits) {
    return logit_bytes(group) + pad_to(group * 4, 16) + (keep_logits ? kBlockSize * 4 : 0);
  }
  __device__ __half* x(int head) const {
    return reinterpret_cast<__half*>(base) + head * kBlockSize;
  }
  __device__ float* top() const { return reinterpret_cast<float*>(base + logit_bytes(group)); }
  __device__ uint32_t* key() const {
    const int offset = keep_logits ? logit_bytes(group) + pad_to(group * 4, 16) : 0;
    return reinterpret_cast<uint32_t*>(base + offset);
  }
};

// Shared memory of one thread block, in this order.
struct Shared {
  int padded_rank, pitch, head_size, group, max_ids;
  __host__ __device__ int floats() const {
    // query, raw query, channels, magnitudes; per head: maximum, sum, coefficient, mass; block ids
    return pad_to(
        padded_rank * pitch + group * head_size + padded_rank + head_size + 4 * pitch + max_ids, 4);
  }
  __host__ __device__ int bytes() const { return floats() * 4; }
};

__host__ __device__ inline Shared shared_plan(const SelectArgs& p) {
  Shared s;
  s.padded_rank = pad_to(p.rank, 96);  // a whole number of steps of 2 or 3 tiles
  s.pitch = pad_to(p.group, 8);
  s.head_size = p.cache.head_size;
  s.group = p.group;
  s.max_ids = static_cast<int>((p.max_blocks + p.cluster - 1) / p.cluster);
  return s;
}

// The logarithm of a sum of exponentials, merged pair by pair.
struct Normaliser {
  float top = -INFINITY, sum = 0;
  __device__ void merge(float other_top, float other_sum) {
    const float m = fmaxf(top, other_top);
    if (m == -INFINITY) return;
    sum = sum * fast_exp2((top - m) * kLog2e) + other_sum * fast_exp2((other_top - m) * kLog2e);
    top = m;
  }
};

__device__ inline float cap_logit(float x, float soft_cap) {
  return soft_cap > 0 ? soft_cap * tanhf(x / soft_cap) : x;
}

// The rank largest sums of |q| over the group, and the queries restricted to them.
__device__ void prepare_queries(const SelectArgs& p,
                                const Shared& s,
                                int64_t row,
                                int head,
                                float* query,
                                float* raw,
                                int* channel,
                                float* magnitude,
                                float* factor) {
  const void* from = static_cast<const uint8_t*>(p.query) + row * p.query_stride;
  const int size = s.head_size;
  for (int i = threadIdx.x; i < p.group * size; i += kThreads) {
    raw[i] = load_float(from, int64_t{head} * p.group * size + i, p.cache.dtype);
  }
  __syncthreads();
  for (int d = threadIdx.x; d < size; d += kThreads) {
    float sum = 0;
    for (int g = 0; g < p.group; ++g) sum += fabsf(raw[g * size + d]);
    magnitude[d] = sum >= 0 ? sum : 0;  // NaN compares with nothing
  }
  __syncthreads();
  for (int d = threadIdx.x; d < size; d += kThreads) {
    const float mine = magnitude[d];
    int place = 0;
#pragma unroll 4
    for (int e = 0; e < size; e += 4) {
      const float4 m = *reinterpret_cast<const float4*>(magnitude + e);
      place += (m.x > mine || (m.x == mine && e < d)) + (m.y > mine || (m.y == mine && e + 1 < d)) +
               (m.z > mine || (m.z == mine && e + 2 < d)) +
               (m.w > mine || (m.w == mine && e + 3 < d));
    }
    if (place < p.rank) channel[place] = d;
  }
  __syncthreads();
  for (int c = p.rank + threadIdx.x; c < s.padded_rank; c += kThreads) channel[c] = channel[0];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int g = warp; g < p.group; g += kWarps) {
    float all = 0, read = 0;
    for (int d = lane; d < size; d += 32) all += fabsf(raw[g * size + d]);
    for (int c = lane; c < p.rank; c += 32) read += fabsf(raw[g * size + channel[c]]);
    all = warp_sum(all);
    read = warp_sum(read);
    if (lane == 0) factor[g] = read > 0 ? p.scale * sqrtf(all / read) : 0.0f;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < s.padded_rank * s.pitch; i += kThreads) {
    const int c = i / s.pitch, g = i % s.pitch;
    query[i] = c < p.rank && g < p.group ? raw[g * size + channel[c]] * factor[g] : 0.0f;
  }
  __syncthreads();
}

// Writes a finished block's logits into its record and returns nothing but the running sums.
template <bool kWide>
__device__ void store_logits(const SelectArgs& p,
                             Logits<kWide>& logits,
                             const Record& record,
                             int first_head,
                             Normaliser (&sums)[2]) {
  constexpr int kTiles = Logits<kWide>::kTokenTiles;
  float x[kTiles][2][2];
  logits.finish(x);
  const int tile = logits.lane_tile(), word = threadIdx.x % 32 / 4;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int head = first_head + logits.lane_head() + h;
    float top = -INFINITY;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        if (p.soft_cap > 0) x[j][h][t] = cap_logit(x[j][h][t], p.soft_cap);
        top = fmaxf(top, x[j][h][t]);
      }
    }
    if (!kWide) top = fmaxf(top, __shfl_xor_sync(kFullMask, top, 2));
    for (int i = 4; i < 32; i *= 2) top = fmaxf(top, __shfl_xor_sync(kFullMask, top, i));
    float sum = 0;
    const bool valid = head < p.group;
    __half* out = record.x(valid ? head : 0);
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const __half2 rounded = __floats2half2_rn(x[j][h][0] - top, x[j][h][1] - top);
      const float2 e = __half22float2(rounded);
      sum += fast_exp2(e.x * kLog2e) + fast_exp2(e.y * kLog2e);
      if (valid) *reinterpret_cast<__half2*>(out + 16 * (tile + j) + 2 * word) = rounded;
    }
    sums[h].merge(top, sum);
    if (valid && word == 0 && (kWide || threadIdx.x % 4 < 2)) record.top()[head] = top;
  }
}

// Scores sealed blocks [first + warp, sealed) of this thread block's share, all their heads.
template <bool kWide, int K>
__device__ void score_sealed(const SelectArgs& p,
                             const ScoreQuery& query,
                             const int32_t* ids,
                             int head,
                             int sealed,
                             uint8_t* records,
                             int first_head,
                             Normaliser (&sums)[2]) {
  const int steps = (p.rank + 16 * K - 1) / (16 * K), warp = threadIdx.x / 32;
  const int64_t offset = int64_t{kBlockSize} * 2 * p.cache.head_size * p.cache.element_size;
  const int record_bytes = Record::bytes(p.group, p.kept_mass != nullptr);
  if (warp >= sealed) return;
  Codes<K> next;
  next.load(query, chunk_of(p.cache, ids[warp], head) + offset, p.cache.head_size, 0);
  Logits<kWide> logits;
  // One step ahead of the products, loads are under way.
  for (int b = warp; b < sealed; b += kWarps) {
    logits.clear();
    for (int step = 0; step < steps; ++step) {
      const Codes<K> codes = next;
      const int c = step + 1 < steps ? step + 1 : 0;
      const int nb = c ? b : b + kWarps;
      if (nb < sealed) {
        const uint8_t* chunk = chunk_of(p.cache, ids[nb], head) + offset;
        next.load(query, chunk, p.cache.head_size, 16 * K * c);
      }
      logits.template add<K>(query, codes, 16 * K * step, first_head);
    }
    store_logits<kWide>(p,
                        logits,
                        Record{records + b * record_bytes, p.group, p.kept_mass != nullptr},
                        first_head,
                        sums);
  }
}

// The block that is not sealed, from exact keys: eight lanes a token. `logits` has room for four
// heads.
__device__ void score_tail(const SelectArgs& p,
                           const ScoreQuery& query,
                           const uint8_t* chunk,
                           int head_size,
                           int count,
                           const Record& record,
                           float (*logits)[kBlockSize],
                           float* top,
                           float* sum) {
  const int part = threadIdx.x % 8, warp = threadIdx.x / 32;
  for (int first = 0; first < p.group; first += 4) {
#pragma unroll
    for (int step = 0; step < kBlockSize * 8 / kThreads; ++step) {
      const int t = threadIdx.x / 8 + step * (kThreads / 8);
      float x[4] = {};
#pragma unroll 4
      for (int c = part; c < p.rank && t < count; c += 8) {
        const float k =
            load_float(chunk, int64_t{t} * 2 * head_size + query.channel[c], p.cache.dtype);
        const float4 q = *reinterpret_cast<const float4*>(query.query + c * query.pitch + first);
        x[0] = fmaf(q.x, k, x[0]);
        x[1] = fmaf(q.y, k, x[1]);
        x[2] = fmaf(q.z, k, x[2]);
        x[3] = fmaf(q.w, k, x[3]);
      }
#pragma unroll
      for (int h = 0; h < 4; ++h) {
        x[h] += __shfl_xor_sync(kFullMask, x[h], 1);
        x[h] += __shfl_xor_sync(kFullMask, x[h], 2);
        x[h] += __shfl_xor_sync(kFullMask, x[h], 4);
        if (part == h) logits[h][t] = t < count ? cap_logit(x[h], p.soft_cap) : -INFINITY;
      }
    }
    __syncthreads();
    const int g = first + warp;
    if (warp < 4 && g < p.group) {
      const int lane = threadIdx.x % 32;
      const float4 x = reinterpret_cast<const float4*>(logits[warp])[lane];
      float m = fmaxf(fmaxf(x.x, x.y), fmaxf(x.z, x.w));
      for (int i = 16; i > 0; i >>= 1) m = fmaxf(m, __shfl_xor_sync(kFullMask, m, i));
      __half2* out = reinterpret_cast<__half2*>(record.x(g)) + 2 * lane;
      out[0] = __floats2half2_rn(x.x - m, x.y - m);
      out[1] = __floats2half2_rn(x.z - m, x.w - m);
      const float2 a = __half22float2(out[0]), b = __half22float2(out[1]);
      const float s = warp_sum(fast_exp2(a.x * kLog2e) + fast_exp2(a.y * kLog2e) +
                               fast_exp2(b.x * kLog2e) + fast_exp2(b.y * kLog2e));
      if (lane == 0) {
        Normaliser both{top[g], sum[g]};
        both.merge(m, s);
        top[g] = both.top;
        sum[g] = both.sum;
        record.top()[g] = m;
      }
    }
    __syncthreads();
  }
}

template <bool kWide, int K>
__device__ void score_heads(const SelectArgs& p,
                            const ScoreQuery& query,
                            const int32_t* ids,
                            int head,
                            int sealed,
                            uint8_t* records,
                            float* scratch,
                            float* top,
                            float* sum) {
  constexpr int kHeads = Logits<kWide>::kHeads;
  for (int first = 0; first < p.group; first += kHeads) {
    Normaliser sums[2];
    score_sealed<kWide, K>(p, query, ids, head, sealed, records, first, sums);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      // Lanes hold different tokens of the same head.
      for (int i = kWide ? 4 : 2; i < 32; i *= 2) {
        const float t = __shfl_xor_sync(kFullMask, sums[h].top, i);
        const float s = __shfl_xor_sync(kFullMask, sums[h].sum, i);
        sums[h].merge(t, s);
      }
      if (lane < (kWide ? 4 : 2)) {
        const int slot = warp * 8 + Logits<kWide>::lane_head() + h;
        scratch[2 * slot] = sums[h].top;
        scratch[2 * slot + 1] = sums[h].sum;
      }
    }
    __syncthreads();
    if (threadIdx.x < kHeads && first + threadIdx.x < p.group) {
      Normaliser all;
      for (int w = 0; w < kWarps; ++w) {
        all.merge(scratch[2 * (w * 8 + threadIdx.x)], scratch[2 * (w * 8 + threadIdx.x) + 1]);
      }
      top[first + threadIdx.x] = all.top;
      sum[first + threadIdx.x] = all.sum;
    }
    __syncthreads();
  }
}

// Exclusive sum over the thread block; `total` receives the whole.
__device__ inline uint32_t block_scan(uint32_t x, uint32_t* warp_sums, uint32_t& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint32_t inclusive = x;
  for (int i = 1; i < 32; i *= 2) {
    const uint32_t y = __shfl_up_sync(kFullMask, inclusive, i);
    if (lane >= i) inclusive += y;
  }
  if (lane == 31) warp_sums[warp] = inclusive;
  __syncthreads();
  uint32_t before = 0;
  total = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before += warp_sums[w];
    total += warp_sums[w];
  }
  __syncthreads();
  return before + inclusive - x;
}

// Where the ranking is cut: keys whose upper bits exceed `prefix` are kept, and of those that
// equal it the first `need`.
struct Threshold {
  uint32_t prefix = 0, need = 0;
  int shift = 31;
  __device__ int compare(uint32_t key) const {
    const uint32_t upper = key >> shift;
    return upper > prefix ? 1 : upper == prefix ? 0 : -1;
  }
};

// One level of a radix select over the cluster's histograms: every thread block adds up one slice
// of the bins, then all look into the slice in which the wanted count is reached.
__device__ void find_bin(uint32_t* histogram,
                         uint32_t* slice,  // [kBins / C] sums, then their total
                         uint32_t* scratch,
                         int rank,
                         int C,
                         uint32_t& bin,
                         uint32_t& need,
                         uint32_t& bin_count) {
  const int size = kBins / C, per_thread = size / kThreads, mine = threadIdx.x * per_thread;
  cluster_sync(C);
  // Slices and bins are numbered from the top: the largest keys come first.
  uint32_t sum = 0, total;
  for (int i = 0; i < per_thread; ++i) {
    const int b = kBins - 1 - (rank * size + mine + i);
    uint32_t all = 0;
#pragma unroll 8
    for (int r = 0; r < C; ++r) all += cluster_at(histogram, r, C)[b];
    slice[mine + i] = all;
    sum += all;
  }
  block_scan(sum, scratch, total);
  if (threadIdx.x == 0) slice[size] = total;
  cluster_sync(C);
  int which = 0;
  uint32_t before = 0;
  for (int r = 0; r < C - 1; ++r) {
    const uint32_t in_slice = cluster_at(slice, r, C)[size];
    if (before + in_slice >= need) break;
    before += in_slice;
    ++which;
  }
  const uint32_t* bins = cluster_at(slice, which, C) + mine;
  sum = 0;
  for (int i = 0; i < per_thread; ++i) sum += bins[i];
  uint32_t seen = before + block_scan(sum, scratch, total);
  if (seen < need && seen + sum >= need) {
    int i = 0;
    while (seen + bins[i] < need) seen += bins[i++];
    scratch[kWarps] = kBins - 1 - (which * size + mine + i);
    scratch[kWarps + 1] = need - seen;
    scratch[kWarps + 2] = bins[i];
  }
  __syncthreads();
  bin = scratch[kWarps];
  need = scratch[kWarps + 1];
  bin_count = scratch[kWarps + 2];
  __syncthreads();
}

__device__ inline void keep_all(const SelectArgs& p, int64_t item) {
  if (threadIdx.x == 0) p.counts[item] = -1;
  for (int g = threadIdx.x; p.kept_mass != nullptr && g < p.group; g += kThreads) {
    p.kept_mass[item * p.group + g] = 1.0f;
  }
}

template <bool kWide, int K>
__global__ void __launch_bounds__(kThreads, 2) select_kernel(SelectArgs p) {
  __shared__ uint32_t histogram[2][kBins];
  __shared__ __align__(16) uint32_t slice[kBins + 4];
  __shared__ uint32_t scratch[kWarps * 16];
  __shared__ uint2 counted;  // kept above the threshold, equal to it, in this thread block's share
  extern __shared__ __align__(16) uint8_t dynamic[];

  const int C = p.cluster;
  const int64_t item = blockIdx.x / C, row = item / p.cache.num_kv_heads;
  const int rank = blockIdx.x % C, head = static_cast<int>(item % p.cache.num_kv_heads);
  const int length =
      static_cast<int>(min(int64_t{p.seq_lens[row]}, p.max_blocks * int64_t{kBlockSize}));
  const int budget = p.budgets[row];
  const int sealed = max(length, 0) / kBlockSize;
  const int recent = max(0, min(length - p.local_window, sealed * kBlockSize));
  if (budget < 0 || budget >= length || recent <= p.sink_tokens) {
    if (rank == 0) keep_all(p, item);
    return;
  }
  const int sinks = min(p.sink_tokens, recent);
  const int wanted = max(0, budget - sinks - (length - recent));

  const Shared s = shared_plan(p);
  float* query = reinterpret_cast<float*>(dynamic);
  float* raw = query + s.padded_rank * s.pitch;
  float* magnitude = raw + s.group * s.head_size;
  int* channel = reinterpret_cast<int*>(magnitude + s.head_size);
  float* top = reinterpret_cast<float*>(channel + s.padded_rank);
  float* sum = top + s.pitch;
  float* coefficient = sum + s.pitch;
  float* mass = coefficient + s.pitch;
  int32_t* ids = reinterpret_cast<int32_t*>(mass + s.pitch);

  // This thread block's share of the context.
  const int blocks = (length + kBlockSize - 1) / kBlockSize;
  const int first = static_cast<int>(int64_t{blocks} * rank / C);
  const int count = static_cast<int>(int64_t{blocks} * (rank + 1) / C) - first;
  const int record_bytes = Record::bytes(p.group, p.kept_mass != nullptr);
  uint8_t* records = dynamic + s.bytes();
  if (count > p.shared_records) {
    records = p.workspace + (item * p.max_blocks + first) * record_bytes;
  }
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const int32_t id = p.block_table[row * p.block_table_stride + first + i];
    ids[i] = static_cast<int32_t>(safe_block(p.cache, id));
  }
  for (int i = threadIdx.x; i < 2 * kBins; i += kThreads) histogram[0][i] = 0;
  prepare_queries(p, s, row, head, query, raw, channel, magnitude, coefficient);

  const ScoreQuery score_query{query, channel, s.pitch};
  const int sealed_here = min(count, max(0, sealed - first));
  score_heads<kWide, K>(
      p, score_query, ids, head, sealed_here, records, reinterpret_cast<float*>(scratch), top, sum);
  if (sealed_here < count) {
    score_tail(p,
               score_query,
               chunk_of(p.cache, ids[count - 1], head),
               s.head_size,
               length % kBlockSize,
               Record{records + (count - 1) * record_bytes, p.group, p.kept_mass != nullptr},
               reinterpret_cast<float (*)[kBlockSize]>(slice),
               top,
               sum);
  }
  cluster_sync(C);
  // Probability = exp2(x * log2e + coefficient + top * log2e).
  for (int g = threadIdx.x; g < p.group; g += kThreads) {
    Normaliser all;
    for (int r = 0; r < C; ++r) all.merge(cluster_at(top, r, C)[g], cluster_at(sum, r, C)[g]);
    coefficient[g] = -all.top * kLog2e - log2f(all.sum);
  }
  __syncthreads();

  // Pool over the group, and rank: bits of a float that is not negative sort like the float.
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int b = warp; b < count; b += kWarps) {
    const Record record{records + b * record_bytes, p.group, p.kept_mass != nullptr};
    float pooled[4] = {};
    for (int g = 0; g < p.group; ++g) {
      const float c = coefficient[g] + record.top()[g] * kLog2e;
      const uint2 raw4 = reinterpret_cast<const uint2*>(record.x(g))[lane];
      const float2 a = __half22float2(reinterpret_cast<const __half2&>(raw4.x));
      const float2 d = __half22float2(reinterpret_cast<const __half2&>(raw4.y));
      pooled[0] += fast_exp2(fmaf(a.x, kLog2e, c));
      pooled[1] += fast_exp2(fmaf(a.y, kLog2e, c));
      pooled[2] += fast_exp2(fmaf(d.x, kLog2e, c));
      pooled[3] += fast_exp2(fmaf(d.y, kLog2e, c));
    }
    uint32_t k[4];
    const int position = (first + b) * kBlockSize + 4 * lane;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      k[i] = pooled[i] > 0 ? __float_as_uint(pooled[i]) : 0;
      const bool candidate = position + i >= sinks && position + i < recent;
      if (candidate) atomicAdd(&histogram[0][k[i] >> 20], 1);
    }
    __syncwarp();  // keys may take the place of logits that other lanes have read
    reinterpret_cast<uint4*>(record.key())[lane] = make_uint4(k[0], k[1], k[2], k[3]);
  }

  Threshold threshold;
  threshold.need = wanted;
  threshold.prefix = 1;  // nothing reaches it
  if (wanted > 0) {
    uint32_t bin, in_bin;
    find_bin(histogram[0], slice, scratch, rank, C, bin, threshold.need, in_bin);
    threshold.prefix = bin;
    threshold.shift = 20;
    for (int level = 1; level < 3 && in_bin != threshold.need; ++level) {
      uint32_t* bins = histogram[level % 2];
      if (level == 2) {
        for (int i = threadIdx.x; i < kBins; i += kThreads) bins[i] = 0;
        __syncthreads();
      }
      for (int b = warp; b < count; b += kWarps) {
        const Record record{records + b * record_bytes, p.group, p.kept_mass != nullptr};
        const uint4 keys = reinterpret_cast<const uint4*>(record.key())[lane];
        const uint32_t k[4] = {keys.x, keys.y, keys.z, keys.w};
        const int position = (first + b) * kBlockSize + 4 * lane;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const bool candidate = position + i >= sinks && position + i < recent;
          if (candidate && threshold.compare(k[i]) == 0) {
            atomicAdd(&bins[(k[i] >> (threshold.shift - 10)) & 1023], 1);
          }
        }
      }
      find_bin(bins, slice, scratch, rank, C, bin, threshold.need, in_bin);
      threshold.prefix = threshold.prefix << 10 | bin;
      threshold.shift -= 10;
    }
  }

  // Lists are written in order: warps own contiguous blocks, counted first and written then.
  const int warp_first = count * warp / kWarps, warp_end = count * (warp + 1) / kWarps;
  uint32_t above = 0, equal = 0;
  for (int b = warp_first; b < warp_end; ++b) {
    const Record record{records + b * record_bytes, p.group, p.kept_mass != nullptr};
    const uint4 keys = reinterpret_cast<const uint4*>(record.key())[lane];
    const uint32_t k[4] = {keys.x, keys.y, keys.z, keys.w};
    const int position = (first + b) * kBlockSize + 4 * lane;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool candidate = position + i >= sinks && position + i < recent;
      const int order = threshold.compare(k[i]);
      above += candidate && order > 0;
      equal += candidate && order == 0;
    }
  }
  uint32_t total_above, total_equal;
  above = __reduce_add_sync(kFullMask, above);
  equal = __reduce_add_sync(kFullMask, equal);
  uint32_t above_before = block_scan(lane == 0 ? above : 0, scratch, total_above);
  uint32_t equal_before = block_scan(lane == 0 ? equal : 0, scratch, total_equal);
  above_before = __shfl_sync(kFullMask, above_before, 0);
  equal_before = __shfl_sync(kFullMask, equal_before, 0);
  if (threadIdx.x == 0) counted = make_uint2(total_above, total_equal);
  cluster_sync(C);
  for (int r = 0; r < rank; ++r) {
    const uint2 other = *cluster_at(&counted, r, C);
    above_before += other.x;
    equal_before += other.y;
  }
  int32_t* out = p.indices + item * p.max_kept;
  for (int b = warp_first; b < warp_end; ++b) {
    const Record record{records + b * record_bytes, p.group, p.kept_mass != nullptr};
    const uint4 keys = reinterpret_cast<const uint4*>(record.key())[lane];
    uint32_t k[4] = {keys.x, keys.y, keys.z, keys.w};
    const int position = (first + b) * kBlockSize + 4 * lane;
    uint32_t mine = 0;  // above in the low half, equal in the high half
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool candidate = position + i >= sinks && position + i < recent;
      const int order = candidate ? threshold.compare(k[i]) : -1;
      mine += order > 0 ? 1u : order == 0 ? 1u << 16 : 0u;
    }
    uint32_t inclusive = mine;
    for (int i = 1; i < 32; i *= 2) {
      const uint32_t y = __shfl_up_sync(kFullMask, inclusive, i);
      if (lane >= i) inclusive += y;
    }
    const uint32_t whole = __shfl_sync(kFullMask, inclusive, 31);
    const uint32_t before = inclusive - mine;
    uint32_t a = above_before + (before & 0xffff), e = equal_before + (before >> 16);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int t = position + i;
      const bool candidate = t >= sinks && t < recent;
      const int order = candidate ? threshold.compare(k[i]) : -1;
      bool kept = t < length && !candidate;
      int64_t place = t < sinks ? t : int64_t{sinks} + wanted + t - recent;
      if (order > 0 || (order == 0 && e < threshold.need)) {
        kept = true;
        place = int64_t{sinks} + a + min(e, threshold.need);
      }
      a += order > 0;
      e += order == 0;
      if (kept && place < p.max_kept) out[place] = t;
      k[i] = kept;
    }
    if (p.kept_mass != nullptr) {
      reinterpret_cast<uint4*>(record.key())[lane] = make_uint4(k[0], k[1], k[2], k[3]);
    }
    above_before += whole & 0xffff;
    equal_before += whole >> 16;
  }
  if (rank == 0 && threadIdx.x == 0) {
    p.counts[item] =
        static_cast<int32_t>(min(int64_t{sinks} + wanted + length - recent, p.max_kept));
  }
  if (p.kept_mass != nullptr) {
    __syncthreads();
    float* partial = reinterpret_cast<float*>(scratch);
    for (int g = 0; g < p.group; ++g) {
      float sum_kept = 0;
      for (int b = warp; b < count; b += kWarps) {
        const Record record{records + b * record_bytes, p.group, p.kept_mass != nullptr};
        const float c = coefficient[g] + record.top()[g] * kLog2e;
        for (int t = lane; t < kBlockSize; t += 32) {
          const float x = __half2float(record.x(g)[t]);
          if (record.key()[t]) sum_kept += fast_exp2(fmaf(x, kLog2e, c));
        }
      }
      sum_kept = warp_sum(sum_kept);
      if (lane == 0) partial[warp] = sum_kept;
      __syncthreads();
      if (threadIdx.x == 0) {
        mass[g] = 0;
        for (int w = 0; w < kWarps; ++w) mass[g] += partial[w];
      }
      __syncthreads();
    }
    cluster_sync(C);
    for (int g = threadIdx.x; rank == 0 && g < p.group; g += kThreads) {
      float all = 0;
      for (int r = 0; r < C; ++r) all += cluster_at(mass, r, C)[g];
      p.kept_mass[item * p.group + g] = fminf(all, 1.0f);
    }
  }
  cluster_sync(C);  // others may still read this block's shared memory
}

template <bool kWide>
void launch_wide(const Device& device, const SelectArgs& p, dim3 grid, size_t bytes) {
  if ((p.rank + 15) / 16 % 3 == 0) {
    launch(device, select_kernel<kWide, 3>, p.cluster, grid, kThreads, bytes, p);
  } else {
    launch(device, select_kernel<kWide, 2>, p.cluster, grid, kThreads, bytes, p);
  }
}

}  // namespace

int64_t plan_select(const Device& device, SelectArgs& p) {
  const int64_t items = p.num_rows * p.cache.num_kv_heads;
  p.cluster = cluster_size(device.clusters, device.num_sms, items);
  const int64_t wanted = (p.max_blocks + p.cluster - 1) / p.cluster;
  const int record = Record::bytes(p.group, p.kept_mass != nullptr);
  // Few rows: all of shared memory. Many: room for two thread blocks on a multiprocessor.
  const bool few = items * p.cluster <= device.num_sms;
  const int64_t budget = (few ? device.max_shared : device.max_shared / 2) - kStaticShared;
  const int64_t room = budget - shared_plan(p).bytes();
  p.shared_records = static_cast<int>(room < 0                 ? 0
                                      : room / record < wanted ? room / record
                                                               : wanted);
  return p.shared_records >= wanted ? 0 : items * p.max_blocks * record;
}

void launch_select(const Device& device, const SelectArgs& p) {
  const dim3 grid(p.num_rows * p.cache.num_kv_heads);
  const size_t bytes = shared_plan(p).bytes() +
                       size_t(p.shared_records) * Record::bytes(p.group, p.kept_mass != nullptr);
  p.group > 4 ? launch_wide<true>(device, p, grid, bytes)
              : launch_wide<false>(device, p, grid, bytes);
}

}  // namespace vllm_sparse::cuda
