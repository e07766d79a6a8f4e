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
constexpr int kStaticShared = 11 * 1024;  // what the kernel declares, and 1 KiB of the system's

// Scores of this thread block's blocks, and the heads' largest logits after them: in shared memory,
// the last ones in global memory when there are too many. Keys replace a block's first scores.
struct Scores {
  uint8_t *shared, *global;
  int held, bytes, pairs;  // blocks in shared memory; bytes and pairs of heads of a block
  __device__ uint8_t* at(int block) const {
    return (block < held ? shared : global) + int64_t{block} * bytes;
  }
  __device__ float* tops(int block) const {
    return reinterpret_cast<float*>(at(block) + pairs * kPairBytes);
  }
  __device__ uint16_t* of(int block) const { return reinterpret_cast<uint16_t*>(at(block)); }
};

struct Shared {
  int channel[kMaxSize];
  __align__(16) __half query[kMaxHeads * kMaxSize];
  float2 stats[2 * kWarps][kMaxHeads];  // (top, sum): of the warps, and of the tokens not sealed
  float2 total[kMaxHeads];              // of the thread block; others read it
  float lse[kMaxHeads], peak[kMaxHeads];
  uint32_t coarse[kCoarseBins];  // others read it
  float2 ends[kWarps][kMaxHeads];
  float2 merged_ends[kMaxHeads];  // others read it
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

template <bool kFast>
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
  const WarpBlocks blocks = {
      part.first + 2 * warp, 2 * kWarps, (pairs - warp + kWarps - 1) / kWarps,
      part.first + part.count - 1};
  if (lane < kMaxHeads) {
    shared.stats[warp][lane] = shared.stats[kWarps + warp][lane] = {-INFINITY, 0};
  }
  __syncwarp();
  const auto tail = [&]() {
    // Groups go to the thread blocks and warps that have least to score.
    const int group = (kWarps - 1 - warp) * p.cluster + p.cluster - 1 - rank;
    if (plan.sealed * kBlockSize + group * kTailTokens < plan.length) {
      score_tail(p, prepared, table, head, plan.length, group, shared.stats[kWarps + warp]);
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
      if (s.y > 0) shared.stats[warp][h] = {s.x, s.y};
      if (s.w > 0) shared.stats[warp][h + 1] = {s.z, s.w};
    }
  }
}

// (top, sum) of the lanes' entries together; entries of sum 0 say nothing.
__device__ float2 combine(float2 x) {
  const float top = warp_max(x.y > 0 ? x.x : -INFINITY);
  return {top, warp_sum(x.y > 0 ? x.y * fast_exp2(x.x - top) : 0.0f)};
}

// log2 of every head's normaliser into `lse`. Returns a shift such that pooled probabilities times
// 2^shift have a largest value near 2^14 and never reach fp16's end. The cluster meets.
__device__ float cluster_normalisers(const DecodeArgs& p, Shared& shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const float2 none = {-INFINITY, 0};
  const float2 mine = combine(lane < 2 * kWarps ? shared.stats[lane][warp] : none);
  if (lane == 0) shared.total[warp] = mine;
  cluster_sync(p.cluster);
  const float2 all =
      combine(lane < p.cluster ? cluster_at(shared.total, lane, p.cluster)[warp] : none);
  if (lane == 0) {
    shared.lse[warp] = all.x + log2f(all.y);
    shared.peak[warp] = warp < p.group ? 1 / all.y : 0;
  }
  __syncthreads();
  float peaks = 0;
#pragma unroll
  for (int h = 0; h < kMaxHeads; ++h) peaks += shared.peak[h];
  return 14 - log2f(peaks);
}

// Pooled probabilities of this thread block's blocks as keys, and how many tokens have which.
__device__ void pool_part(const DecodeArgs& p,
                          const RowPlan& plan,
                          const Part& part,
                          const Scores& scores,
                          const Shared& shared,
                          float shift,
                          uint32_t* histogram) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, place = lane % 16;
  for (int base = 2 * warp; base < part.count; base += 2 * kWarps) {
    const int b = min(base + lane / 16, part.count - 1);
    const uint4* from = reinterpret_cast<const uint4*>(scores.at(b)) + place;
    const float weight =
        place < p.group ? fast_exp2(scores.tops(b)[place] - shared.lse[place] + shift) : 0.0f;
    const uint32_t both = as_word(weight_of(weight));
    Pooled pooled;
#pragma unroll
    for (int i = 0; i < kMaxPairs; ++i) {
      if (i >= p.pairs) break;
      pooled.add(from[i * (kPairBytes / 16)],
                 as_half2(__shfl_sync(kFullMask, both, lane / 16 * 16 + 2 * i)),
                 as_half2(__shfl_sync(kFullMask, both, lane / 16 * 16 + 2 * i + 1)));
    }
    __syncwarp();  // where both halves look at the last block
    if (base + lane / 16 < part.count) {
      pooled.store(plan, (part.first + b) * kBlockSize, scores.of(b), histogram);
    }
  }
}

