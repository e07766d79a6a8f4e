// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// SparQ decoding (arXiv 2312.04985, section 3) in one kernel: a cluster of thread blocks serves a
// (row, KV head) from its channels to its result. Each thread block scores a part of the blocks and
// lists that part's tokens; then all share the list. Rows that keep everything skip to attention.
#include "accumulate.cuh"
#include "channels.cuh"
#include "score.cuh"
#include "threshold.cuh"

namespace vllm_sparse::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kSlots = 2;     // steps of a warp's ring while scoring
constexpr int kMaxHeads = 8;  // query heads of a KV head
constexpr int kMaxPairs = kMaxHeads / 2;
constexpr int kMaxSize = 128;  // head size
constexpr int kTile = 16;
constexpr int64_t kManyBlocks = 512;  // of a context; from here on clusters of 16 may pay
constexpr int kRing = kWarps * kSlots * kSlotBytes;
constexpr int kMaxPeers = 16;             // thread blocks of a cluster
constexpr int kStaticShared = 11 * 1024;  // what the kernel declares, and 1 KiB of the system's

// Scores of this thread block's blocks, and the heads' largest logits after them: in shared memory,
// the last ones in global memory when there are too many. Keys replace a block's first scores, or
// go where the ring was.
struct Scores {
  uint8_t *shared, *global, *ring;
  int held, in_ring;  // blocks in shared memory; keys of the next ones that the ring has room for
  int bytes, pairs;   // of a block
  __device__ uint8_t* at(int block) const {
    return (block < held ? shared : global) + int64_t{block} * bytes;
  }
  __device__ float* tops(int block) const {
    return reinterpret_cast<float*>(at(block) + pairs * kPairBytes);
  }
  __device__ uint16_t* of(int block) const {
    uint8_t* keys = static_cast<uint32_t>(block - held) < static_cast<uint32_t>(in_ring)
                        ? ring + (block - held) * kBlockSize * 2
                        : at(block);
    return reinterpret_cast<uint16_t*>(keys);
  }
};

constexpr int kHistogramBytes = kBins * 4;  // in the ring's place once all is scored, before keys

struct Coarse {
  uint32_t of[kMaxPeers][kCoarseBins];  // sums of bins of the thread blocks; others write it
};

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

// One warp's running (top, sum) of two heads; lanes differ in blocks and heads.
struct RunningSum {
  float4 s = {-INFINITY, 0, -INFINITY, 0};
  __device__ void add(const float4& x) {
    const float2 top = {fmaxf(s.x, x.x), fmaxf(s.z, x.z)};
    s.y = s.y * fast_exp2(s.x - top.x) + x.y * fast_exp2(x.x - top.x);
    s.w = s.w * fast_exp2(s.z - top.y) + x.w * fast_exp2(x.z - top.y);
    s.x = top.x;
    s.z = top.y;
  }
};

// This thread block's part of a context's blocks.
struct Part {
  int first, count;
};

__device__ inline Part share_of(unsigned total, unsigned rank, unsigned size) {
  const unsigned first = total * rank / size;
  return {static_cast<int>(first), static_cast<int>(total * (rank + 1) / size - first)};
}

