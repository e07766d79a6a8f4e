// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// Shapes of everything the kernels touch. The block layout is described in
// vllm_sparse/cache/layout.py; the offsets here must stay equal to it.
#pragma once

#include <cstdint>

namespace vllm_sparse {

enum class Dtype : int { kFloat, kHalf, kBFloat16 };

constexpr int kBlockSize = 128;  // tokens of a block
constexpr int kLanes = 16;       // 32-bit code words of a channel
constexpr int kCodeBytes = kBlockSize / 2;
constexpr int kMaxHeadSize = 256;

// Kept tokens are counted in bins of eight to an octave; the last entry is their sum
// (vllm_sparse/ops/kept.py).
constexpr int kKeptBins = 176;

#ifdef __CUDACC__
#define VLLM_SPARSE_HOST_DEVICE __host__ __device__
#else
#define VLLM_SPARSE_HOST_DEVICE
#endif

// The bin of a count of at least 1: its exponent, and the three bits after its first.
VLLM_SPARSE_HOST_DEVICE inline int kept_bin(int32_t count) {
#ifdef __CUDA_ARCH__
  const int exponent = 31 - __clz(count);
#else
  const int exponent = 31 - __builtin_clz(static_cast<unsigned>(count));
#endif
  const int next = exponent >= 3 ? count >> (exponent - 3) : count << (3 - exponent);
  const int bin = 8 * exponent + (next & 7);
  return bin < kKeptBins - 2 ? bin : kKeptBins - 2;
}

// Whether a token is stored: block 0 is vLLM's null block, which pads tables and is never written.
VLLM_SPARSE_HOST_DEVICE inline bool has_slot(int64_t slot) { return slot >= kBlockSize; }

struct KvCache {
  uint8_t* data;                      // [num_blocks, num_kv_heads] chunks
  int64_t block_stride, head_stride;  // bytes
  int64_t num_blocks;
  int num_kv_heads, head_size, element_size;
  Dtype dtype;
  // Quantised formats; 0: rows, then the sidecar.
  int key_bits = 0, value_bits = 0, value_group = 0, key_groups = 1;
  bool has_mean = true;
  bool key_rows = false;  // K also by token, 8 bits
  bool bare = false;      // rows, then bytes that no op reads or writes
  int64_t state_bytes = 0;
  int device_index;

  // Takes KvFormat.code of vllm_sparse/cache/formats.py; false: it is none for the head size.
  bool set_format(int64_t format) {
    bare = (format >> 50 & 1) != 0;
    if (bare) {
      has_mean = false;
      state_bytes = format & 0xffffffff;
      return true;
    }
    const int key_group = static_cast<int>(format >> 32 & 0xffff);
    key_bits = static_cast<int>(format & 0xff);
    value_bits = static_cast<int>(format >> 8 & 0xff);
    value_group = static_cast<int>(format >> 16 & 0xffff);
    key_groups = format == 0 ? 1 : kBlockSize / (key_group > 0 ? key_group : kBlockSize);
    has_mean = format == 0 || (format >> 48 & 1) != 0;
    key_rows = (format >> 49 & 1) != 0;
    // 8-bit K has one scale for the block: halves of a code share it.
    const bool key = (key_bits == 4 && (key_group == 32 || key_group == kBlockSize)) ||
                     (key_bits == 8 && key_group == kBlockSize && !key_rows);
    const bool value = (value_bits == 4 || value_bits == 8) && value_group > 0 &&
                       value_group % 16 == 0 && head_size % value_group == 0;
    return format == 0 || (key && value);
  }
  uint8_t* chunk(int64_t block, int head) const {
    return data + block * block_stride + head * head_stride;
  }
  VLLM_SPARSE_HOST_DEVICE bool quantised() const { return key_bits > 0; }
  VLLM_SPARSE_HOST_DEVICE int64_t row_bytes() const { return 2ll * head_size * element_size; }
  int64_t plane_bytes() const { return int64_t{head_size} * kCodeBytes; }
  int64_t codes_offset() const { return quantised() ? 0 : kBlockSize * row_bytes(); }
  int64_t low_codes_offset() const { return codes_offset() + plane_bytes(); }
  int64_t params_offset() const { return codes_offset() + (key_bits == 8 ? 2 : 1) * plane_bytes(); }
  int64_t key_rows_offset() const { return params_offset() + int64_t{head_size} * 4 * key_groups; }
  int64_t value_codes_offset() const {
    return key_rows_offset() + (key_rows ? int64_t{head_size} * kBlockSize : 0);
  }
  int64_t value_code_bytes() const { return int64_t{head_size} * value_bits / 8; }
  int64_t value_params_offset() const {
    return value_codes_offset() + kBlockSize * value_code_bytes();
  }
  int64_t value_param_bytes() const { return quantised() ? head_size / value_group * 4 : 0; }
  int64_t key_row_params_offset() const {
    return value_params_offset() + kBlockSize * value_param_bytes();
  }
  int64_t prefix_mean_offset() const {
    return key_row_params_offset() + (key_rows ? kBlockSize * 4 : 0);
  }
  int64_t content_bytes() const {
    const int64_t used = bare ? kBlockSize * row_bytes() + state_bytes
                              : prefix_mean_offset() + (has_mean ? int64_t{head_size} * 2 : 0);
    const int64_t per_token = (used + kBlockSize - 1) / kBlockSize;
    return (per_token + element_size - 1) / element_size * element_size;
  }