// What comes before attention: the item's list of tokens and how many there are.
template <class T, bool kFast>
__device__ int list_tokens(const DecodeArgs& p,
                           const RowPlan& plan,
                           int64_t item,
                           int rank,
                           const T* query,
                           const int32_t* table,
                           uint8_t* dynamic,
                           Shared& shared) {
  const int head = static_cast<int>(item % p.cache.num_kv_heads);
  const PreparedItem prepared(p, shared.channel, shared.query);
  choose_channels<T, kThreads>(p, query, prepared);
  const Part part = {static_cast<int>(int64_t{plan.sealed} * rank / p.cluster),
                     static_cast<int>(int64_t{plan.sealed} * (rank + 1) / p.cluster -
                                      int64_t{plan.sealed} * rank / p.cluster)};
  constexpr int kRing = kWarps * kSlots * kSlotBytes;
  static_assert(kRing >= kBins * 4);
  const int bytes = score_bytes(p.pairs);
  const Scores scores = {dynamic + kRing,
                         p.scores + (item * p.max_blocks + part.first) * bytes,
                         p.held_blocks,
                         bytes,
                         p.pairs};
  const uint32_t ring = shared_address(dynamic) + threadIdx.x / 32 * kSlots * kSlotBytes;
  score_part<kFast>(p, plan, prepared, table, head, rank, part, ring, scores, shared);
  __syncthreads();
  uint32_t* histogram = reinterpret_cast<uint32_t*>(dynamic);  // in place of the ring
#pragma unroll
  for (int i = 0; i < kBins / kThreads / 4; ++i) {
    reinterpret_cast<uint4*>(histogram)[threadIdx.x + i * kThreads] = {};
  }
  const float shift = cluster_normalisers(p, shared);
  pool_part(p, plan, part, scores, shared, shift, histogram);
  __syncthreads();
  sum_bins<kThreads>(histogram, shared.coarse);
  cluster_sync(p.cluster);
  const int listed = plan.sinks + plan.wanted + plan.sealed * kBlockSize - plan.recent;
  const int tail = plan.length - plan.sealed * kBlockSize;
  const Threshold threshold =
      cluster_threshold<kThreads>(histogram, shared.coarse, listed, rank, p.cluster);
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
  int next;  // tile whose tokens are looked up next

  __device__ int tokens() {
    const int at = max(min(next * kTile + static_cast<int>(threadIdx.x) % kTile, count - 1), 0);
    next += kWarps;
    const int token = list != nullptr ? __ldcg(list + at) : at;
    return min(max(token, 0), length - 1);
  }
  __device__ const uint8_t* row(int token, int32_t id) const {
    return chunk_of(p.cache, safe_block(p.cache, id), head) +
           int64_t{token % kBlockSize} * 4 * p.cache.head_size;
  }
};

// Keys or values of a tile; lane i % 16 has the address of token i.
template <int kD>
__device__ inline void copy_half(const uint8_t* row, int offset, int chunks, uint32_t to, int pitch) {
  constexpr int kLanes = kD / 8, kRows = 32 / kLanes;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kTile / kRows; ++i) {
    const int t = i * kRows + lane / kLanes, chunk = lane % kLanes;
    const uint64_t from = __shfl_sync(kFullMask, reinterpret_cast<uint64_t>(row), t);
    if (chunk < chunks) {
      copy_async_16(to + t * pitch + chunk * 16,
                    reinterpret_cast<const uint8_t*>(from) + offset + chunk * 16);
    }
  }
}