template <class T, bool kFast>
__device__ void score_part(const DecodeArgs& p,
                           const RowPlan& plan,
                           const PreparedItem& prepared,
                           const int32_t* table,
                           int head,
                           int rank,
                           const Part& part,
                           uint32_t ring,
                           const Scores& scores,
                           Shared& shared) {
  constexpr int kQuads = kFast ? 1 : 2;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int pairs = (part.count + 1) / 2;
  const WarpBlocks blocks = {part.first + 2 * warp,
                             2 * kWarps,
                             (pairs - warp + kWarps - 1) / kWarps,
                             part.first + part.count - 1};
  if (lane < kMaxHeads) {
    shared.select.stats[warp][lane] = shared.select.stats[kWarps + warp][lane] = {-INFINITY, 0};
  }
  __syncwarp();
  const auto tail = [&]() {
    // Groups go to the thread blocks and warps that have least to score.
    const int group = (kWarps - 1 - warp) * p.cluster + p.cluster - 1 - rank;
    if (plan.sealed * kBlockSize + group * kTailTokens < plan.length) {
      score_tail<T>(
          p, prepared, table, head, plan.length, group, shared.select.stats[kWarps + warp]);
    }
  };
  RunningSum running[kQuads];
  const auto emit = [&](int block, int pair, const uint32_t (&words)[8], const float4& stats) {
    uint4* to =
        reinterpret_cast<uint4*>(scores.at(block - part.first) + pair * kPairBytes) + lane / 4 * 2;
    to[0] = make_uint4(words[0], words[1], words[2], words[3]);
    to[1] = make_uint4(words[4], words[5], words[6], words[7]);
    if (lane < 4) {
      reinterpret_cast<float2*>(scores.tops(block - part.first))[pair] = {stats.x, stats.z};
    }
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      if (kQuads == 1 || pair / 2 == i) running[i].add(stats);
    }
  };
  score_blocks<kFast, false, kSlots>(p, prepared, table, head, blocks, ring, tail, emit);
#pragma unroll
  for (int i = 0; i < kQuads; ++i) {
    float4& s = running[i].s;
    const float4 other = {__shfl_xor_sync(kFullMask, s.x, 2),
                          __shfl_xor_sync(kFullMask, s.y, 2),
                          __shfl_xor_sync(kFullMask, s.z, 2),
                          __shfl_xor_sync(kFullMask, s.w, 2)};
    if (other.y > 0 || other.w > 0) running[i].add(other);
    if (lane < 2) {
      const int h = 4 * i + 2 * lane;
      if (s.y > 0) shared.select.stats[warp][h] = {s.x, s.y};
      if (s.w > 0) shared.select.stats[warp][h + 1] = {s.z, s.w};
    }
  }
}

// (top, sum) of the lanes' entries together; entries of sum 0 say nothing.
__device__ float2 combine(float2 x) {
  const float top = warp_max(x.y > 0 ? x.x : -INFINITY);
  return {top, warp_sum(x.y > 0 ? x.y * fast_exp2(x.x - top) : 0.0f)};
}

// What weighs a head's probabilities before they are pooled: a lane has head lane % 8. The shift is
// such that pooled probabilities have a largest value near 2^14 and never reach fp16's end. The
// cluster meets.
__device__ float log_weight(const DecodeArgs& p, int rank, Shared& shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, C = p.cluster;
  const float2 mine =
      combine(lane < 2 * kWarps ? shared.select.stats[lane][warp] : float2{-INFINITY, 0});
  cluster_wait(C);  // all have begun
  if (lane < C) *cluster_at(&shared.select.totals[rank][warp], lane, C) = mine;
  cluster_sync(C);
  const int head = lane % kMaxHeads;
  constexpr int kParts = 32 / kMaxHeads;
  float top = -INFINITY, sum = 0;
#pragma unroll 1
  for (int r = lane / kMaxHeads; r < C; r += kParts) {
    const float2 x = shared.select.totals[r][head];
    top = fmaxf(top, x.y > 0 ? x.x : -INFINITY);
  }
  for (int i = kMaxHeads; i < 32; i *= 2) top = fmaxf(top, __shfl_xor_sync(kFullMask, top, i));
#pragma unroll 1
  for (int r = lane / kMaxHeads; r < C; r += kParts) {
    const float2 x = shared.select.totals[r][head];
    sum += x.y > 0 ? x.y * fast_exp2(x.x - top) : 0;
  }
  for (int i = kMaxHeads; i < 32; i *= 2) sum += __shfl_xor_sync(kFullMask, sum, i);
  float peaks = head < p.group ? __fdividef(1, sum) : 0;
  for (int i = 1; i < kMaxHeads; i *= 2) peaks += __shfl_xor_sync(kFullMask, peaks, i);
  return 14 - fast_log2(peaks) - (top + fast_log2(sum));
}

