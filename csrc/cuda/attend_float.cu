// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// Exact attention over listed tokens or whole contexts in fp32, without tensor cores. A cluster of
// thread blocks shares the tokens of one (row, KV head) and merges its partial results through
// shared memory.
#include "lists.cuh"
#include "pipeline.cuh"

namespace vllm_sparse::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kTile = 256;  // tokens whose addresses are looked up at once
constexpr int kUnroll = 4;  // tokens of a lane in flight

struct Vector {
  static constexpr int kSize = 4;
  float4 raw;
  __device__ void unpack(float (&x)[kSize]) const {
    x[0] = raw.x, x[1] = raw.y, x[2] = raw.z, x[3] = raw.w;
  }
};

// LT lanes read a token, N vectors of 16 bytes each; G query heads at a time.
template <int LT, int N, int G>
__global__ void __launch_bounds__(kThreads, 2) attend_kernel(AttendArgs p) {
  constexpr int E = Vector::kSize, kTokens = 32 / LT, kWidth = LT * N * E;
  __shared__ const float4* rows[kTile];
  __shared__ float partial[kWarps][G][kWidth];
  __shared__ float warp_top[kWarps][G], warp_sum_of[kWarps][G];
  __shared__ float result[G][kWidth], top[G], sum[G];

  wait_for_previous();
  const int C = p.cluster;
  const int64_t item = blockIdx.x / C, row = item / p.cache.num_kv_heads;
  const int rank = blockIdx.x % C, head = static_cast<int>(item % p.cache.num_kv_heads);
  const int first_head = blockIdx.y * G, head_size = p.cache.head_size;
  const int heads = min(G, p.group - first_head);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, part = lane % LT, slot = lane / LT;
  const int vectors = head_size / E;
  const TokenList tokens = token_list(p, static_cast<int>(row), static_cast<int>(item));
  const int length = tokens.length, count = tokens.count;
  const int share = (count + C - 1) / C;
  const int first = min(count, share * rank), end = min(count, first + share);
  if (p.tokens_read != nullptr && rank == 0 && blockIdx.y == 0 && threadIdx.x == 0) {
    atomicAdd(reinterpret_cast<unsigned long long*>(p.tokens_read), count);
  }

  const float scale = p.soft_cap > 0 ? p.scale : p.scale * kLog2e;
  float q[G][N][E], acc[G][N][E] = {}, m[G], l[G] = {};
#pragma unroll
  for (int g = 0; g < G; ++g) {
    m[g] = -INFINITY;
    const uint8_t* from = static_cast<const uint8_t*>(p.query) + row * p.query_stride;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const int at = part + n * LT;
      const int64_t query_head = int64_t{head} * p.group + first_head + min(g, heads - 1);
      const Vector vector = {reinterpret_cast<const float4*>(
          from + query_head * head_size * sizeof(float))[min(at, vectors - 1)]};
      vector.unpack(q[g][n]);
      const float factor = g < heads && at < vectors ? scale : 0;
#pragma unroll
      for (int i = 0; i < E; ++i) q[g][n][i] *= factor;
    }
  }

  for (int start = first; start < end; start += kTile) {
    const int tile = min(kTile, end - start);
    __syncthreads();
    for (int i = threadIdx.x; i < tile; i += kThreads) {
      int t = start + i;
      if (!tokens.all) t = min(max(p.indices[item * p.max_kept + t], 0), max(length - 1, 0));
      const int32_t id = p.block_table[row * p.block_table_stride + t / kBlockSize];
      rows[i] = reinterpret_cast<const float4*>(chunk_of(p.cache, safe_block(p.cache, id), head)) +
                int64_t{t % kBlockSize} * 2 * vectors;
    }
    __syncthreads();
    for (int base = warp * kTokens * kUnroll; base < tile; base += kWarps * kTokens * kUnroll) {
      Vector k[kUnroll][N], v[kUnroll][N];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const float4* from = rows[min(base + u * kTokens + slot, tile - 1)];
#pragma unroll
        for (int n = 0; n < N; ++n) {
          const int at = min(part + n * LT, vectors - 1);
          k[u][n].raw = __ldg(from + at);
          v[u][n].raw = __ldg(from + vectors + at);
        }
      }
      float x[kUnroll][G];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
        for (int g = 0; g < G; ++g) x[u][g] = 0;
#pragma unroll
        for (int n = 0; n < N; ++n) {
          float key[E];
          k[u][n].unpack(key);
#pragma unroll
          for (int g = 0; g < G; ++g) {
#pragma unroll
            for (int i = 0; i < E; ++i) x[u][g] = fmaf(q[g][n][i], key[i], x[u][g]);
          }
        }
#pragma unroll
        for (int g = 0; g < G; ++g) {
#pragma unroll
          for (int i = 1; i < LT; i *= 2) x[u][g] += __shfl_xor_sync(kFullMask, x[u][g], i);
          if (p.soft_cap > 0) x[u][g] = p.soft_cap * kLog2e * tanhf(x[u][g] / p.soft_cap);
          if (base + u * kTokens + slot >= tile) x[u][g] = -INFINITY;
        }
      }
