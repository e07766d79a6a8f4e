// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// The decode kernel's attention where blocks hold K by token.
#pragma once

#include "attend/code_tile.cuh"
#include "common/tails.cuh"
#include "decode/shared.cuh"

namespace vllm_sparse::cuda {

constexpr int kCodeSlots = 3;  // tiles of a warp's ring

// Listed tokens that are sealed.
struct CodeReader {
  const DecodeArgs& p;
  const int32_t *list, *table;  // list: null for all tokens
  int head, count, end;
  int limit;  // tokens that are sealed
  int next;   // tile whose tokens are looked up next

  __device__ int tokens() {
    const int at = max(min(next * kTile + static_cast<int>(threadIdx.x) % kTile, count - 1), 0);
    next += kWarps;
    const int token = list != nullptr ? __ldcg(list + at) : at;
    return min(max(token, 0), limit - 1);
  }
  __device__ int32_t block(int token) const { return table[token / kBlockSize]; }
};

template <class T, int D>
__device__ void attend_code_tiles(
    CodeReader reader, int begin, float scale, uint32_t ring, CodeAccumulator<T, D>& a) {
  using Tile = CodeTile<D>;
  static_assert(Tile::kTokens == kTile);
  int tile = begin + threadIdx.x / 32;
  if (tile >= reader.end) return;
  reader.next = tile;
  const DecodeArgs& p = reader.p;
  const uint8_t* base = p.cache.data + reader.head * p.cache.head_stride;
  const uint32_t units = static_cast<uint32_t>(p.cache.block_stride) / Tile::kUnit;
  const auto copy = [&](int of, int token, int32_t id, uint32_t slot) {
    if (of < reader.end) {
      const uint32_t chunk = static_cast<uint32_t>(safe_block(p.cache, id)) * units;
      copy_code_tile<D>(base, p.codes, chunk, token % kBlockSize, slot);
    }
    copy_commit();
  };
  // Tokens and blocks are looked up ahead of copies, each by one tile.
  int token[kCodeSlots];
  int32_t id[kCodeSlots];
#pragma unroll
  for (auto& t : token) t = reader.tokens();
  int next_token = reader.tokens(), after_token = reader.tokens();
#pragma unroll
  for (int i = 0; i < kCodeSlots; ++i) id[i] = reader.block(token[i]);
  int32_t next_id = reader.block(next_token);
#pragma unroll
  for (int i = 0; i < kCodeSlots; ++i) {
    copy(tile + i * kWarps, token[i], id[i], ring + i * Tile::kBytes);
  }
  uint32_t slot = ring;
#pragma unroll 1
  for (; tile < reader.end; tile += kWarps) {
    const int left = reader.count - tile * kTile;
    uint32_t probabilities[2];
    copy_wait<kCodeSlots - 1>();
    __syncwarp();
    a.add_keys(slot, left >= kTile ? 0xffffu : (1u << left) - 1, scale, 0, probabilities);
    a.add_values(slot, probabilities);
    __syncwarp();
    copy(tile + kCodeSlots * kWarps, next_token, next_id, slot);
    next_token = after_token;
    next_id = reader.block(next_token);
    after_token = reader.tokens();
    slot = slot == ring + (kCodeSlots - 1) * Tile::kBytes ? ring : slot + Tile::kBytes;
  }
  copy_wait<0>();
}

// Tokens that are not sealed, all of which a list has: 16 of them go to a warp that has least else
// to do.
template <class T, int D>
__device__ void attend_tail(const DecodeArgs& p,
                            int length,
                            int sealed,
                            const int32_t* table,
                            int head,
                            const T* query,
                            int rank,
                            int C,
                            float scale,
                            CodeAccumulator<T, D>& a) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first = ((kWarps - 1 - warp) * C + C - 1 - rank) * kTile;
  const int left = length - sealed * kBlockSize - first;
  if (left <= 0) return;
  const auto row_of = [&](int t) {
    return reinterpret_cast<const T*>(tail_row(p, table, head, sealed, first + min(t, left - 1)));
  };
  const uint32_t valid = left >= kTile ? 0xffffu : (1u << left) - 1;
  a.add_rows(row_of(lane / 4), row_of(lane / 4 + 8), valid, query, p.group, scale, 0);
}

}  // namespace vllm_sparse::cuda