template <class T, int kD>
__device__ void attend_tiles(TileReader reader,
                             int begin,
                             float scale,
                             uint32_t ring,
                             Accumulator<T, kD, 8>& a) {
  const int size = reader.p.cache.head_size, chunks = size / 8, pitch = 2 * size + 16;
  uint32_t key = ring, value = ring + kTile * pitch, next_key = value + kTile * pitch;
  int tile = begin + threadIdx.x / 32;
  if (tile >= reader.end) return;
  // A tile's tokens, blocks and rows are each looked up a tile ahead of the next.
  const auto look_up = [&](int token) { return reader.table[token / kBlockSize]; };
  reader.next = tile;
  int token = reader.tokens(), next_token = reader.tokens();
  int32_t id = look_up(token), next_id = look_up(next_token);
  const uint8_t* row = reader.row(token, id);
  copy_half<kD>(row, 0, chunks, key, pitch);
  copy_commit();
  copy_half<kD>(row, 2 * size, chunks, value, pitch);
  copy_commit();
  row = reader.row(next_token, next_id);
  next_token = reader.tokens();
  if (tile + kWarps < reader.end) copy_half<kD>(row, 0, chunks, next_key, pitch);
  copy_commit();
  next_id = look_up(next_token);
  int after_token = reader.tokens();
  for (; tile < reader.end; tile += kWarps) {
    uint32_t probabilities[1][2];
    copy_wait<2>();
    __syncwarp();
    a.add_keys(key, pitch, size, reader.count - tile * kTile, scale, 0, probabilities);
    __syncwarp();
    if (tile + kWarps < reader.end) copy_half<kD>(row, 2 * size, chunks, key, pitch);
    copy_commit();
    row = reader.row(next_token, next_id);
    next_token = after_token;
    next_id = look_up(next_token);
    after_token = reader.tokens();
    copy_wait<2>();
    __syncwarp();
    a.add_values(value, pitch, size, probabilities);
    __syncwarp();
    if (tile + 2 * kWarps < reader.end) copy_half<kD>(row, 0, chunks, value, pitch);
    copy_commit();
    const uint32_t free = value;
    value = key;
    key = next_key;
    next_key = free;
  }
  copy_wait<0>();
}

// What the warps have of an item, in shared memory: sums of head h at h * (kD + 4).
template <class T, int kD>
__device__ void merge_warps(const DecodeArgs& p,
                            Accumulator<T, kD, 8>& a,
                            float* merge,
                            float* merged,
                            Shared& shared) {
  constexpr int kPitch = kD + 4;
  const int warp = threadIdx.x / 32, size = p.cache.head_size;
  __syncthreads();
  a.store(0, kD, p.group, merge + warp * kMaxHeads * kPitch, kPitch, shared.ends[warp]);
  __syncthreads();
  for (int i = threadIdx.x * 4; i < p.group * size; i += kThreads * 4) {
    const int h = i / size, d = i % size;
    Merged m;
    float4 sum = {};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      m.add(shared.ends[w][h].x,
            shared.ends[w][h].y,
            *reinterpret_cast<const float4*>(merge + (w * kMaxHeads + h) * kPitch + d),
            sum);
    }
    *reinterpret_cast<float4*>(merged + h * kPitch + d) = sum;
    if (d == 0) shared.merged_ends[h] = {m.top, m.total};
  }
}

// Thread blocks share the elements of the result; a lane each reads one thread block's.
template <class T, int kD>
__device__ void merge_cluster(
    const DecodeArgs& p, const float* merged, int rank, T* out, Shared& shared) {
  constexpr int kPitch = kD + 4, kPeers = 16;
  const int size = p.cache.head_size, words = p.group * size / 4, C = p.cluster;
  const int peer = threadIdx.x % kPeers, end = words * (rank + 1) / C;
  for (int base = words * rank / C; base < end; base += kThreads / kPeers) {
    const int word = min(base + static_cast<int>(threadIdx.x) / kPeers, end - 1);
    const int h = word * 4 / size, d = word * 4 % size;
    float top = -INFINITY, total = 0;
    float4 sum = {};
    if (peer < C) {
      const float2 ends = cluster_at(shared.merged_ends, peer, C)[h];
      top = ends.x;
      total = ends.y;
      sum = *reinterpret_cast<const float4*>(cluster_at(merged, peer, C) + h * kPitch + d);
    }
    float peak = top;
#pragma unroll
    for (int i = 1; i < kPeers; i *= 2) peak = fmaxf(peak, __shfl_xor_sync(kFullMask, peak, i));
    const float weight = fast_exp2(top - (peak == -INFINITY ? 0 : peak));
    float x[5] = {total * weight, sum.x * weight, sum.y * weight, sum.z * weight, sum.w * weight};
#pragma unroll
    for (int i = 1; i < kPeers; i *= 2) {
#pragma unroll
      for (auto& y : x) y += __shfl_xor_sync(kFullMask, y, i);
    }
    const float inverse = x[0] > 0 ? 1 / x[0] : 0;
    if (peer == 0) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        out[h * size + d + i] = from_float(x[0] > 0 ? x[i + 1] * inverse : 0, T());
      }
    }
  }
}