  // Blocks of a context that are read from their codes: never a quantised query's own.
  VLLM_SPARSE_HOST_DEVICE int32_t sealed_blocks(int32_t seq_len) const {
    return (seq_len - (quantised() ? 1 : 0)) / kBlockSize;
  }
  // Of quantised formats, rows of a block that is not full lie in chunks of blocks to come.
  int rows_per_block() const {
    return static_cast<int>(kBlockSize * content_bytes() / row_bytes());
  }
  int lookahead_blocks() const {
    return quantised() ? (kBlockSize + rows_per_block() - 1) / rows_per_block() : 0;
  }
  // The K|V row of a token whose block, the context's `index`-th, is not sealed.
  uint8_t* tail_row(const int32_t* table, int head, int32_t index, int offset) const {
    if (!quantised()) return chunk(table[index], head) + offset * row_bytes();
    const int rows = rows_per_block();
    return chunk(table[index + lookahead_blocks() - offset / rows], head) +
           offset % rows * row_bytes();
  }
};

// The same for kernels on a GPU: divisions are made once, ahead of a launch.
struct Codes {
  int low_codes, params, value_codes, value_params, mean;  // mean: also of plain rows
  int key_rows, key_row_params;                            // 0: K is read by channel
  int value_code_bytes, value_param_bytes;                 // of a token
  int rows, ahead;  // of a chunk; blocks to come that hold a tail

  static Codes of(const KvCache& cache) {
    const auto narrow = [](int64_t x) { return static_cast<int>(x); };
    const int mean = narrow(cache.prefix_mean_offset());
    if (!cache.quantised()) return {.mean = mean};
    return {narrow(cache.low_codes_offset()),
            narrow(cache.params_offset()),
            narrow(cache.value_codes_offset()),
            narrow(cache.value_params_offset()),
            mean,
            cache.key_rows ? narrow(cache.key_rows_offset()) : 0,
            cache.key_rows ? narrow(cache.key_row_params_offset()) : 0,
            narrow(cache.value_code_bytes()),
            narrow(cache.value_param_bytes()),
            cache.rows_per_block(),
            cache.lookahead_blocks()};
  }
};

// Requests, or rows of a decode batch, and their blocks.
struct Contexts {
  KvCache cache;
  const int32_t* block_table;              // [num_rows, block_table_stride]
  int64_t block_table_stride, max_blocks;  // max_blocks: columns
  const int32_t* seq_lens;                 // [num_rows], new tokens included
  int64_t num_rows;

  VLLM_SPARSE_HOST_DEVICE const int32_t* table(int64_t row) const {
    return block_table + row * block_table_stride;
  }
};

// A block whose last token a call stores.
struct FilledBlock {
  int64_t row;
  int32_t index;         // place in the context
  int32_t id, previous;  // previous: negative for the first of a context
  int32_t old;           // tokens stored in earlier calls
  int64_t first_new;     // the first new one, in key and value
};

struct StoreParams : Contexts {
  const void *key, *value;                     // [num_tokens, num_kv_heads, head_size]
  int64_t key_stride, value_stride;            // bytes between tokens
  int64_t key_head_stride, value_head_stride;  // bytes between heads
  const int64_t* slot_mapping;                 // [num_tokens], see has_slot
  int64_t num_tokens;
  const int32_t* query_start_loc;  // [num_rows + 1]
  const FilledBlock* filled;       // CPU: [num_filled], sorted by index
  int64_t num_filled;
};

struct GatherParams : Contexts {
  const int64_t* out_start;  // [num_rows], first output token of a row
  void *key, *value;         // [num_out_tokens, num_kv_heads, head_size]
  int64_t num_out_tokens;
};

struct QueryParams : Contexts {
  const void* query;     // [num_rows, num_kv_heads * group, head_size]
  int64_t query_stride;  // bytes between rows
  int group;             // query heads of a KV head
  const float* sinks;    // [num_kv_heads * group] logits that join the softmax, or null
};

struct SparqOptions {
  int rank, local_window, sink_tokens;
  int min_tokens;         // with top_p below 1; budgets are the most
  float scale, soft_cap;  // soft_cap 0: none
  float top_p;            // 1: budgets are met; below: as many tokens as leave 1 - top_p outside
};

struct SelectParams : QueryParams, SparqOptions {
  const int32_t* budgets;  // [num_rows] tokens to keep; negative: keep all
  int32_t* indices;        // [num_rows, num_kv_heads, max_kept] ascending positions
  int64_t max_kept;
  int32_t* counts;          // [num_rows, num_kv_heads]; -1: attend to everything
  float* kept_mass;         // [num_rows, num_kv_heads * group] or null
  int64_t* kept_histogram;  // [num_kv_heads, kKeptBins] or null
};

struct AttendParams : QueryParams {
  float scale, soft_cap;
  const int32_t* indices;  // [num_rows, num_kv_heads, max_kept] or null: everything
  int64_t max_kept;
  const int32_t* counts;   // [num_rows, num_kv_heads]; -1: everything
  const float* kept_mass;  // [num_rows, num_kv_heads * group] or null: no mean term
  float* lse = nullptr;    // [num_rows, num_kv_heads * group] or null
  void* out;               // [num_rows, num_kv_heads * group, head_size]
  int64_t out_stride;      // bytes between rows
};

// What attention takes over from the selection before it; outputs are left to the caller.
inline void attend_after(const SelectParams& s, AttendParams& p) {
  static_cast<QueryParams&>(p) = s;
  p.scale = s.scale;
  p.soft_cap = s.soft_cap;
  p.indices = s.indices;
  p.max_kept = s.max_kept;
  p.counts = s.counts;
  p.kept_mass = s.kept_mass;
}

}  // namespace vllm_sparse