// Pooled probabilities of this thread block's blocks as keys, and how many tokens have which.
template <int kPairs>
__device__ void pool_part(const DecodeArgs& p,
                          const RowPlan& plan,
                          const Part& part,
                          const Scores& scores,
                          float log_weight,
                          uint32_t* histogram) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, place = lane % 16;
  const int last = part.count - 1;
  // Half a warp takes a block. The next block's scores are under way.
  uint4 next[kPairs] = {};
  float next_top = 0;
  const auto load = [&](int block) {
    if (block > last) return;
    const uint4* from = reinterpret_cast<const uint4*>(scores.at(block)) + place;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      if (i < p.pairs) next[i] = from[i * (kPairBytes / 16)];
    }
    if (place < p.group) next_top = scores.tops(block)[place];
  };
  load(2 * warp + lane / 16);
#pragma unroll 1
  for (int base = 2 * warp; base < part.count; base += 2 * kWarps) {
    const int b = base + lane / 16;
    const float weight = place < p.group ? fast_exp2(next_top + log_weight) : 0.0f;
    const uint32_t both = as_word(weight_of(weight));
    uint4 words[kPairs];
#pragma unroll
    for (int i = 0; i < kPairs; ++i) words[i] = next[i];
    load(b + 2 * kWarps);
    Pooled pooled;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      if (i >= p.pairs) break;
      pooled.add(words[i],
                 as_half2(__shfl_sync(kFullMask, both, lane / 16 * 16 + 2 * i)),
                 as_half2(__shfl_sync(kFullMask, both, lane / 16 * 16 + 2 * i + 1)));
    }
    if (b <= last) {
      pooled.store(plan, (part.first + b) * kBlockSize, scores.of(b), histogram);
    }
  }
}

// What comes before attention: the item's list of tokens and how many there are.
template <class T, bool kFast>
__device__ int list_tokens(const DecodeArgs& p,
                           const RowPlan& plan,
                           int64_t item,
                           int head,
                           int rank,
                           const T* query,
                           const int32_t* table,
                           uint8_t* dynamic,
                           Shared& shared) {
  const PreparedItem prepared(p, shared.select.channel, shared.select.query);
  choose_channels<T, kThreads, kMaxSize>(p, query, prepared);
  const Part part = share_of(plan.sealed, rank, p.cluster);
  const int bytes = score_bytes(p.pairs);
  Coarse& coarse = *reinterpret_cast<Coarse*>(dynamic + kRing);
  const Scores scores = {dynamic + kRing + sizeof(Coarse),
                         p.scores + (item * p.max_blocks + part.first) * bytes,
                         dynamic + kHistogramBytes,
                         p.held_blocks,
                         (kRing - kHistogramBytes) / (2 * kBlockSize),
                         bytes,
                         p.pairs};
  const uint32_t ring = shared_address(dynamic) + threadIdx.x / 32 * kSlots * kSlotBytes;
  score_part<T, kFast>(p, plan, prepared, table, head, rank, part, ring, scores, shared);
  __syncthreads();
  uint32_t* histogram = reinterpret_cast<uint32_t*>(dynamic);
#pragma unroll
  for (int i = 0; i < kBins / kThreads / 4; ++i) {
    reinterpret_cast<uint4*>(histogram)[threadIdx.x + i * kThreads] = {};
  }
  const float weight = log_weight(p, rank, shared);
  pool_part<kFast ? 2 : kMaxPairs>(p, plan, part, scores, weight, histogram);
  __syncthreads();
  send_sums<kThreads>(histogram, coarse.of, rank, p.cluster);
  cluster_sync(p.cluster);
  const int listed = plan.sinks + plan.wanted + plan.sealed * kBlockSize - plan.recent;
  const int tail = plan.length - plan.sealed * kBlockSize;
  const Threshold threshold =
      cluster_threshold<kThreads>(histogram, coarse.of, listed, rank, p.cluster);
  int32_t* out = p.indices + item * p.max_kept;
  write_list<kWarps>(threshold, scores, part.first, part.count, out, p.max_kept);
  if (rank == p.cluster - 1 && threadIdx.x < tail && listed + threadIdx.x < p.max_kept) {
    out[listed + threadIdx.x] = plan.sealed * kBlockSize + threadIdx.x;
  }
  return static_cast<int>(min(int64_t{listed} + tail, p.max_kept));
}