#pragma unroll
      for (int g = 0; g < G; ++g) {
        float peak = m[g];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) peak = fmaxf(peak, x[u][g]);
        // A lane without a token yet: any finite value keeps NaN out.
        const float shift = peak == -INFINITY ? 0 : peak;
        const float factor = exp2f(m[g] - shift);
        m[g] = peak;
        l[g] *= factor;
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
          for (int i = 0; i < E; ++i) acc[g][n][i] *= factor;
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          x[u][g] = exp2f(x[u][g] - shift);
          l[g] += x[u][g];
        }
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
          float value[E];
          v[u][n].unpack(value);
#pragma unroll
          for (int g = 0; g < G; ++g) {
#pragma unroll
            for (int i = 0; i < E; ++i) acc[g][n][i] = fmaf(x[u][g], value[i], acc[g][n][i]);
          }
        }
      }
    }
  }

  // Merge: lanes that held other tokens, then warps, then the cluster.
#pragma unroll
  for (int g = 0; g < G; ++g) {
    float peak = m[g];
#pragma unroll
    for (int i = LT; i < 32; i *= 2) peak = fmaxf(peak, __shfl_xor_sync(kFullMask, peak, i));
    const float factor = m[g] == -INFINITY ? 0 : exp2f(m[g] - peak);
    l[g] *= factor;
#pragma unroll
    for (int i = LT; i < 32; i *= 2) l[g] += __shfl_xor_sync(kFullMask, l[g], i);
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int e = 0; e < E; ++e) {
        float a = acc[g][n][e] * factor;
#pragma unroll
        for (int i = LT; i < 32; i *= 2) a += __shfl_xor_sync(kFullMask, a, i);
        if (slot == 0) partial[warp][g][(part + n * LT) * E + e] = a;
      }
    }
    if (lane == 0) {
      warp_top[warp][g] = peak;
      warp_sum_of[warp][g] = l[g];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < G * kWidth; i += kThreads) {
    const int g = i / kWidth, d = i % kWidth;
    float peak = -INFINITY, total = 0, a = 0;
    for (int w = 0; w < kWarps; ++w) peak = fmaxf(peak, warp_top[w][g]);
    for (int w = 0; w < kWarps; ++w) {
      const float factor = warp_top[w][g] == -INFINITY ? 0 : exp2f(warp_top[w][g] - peak);
      total += factor * warp_sum_of[w][g];
      a += factor * partial[w][g][d];
    }
    result[g][d] = a;
    if (d == 0) top[g] = peak, sum[g] = total;
  }
  cluster_sync(C);
  const int outputs = heads * head_size;
  for (int i = rank * kThreads + threadIdx.x; i < outputs; i += C * kThreads) {
    const int g = i / head_size, d = i % head_size;
    float peak = -INFINITY, total = 0, a = 0;
#pragma unroll 8
    for (int r = 0; r < C; ++r) peak = fmaxf(peak, cluster_at(top, r, C)[g]);
#pragma unroll 8
    for (int r = 0; r < C; ++r) {
      const float mine = cluster_at(top, r, C)[g];
      const float factor = mine == -INFINITY ? 0 : exp2f(mine - peak);
      total += factor * cluster_at(sum, r, C)[g];
      a += factor * cluster_at(&result[0][0], r, C)[g * kWidth + d];
    }
    const int query_head = head * p.group + first_head + g;
    store_result<float>(p, row, head, query_head, d, length, count > 0 ? a / total : 0);
  }
  cluster_sync(C);  // others may still read this block's shared memory
}

template <int LT, int N>
void launch_lanes(const Device& device, AttendArgs& p) {
  const int heads = p.group == 1 ? 1 : p.group == 2 ? 2 : 4;
  const int64_t items = p.num_rows * p.cache.num_kv_heads;
  const dim3 grid(items, (p.group + heads - 1) / heads);
  p.cluster = cluster_size(device.clusters, device.num_sms, items * grid.y);
  switch (heads) {
    case 1: launch(device, attend_kernel<LT, N, 1>, p.cluster, grid, kThreads, 0, p, true); break;
    case 2: launch(device, attend_kernel<LT, N, 2>, p.cluster, grid, kThreads, 0, p, true); break;
    default: launch(device, attend_kernel<LT, N, 4>, p.cluster, grid, kThreads, 0, p, true);
  }
}

}  // namespace

void launch_attend_float(const Device& device, AttendArgs p) {
  const int vectors = p.cache.head_size / Vector::kSize;
  if (vectors <= 8) return launch_lanes<8, 1>(device, p);
  if (vectors <= 16) return launch_lanes<16, 1>(device, p);
  if (vectors <= 32) return launch_lanes<32, 1>(device, p);
  launch_lanes<32, 2>(device, p);
}

}  // namespace vllm_sparse::cuda