template <class T, int kD, bool kFast>
__global__ void __launch_bounds__(kThreads, 2)
    decode_kernel(const __grid_constant__ DecodeArgs p) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) uint8_t dynamic[];
  __shared__ Shared shared;
  let_next_begin();
  const int rank = blockIdx.x % p.cluster;
  const int64_t item = blockIdx.x / p.cluster, row = item / p.cache.num_kv_heads;
  const int head = static_cast<int>(item - row * p.cache.num_kv_heads);
  const int size = p.cache.head_size;
  wait_for_previous();
  const RowPlan plan = plan_row(p, row);
  const int32_t* table = p.block_table + row * p.block_table_stride;
  const T* query =
      reinterpret_cast<const T*>(static_cast<const uint8_t*>(p.query) + row * p.query_stride) +
      int64_t{head} * p.group * size;
  int count = plan.length;
  if (!plan.all) {
    count = list_tokens<T, kFast>(p, plan, item, rank, query, table, dynamic, shared);
  }
  Accumulator<T, kD, 8> a;
  a.begin(query, p.group, size);
  if (!plan.all) cluster_sync(p.cluster);  // the list is complete
  if (rank == 0 && threadIdx.x == 0) {
    p.counts[item] = plan.all ? -1 : count;
    if (p.tokens_read != nullptr) {
      atomicAdd(reinterpret_cast<unsigned long long*>(p.tokens_read), count);
    }
  }
  const int tiles = (count + kTile - 1) / kTile;
  const int begin = static_cast<int>(int64_t{tiles} * rank / p.cluster);
  const int end = static_cast<int>(int64_t{tiles} * (rank + 1) / p.cluster);
  const TileReader reader = {
      p, plan.all ? nullptr : p.indices + item * p.max_kept, table, head, plan.length, count, end};
  const uint32_t ring =
      shared_address(dynamic) + threadIdx.x / 32 * 3 * kTile * (2 * size + 16);
  attend_tiles<T, kD>(reader, begin, p.scale * kLog2e, ring, a);
  float* merge = reinterpret_cast<float*>(dynamic);  // in place of the ring
  float* merged = merge + kWarps * kMaxHeads * (kD + 4);
  merge_warps<T, kD>(p, a, merge, merged, shared);
  cluster_sync(p.cluster);
  T* out = reinterpret_cast<T*>(static_cast<uint8_t*>(p.out) + row * p.out_stride);
  merge_cluster<T, kD>(p, merged, rank, out + int64_t{head} * p.group * size, shared);
  // A thread block's memory is there until the others are through with it.
  cluster_done_reading(p.cluster);
  cluster_wait_for_readers(p.cluster);
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

// As many thread blocks as multiprocessors hold at once, two on each; up to 8, or 16.
int decode_cluster(const Device& device, int64_t items) {
#ifdef VLLM_SPARSE_TUNE
  if (const char* c = getenv("VS_C")) return atoi(c);
#endif
  const int64_t size = 2 * device.num_sms / items;
  if (size >= 16 && device.large_clusters) return 16;
  return static_cast<int>(size < 1 ? 1 : size > kMaxCluster ? kMaxCluster : size);
}

}  // namespace

bool decode_covers(const Device& device, const SelectArgs& p) {
  return device.clusters && p.cache.dtype != Dtype::kFloat && p.cache.head_size <= kMaxSize &&
         p.group <= kMaxHeads && p.soft_cap == 0 && p.kept_mass == nullptr;
}

void launch_decode(const Device& device, DecodeArgs p) {
  p.pairs = (p.group + 1) / 2;
  p.cluster = decode_cluster(device, p.num_rows * p.cache.num_kv_heads);
  // Half of a multiprocessor's shared memory, of which each thread block costs 1 KiB more.
  const int bytes = (device.max_shared + 1024) / 2 - kStaticShared;
  p.held_blocks = (bytes - kWarps * kSlots * kSlotBytes) / static_cast<int>(score_bytes(p.pairs));
  const auto kernel = p.cache.dtype == Dtype::kHalf ? kernel_for_type<__half>(p)
                                                    : kernel_for_type<__nv_bfloat16>(p);
  if (p.cluster > kMaxCluster) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  }
  const dim3 grid(p.num_rows * p.cache.num_kv_heads);
  launch(device, kernel, p.cluster, grid, kThreads, bytes, p, true);
}

}  // namespace vllm_sparse::cuda