// Tiles of a warp on their way into its ring of three half tiles: keys, values, the next keys.
struct TileReader {
  const DecodeArgs& p;
  const int32_t *list, *table;  // list: null for all tokens
  int head, length, count, end;
  uint32_t block_units;  // 64 bytes between blocks
  int next;              // tile whose tokens are looked up next

  __device__ int tokens() {
    const int at = max(min(next * kTile + static_cast<int>(threadIdx.x) % kTile, count - 1), 0);
    next += kWarps;
    const int token = list != nullptr ? __ldcg(list + at) : at;
    return min(max(token, 0), length - 1);
  }
  // Where a token's row begins, in 64 bytes from the head's first.
  __device__ uint32_t row(int token, int32_t id) const {
    return static_cast<uint32_t>(safe_block(p.cache, id)) * block_units +
           token % kBlockSize * (p.cache.head_size / 16);
  }
};

// Keys or values of a tile; lane i % 16 knows the row of token i.
template <int kD>
__device__ inline void copy_half(
    const uint8_t* from, uint32_t row, int chunks, uint32_t to, int pitch) {
  constexpr int kLanes = kD / 8, kRows = 32 / kLanes;
  const int lane = threadIdx.x % 32, first = lane / kLanes, chunk = lane % kLanes;
  to += first * pitch + chunk * 16;
  from += chunk * 16;
#pragma unroll
  for (int i = 0; i < kTile / kRows; ++i) {
    const uint32_t units = __shfl_sync(kFullMask, row, first + i * kRows);
    if (chunk < chunks) copy_async_16(to + i * kRows * pitch, from + units * uint64_t{64});
  }
}

template <class T, int kD>
__device__ void attend_tiles(
    TileReader reader, int begin, float scale, uint32_t ring, Accumulator<T, kD, 8>& a) {
  const int size = reader.p.cache.head_size, chunks = size / 8, pitch = 2 * size + 16;
  uint32_t key = ring, value = ring + kTile * pitch, next_key = value + kTile * pitch;
  int tile = begin + threadIdx.x / 32;
  if (tile >= reader.end) return;
  // A tile's tokens, blocks and rows are each looked up a tile ahead of the next.
  const auto look_up = [&](int token) { return reader.table[token / kBlockSize]; };
  reader.next = tile;
  int token = reader.tokens(), next_token = reader.tokens();
  int32_t id = look_up(token), next_id = look_up(next_token);
  const uint8_t* keys = reader.p.cache.data + reader.head * reader.p.cache.head_stride;
  const uint8_t* values = keys + 2 * size;
  uint32_t row = reader.row(token, id);
  copy_half<kD>(keys, row, chunks, key, pitch);
  copy_commit();
  copy_half<kD>(values, row, chunks, value, pitch);
  copy_commit();
  row = reader.row(next_token, next_id);
  next_token = reader.tokens();
  if (tile + kWarps < reader.end) copy_half<kD>(keys, row, chunks, next_key, pitch);
  copy_commit();
  next_id = look_up(next_token);
  int after_token = reader.tokens();
#pragma unroll 1
  for (; tile < reader.end; tile += kWarps) {
    uint32_t probabilities[1][2];
    copy_wait<2>();
    __syncwarp();
    a.add_keys(key, pitch, size, reader.count - tile * kTile, scale, 0, probabilities);
    __syncwarp();
    if (tile + kWarps < reader.end) copy_half<kD>(values, row, chunks, key, pitch);
    copy_commit();
    row = reader.row(next_token, next_id);
    next_token = after_token;
    next_id = look_up(next_token);
    after_token = reader.tokens();
    copy_wait<2>();
    __syncwarp();
    a.add_values(value, pitch, size, probabilities);
    __syncwarp();
    if (tile + 2 * kWarps < reader.end) copy_half<kD>(keys, row, chunks, value, pitch);
    copy_commit();
    const uint32_t free = value;
    value = key;
    key = next_key;
    next_key = free;
  }
  copy_wait<0>();
}

