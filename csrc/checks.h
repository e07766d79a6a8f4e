// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// What an op may be given, tensor by tensor: dimensions, device, dtype, layout, shape.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <optional>
#include <type_traits>

#include "params.h"

namespace vllm_sparse {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#ifdef VLLM_SPARSE_DEVICE_CUDA
inline bool on_device(const Tensor& t) { return t.is_cuda(); }
constexpr const char* kDeviceName = "GPU";
#else
inline bool on_device(const Tensor& t) { return t.is_cpu(); }
constexpr const char* kDeviceName = "CPU";
#endif

inline Dtype model_dtype(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::kFloat;
    case ScalarType::Half: return Dtype::kHalf;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    default: STD_TORCH_CHECK(false, name, " must be float32, float16 or bfloat16");
  }
}

// `dims` dimensions on the library's device, and the last of them contiguous.
inline void check_tensor(const Tensor& t, const char* name, int64_t dims) {
  STD_TORCH_CHECK(t.dim() == dims, name, " must have ", dims, " dimensions, got ", t.dim());
  STD_TORCH_CHECK(on_device(t), name, " must be on the ", kDeviceName);
  STD_TORCH_CHECK(t.size(dims - 1) <= 1 || t.stride(dims - 1) == 1,
                  name,
                  " must be contiguous in its last dimension");
}
inline void check_tensor(const Tensor& t, const char* name, int64_t dims, const KvCache& cache) {
  check_tensor(t, name, dims);
  STD_TORCH_CHECK(
      t.get_device_index() == cache.device_index, name, " must be on kv_cache's device");
}

inline void check_size(
    const Tensor& t, const char* name, int64_t dim, int64_t size, const char* meaning) {
  STD_TORCH_CHECK(t.size(dim) == size,
                  name,
                  " has size ",
                  t.size(dim),
                  " in dimension ",
                  dim,
                  ", expected ",
                  size,
                  " (",
                  meaning,
                  ")");
}

template <class T>
void check_dtype(const Tensor& t, const char* name) {
  constexpr bool kFloats = std::is_same_v<T, float>, kInts = std::is_same_v<T, int32_t>;
  constexpr bool kBytes = std::is_same_v<T, uint8_t>;
  constexpr ScalarType type = kFloats  ? ScalarType::Float
                              : kInts  ? ScalarType::Int
                              : kBytes ? ScalarType::Byte
                                       : ScalarType::Long;
  constexpr const char* said = kFloats ? "float32" : kInts ? "int32" : kBytes ? "uint8" : "int64";
  STD_TORCH_CHECK(t.scalar_type() == type, name, " must be ", said);
}

struct Size {
  int64_t size;  // negative: any
  const char* meaning = "";
};

// A contiguous tensor of these sizes.
template <class T>
T* packed(const Tensor& t,
          const char* name,
          const KvCache& cache,
          std::initializer_list<Size> sizes) {
  check_tensor(t, name, static_cast<int64_t>(sizes.size()), cache);
  check_dtype<T>(t, name);
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
  int64_t dim = 0;
  for (const Size& s : sizes) {
    if (s.size >= 0) check_size(t, name, dim, s.size, s.meaning);
    ++dim;
  }
  return static_cast<T*>(t.data_ptr());
}
template <class T>
T* packed(const std::optional<Tensor>& t,
          const char* name,
          const KvCache& cache,
          std::initializer_list<Size> sizes) {
  return t ? packed<T>(*t, name, cache, sizes) : nullptr;
}

// [n, num_heads, head_size] in the cache's dtype; returns bytes between rows.
inline int64_t check_heads(const Tensor& t,
                           const char* name,
                           const KvCache& cache,
                           int64_t num_heads,
                           const char* meaning) {
  check_tensor(t, name, 3, cache);
  STD_TORCH_CHECK(model_dtype(t, name) == cache.dtype, name, " must have kv_cache's dtype");
  check_size(t, name, 1, num_heads, meaning);
  check_size(t, name, 2, cache.head_size, "head_size");
  return t.stride(0) * cache.element_size;
}
// Likewise, heads packed.
inline int64_t check_packed_heads(const Tensor& t,
                                  const char* name,
                                  const KvCache& cache,
                                  int64_t num_heads,
                                  const char* meaning) {
  const int64_t stride = check_heads(t, name, cache, num_heads, meaning);
  STD_TORCH_CHECK(t.size(1) <= 1 || t.stride(1) == t.size(2),
                  name,
                  " must be contiguous in its last two dimensions");
  return stride;
}

// kv_cache: [num_blocks, num_kv_heads, kBlockSize, C] with whole chunks contiguous.
// `format`: KvFormat.code of vllm_sparse/cache/formats.py.
inline KvCache kv_cache_view(const Tensor& t, int64_t head_size, int64_t format) {
  check_tensor(t, "kv_cache", 4);
  KvCache cache;
  cache.dtype = model_dtype(t, "kv_cache");
  cache.element_size = static_cast<int>(t.element_size());
  cache.head_size = static_cast<int>(head_size);
  STD_TORCH_CHECK(
      cache.set_format(format), "kv_format ", format, " is not a format for head size ", head_size);
  cache.device_index = t.get_device_index();
#ifdef VLLM_SPARSE_DEVICE_CUDA
  STD_TORCH_CHECK(cache.dtype != Dtype::kFloat, "kv_cache must be float16 or bfloat16 on GPUs");
#endif
  STD_TORCH_CHECK(head_size >= 16 && head_size <= kMaxHeadSize && head_size % 16 == 0,
                  "head_size must be a multiple of 16 from 16 to ",
                  kMaxHeadSize,
                  ", got ",
                  head_size);
  check_size(t, "kv_cache", 2, kBlockSize, "tokens of a block");
  STD_TORCH_CHECK(t.stride(2) == t.size(3),
                  "kv_cache must hold each (block, head) in one contiguous chunk");
  STD_TORCH_CHECK(t.size(3) * cache.element_size == cache.content_bytes(),
                  "kv_cache has ",
                  t.size(3) * cache.element_size,
                  " bytes per token and head, expected ",
                  cache.content_bytes(),
                  " for head size ",
                  head_size,
                  cache.quantised() ? " and its format" : "");
  cache.data = static_cast<uint8_t*>(t.data_ptr());
  cache.num_blocks = t.size(0);
  cache.num_kv_heads = static_cast<int>(t.size(1));
  cache.block_stride = t.stride(0) * cache.element_size;
  cache.head_stride = t.stride(1) * cache.element_size;
#ifdef VLLM_SPARSE_DEVICE_CUDA
  // Kernels move K and V 16 bytes at a time.
  STD_TORCH_CHECK(
      (reinterpret_cast<uintptr_t>(cache.data) | cache.block_stride | cache.head_stride) % 16 == 0,
      "kv_cache must be aligned to 16 bytes");
#endif
  return cache;
}

}  // namespace vllm_sparse