// Joins what the warps have of an item and sends it to those thread blocks that store it: words of
// four elements go round.
template <class T, int kD>
__device__ void merge_warps(
    const DecodeArgs& p, Accumulator<T, kD, 8>& a, float* merge, int rank, Shared& shared) {
  constexpr int kPitch = kD + 4;
  const unsigned h = threadIdx.x / 32, lane = threadIdx.x % 32, words = p.cache.head_size / 4;
  const unsigned C = p.cluster, most = p.group * words / C + 1;
  __syncthreads();
  a.store(0, kD, p.group, merge + h * kMaxHeads * kPitch, kPitch, shared.merge.ends[h]);
  __syncthreads();
  static_assert(kWarps == kMaxHeads && kD <= 128);
  if (h >= p.group) return;
  const float2 mine = shared.merge.ends[lane % kWarps][h];
  const float top = warp_max(mine.x), shift = top == -INFINITY ? 0 : top;
  const float weight = fast_exp2(mine.x - shift);
  const float total = warp_sum(lane < kWarps ? mine.y * weight : 0);
  if (lane < C) *cluster_at(&shared.merge.totals[rank][h], lane, C) = {top, total};
  float4 sum = {};
#pragma unroll 4
  for (int w = 0; w < kWarps; ++w) {
    const float4 x =
        *reinterpret_cast<const float4*>(merge + (w * kMaxHeads + h) * kPitch + lane % words * 4);
    const float y = __shfl_sync(kFullMask, weight, w);
    sum = {fmaf(x.x, y, sum.x), fmaf(x.y, y, sum.y), fmaf(x.z, y, sum.z), fmaf(x.w, y, sum.w)};
  }
  if (lane < words) {
    const unsigned i = h * words + lane, at = i / C;
    *cluster_at(&shared.merge.sums[rank * most + at], i - at * C, C) = sum;
  }
}

// This thread block's words of the result, from all.
template <class T>
__device__ void merge_cluster(const DecodeArgs& p, int rank, T* out, const Shared& shared) {
  const unsigned C = p.cluster, words = p.cache.head_size / 4, most = p.group * words / C + 1;
  const unsigned i = rank + threadIdx.x * C, h = i / words;
  if (h >= p.group) return;
  Merged m;
  float4 sum = {};
#pragma unroll 2
  for (int r = 0; r < C; ++r) {
    const float2 ends = shared.merge.totals[r][h];
    m.add(ends.x, ends.y, shared.merge.sums[r * most + threadIdx.x], sum);
  }
  const float inverse = m.total > 0 ? __fdividef(1, m.total) : 0;
  const float x[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    out[i * 4 + k] = from_float(m.total > 0 ? x[k] * inverse : 0, T());
  }
}

template <class T, int kD, bool kFast>
__global__ void __launch_bounds__(kThreads, 2) decode_kernel(const __grid_constant__ DecodeArgs p) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) uint8_t dynamic[];
  __shared__ Shared shared;
  let_next_begin();
  cluster_arrive(p.cluster);
  const int rank = blockIdx.x % p.cluster;
  const unsigned item = blockIdx.x / p.cluster, row = item / p.cache.num_kv_heads;
  const int head = item - row * p.cache.num_kv_heads;
  const int size = p.cache.head_size;
  wait_for_previous();
  const RowPlan plan = plan_row(p, row);
  const int32_t* table = p.block_table + row * p.block_table_stride;
  const T* query =
      reinterpret_cast<const T*>(static_cast<const uint8_t*>(p.query) + row * p.query_stride) +
      int64_t{head} * p.group * size;
  int count = plan.length;
  if (!plan.all) {
    count = list_tokens<T, kFast>(p, plan, item, head, rank, query, table, dynamic, shared);
  }
  Accumulator<T, kD, 8> a;
  a.begin(query, p.group, size);
  plan.all ? cluster_wait(p.cluster) : cluster_sync(p.cluster);  // the list is complete
  if (rank == 0 && threadIdx.x == 0) {
    p.counts[item] = plan.all ? -1 : count;
    if (p.tokens_read != nullptr) {
      atomicAdd(reinterpret_cast<unsigned long long*>(p.tokens_read), count);
    }
  }
  const int tiles = (count + kTile - 1) / kTile;
  const Part share = share_of(tiles, rank, p.cluster);
  const TileReader reader = {p,
                             plan.all ? nullptr : p.indices + item * p.max_kept,
                             table,
                             head,
                             plan.length,
                             count,
                             share.first + share.count,
                             static_cast<uint32_t>(p.cache.block_stride / 64)};
  const uint32_t ring = shared_address(dynamic) + threadIdx.x / 32 * 3 * kTile * (2 * size + 16);
  attend_tiles<T, kD>(reader, share.first, p.scale * kLog2e, ring, a);
  float* merge = reinterpret_cast<float*>(dynamic);  // in place of the ring
  merge_warps<T, kD>(p, a, merge, rank, shared);
  cluster_sync(p.cluster);
  T* out = reinterpret_cast<T*>(static_cast<uint8_t*>(p.out) + row * p.out_stride);
  merge_cluster(p, rank, out + int64_t{head} * p.group * size, shared);
#endif
}

template <class T, int kD>
auto kernel_for(const DecodeArgs& p) {
  return p.rank <= kStepChannels && p.group <= 4 ? decode_kernel<T, kD, true>
                                                 : decode_kernel<T, kD, false>;
}

template <class T>
auto kernel_for_type(const DecodeArgs& p) {
  return p.cache.head_size <= 64 ? kernel_for<T, 64>(p) : kernel_for<T, kMaxSize>(p);
}

// As many thread blocks as there are multiprocessors, in powers of two; or two, for a long context
// beside many short ones. Each multiprocessor holds two thread blocks, but large clusters that need
// nearly all places leave gaps, and the last ones wait for a second round.
int decode_cluster(const Device& device, int64_t items, int64_t max_blocks) {
  const int most = device.large_clusters && max_blocks > kManyBlocks ? kMaxPeers : kMaxCluster;
  int size = 2;
  while (size < most && 2 * size * items <= device.num_sms) size *= 2;
  return size;
}

}  // namespace

bool decode_covers(const Device& device, const SelectArgs& p) {
  return device.clusters && p.cache.dtype != Dtype::kFloat && p.cache.head_size <= kMaxSize &&
         p.group <= kMaxHeads && p.soft_cap == 0 && p.kept_mass == nullptr;
}

void launch_decode(const Device& device, DecodeArgs p) {
  p.pairs = (p.group + 1) / 2;
  p.cluster = decode_cluster(device, p.num_rows * p.cache.num_kv_heads, p.max_blocks);
  // Half of a multiprocessor's shared memory, of which each thread block costs 1 KiB more.
  const int bytes = (device.max_shared + 1024) / 2 - kStaticShared;
  p.held_blocks =
      (bytes - kRing - static_cast<int>(sizeof(Coarse))) / static_cast<int>(score_bytes(p.pairs));
  const auto kernel = p.cache.dtype == Dtype::kHalf ? kernel_for_type<__half>(p)
                                                    : kernel_for_type<__nv_bfloat16>(p);
  if (p.cluster > kMaxCluster) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  }
  const dim3 grid(p.num_rows * p.cache.num_kv_heads);
  launch(device, kernel, p.cluster, grid, kThreads, bytes, p, true);
}

}  // namespace vllm_sparse::cuda
