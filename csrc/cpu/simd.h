// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
//
// 16 fp32 lanes in compiler vector extensions: one zmm under AVX-512, two ymm under AVX2,
// four xmm otherwise. Included once per instruction set, inside that set's namespace, with
// the target already chosen by a pragma; hence no include guard and no standard headers.

// Nothing here leaves its translation unit, so the calling convention of vectors is free.
#pragma GCC diagnostic ignored "-Wpsabi"

// Loops over registers must be unrolled, or the registers become an array in memory.
#define UNROLL _Pragma("GCC unroll 8")

typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef uint16_t vu16 __attribute__((vector_size(32)));

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

static inline vf splat(float x) { return x - vf{}; }
static inline vf as_float(vu x) { return (vf)x; }

template <class V, class P>
static inline V load_as(const P* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}

static inline vf load16(const float* p) { return load_as<vf>(p); }
static inline vf load16(const BFloat16* p) {
  return as_float(__builtin_convertvector(load_as<vu16>(p), vu) << 16);
}
static inline vf load16(const Half* p) {
#if defined(ISA_AVX512)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(ISA_AVX2)
  const __m256 low = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256 high = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p) + 1));
  vf v;
  __builtin_memcpy(&v, &low, 32);
  __builtin_memcpy(reinterpret_cast<char*>(&v) + 32, &high, 32);
  return v;
#else
  // Exponent shift by multiplication; exact for normal and subnormal numbers, inf and NaN kept.
  const vu h = __builtin_convertvector(load_as<vu16>(p), vu);
  const vu sign = (h & 0x8000u) << 16;
  const vu magnitude = (h & 0x7fffu) << 13;
  const vf value = as_float(magnitude) * 5.192296858534828e33f;  // 2^112
  const vu special = (vu)(magnitude >= (0x7c00u << 13)) & 0x7f800000u;
  return as_float((vu)value | special | sign);
#endif
}

static inline void store16(float* p, vf v) { __builtin_memcpy(p, &v, sizeof(v)); }
static inline void store16(BFloat16* p, vf v) {
  const vu bits = (vu)v;
  const vu rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const vu quiet = (bits >> 16) | 0x40u;
  const vu is_nan = (vu)(v != v);
  const vu16 out = __builtin_convertvector((is_nan & quiet) | (~is_nan & (rounded >> 16)), vu16);
  __builtin_memcpy(p, &out, sizeof(out));
}

static inline uint16_t half_from_float(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (bits >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (bits < 0x38800000u) {  // subnormal: let fp32 addition round to nearest even
    float magnitude;
    __builtin_memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    uint32_t shifted;
    __builtin_memcpy(&shifted, &magnitude, 4);
    return static_cast<uint16_t>(sign | (shifted - 0x3f000000u));
  }
  bits += 0xc8000fffu + ((bits >> 13) & 1u);
  return static_cast<uint16_t>(sign | (bits >> 13));
}
static inline void store16(Half* p, vf v) {
#if defined(ISA_AVX512)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, 0));
#else
  for (int i = 0; i < 16; ++i) p[i].bits = half_from_float(v[i]);
#endif
}
static inline float to_float(Half h) {
#if defined(ISA_AVX512) || defined(ISA_AVX2)
  return _cvtsh_ss(h.bits);
#else
  Half lanes[16] = {h};
  return load16(lanes)[0];
#endif
}

static inline vf vmax(vf a, vf b) {
#if defined(ISA_AVX512)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}
static inline vf vmin(vf a, vf b) { return a < b ? a : b; }

static inline float hsum(vf v) {
#if defined(ISA_AVX512)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float s = 0;
  for (int i = 0; i < 16; ++i) s += v[i];
  return s;
#endif
}
static inline float hmax(vf v) {
#if defined(ISA_AVX512)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float m = v[0];
  for (int i = 1; i < 16; ++i) m = v[i] > m ? v[i] : m;
  return m;
#endif
}

// Round to the nearest integer, ties to even; |x| < 2^22.
static inline vf round_even(vf x) { return (x + 12582912.0f) - 12582912.0f; }

// e^x for x <= 0, relative error below 3e-7 plus that of the product x * log2(e);
// 0 where it underflows.
static inline vf exp_negative(vf x) {
#if defined(ISA_AVX512)
  // 2^y as 2^floor(y) * 2^rest; scaling takes the floor and underflows to 0 by itself.
  const __m512 y = _mm512_mul_ps((__m512)x, _mm512_set1_ps(1.44269504088896341f));
  const vf r = (vf)_mm512_reduce_ps(y, _MM_FROUND_TO_NEG_INF);
  vf p = splat(1.877578051e-03f);
  p = p * r + 8.989343716e-03f;
  p = p * r + 5.582630759e-02f;
  p = p * r + 2.401536243e-01f;
  p = p * r + 6.931530715e-01f;
  p = p * r + 9.999999252e-01f;
  return (vf)_mm512_scalef_ps((__m512)p, y);
#else
  const vi in_range = x > -87.0f;
  x = vmax(x, splat(-87.0f));
  const vf n = round_even(x * 1.44269504088896341f);
  vf r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const vi exponent = (__builtin_convertvector(n, vi) + 127) << 23;
  return as_float((vu)(p * (vf)exponent) & (vu)in_range);
#endif
}

// cap * tanh(x / cap): the soft cap that models such as Gemma put on logits.
static inline vf soft_cap_logits(vf x, float cap) {
  const vf a = x / cap;
  const vu sign = (vu)a & 0x80000000u;
  const vf magnitude = as_float((vu)a & 0x7fffffffu);
  const vf e = exp_negative(magnitude * -2.0f);
  return as_float((vu)(cap * ((1.0f - e) / (1.0f + e))) | sign);
}

// Sums of four registers in lanes 0 to 3.
static inline vf hsum4(vf a, vf b, vf c, vf d) {
#if defined(ISA_AVX512)
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps((__m512)a, (__m512)b),
                                  _mm512_unpackhi_ps((__m512)a, (__m512)b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps((__m512)c, (__m512)d),
                                  _mm512_unpackhi_ps((__m512)c, (__m512)d));
  __m512 s = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  s = _mm512_add_ps(s, _mm512_shuffle_f32x4(s, s, 0x4e));
  return (vf)_mm512_add_ps(s, _mm512_shuffle_f32x4(s, s, 0xb1));
#else
  return vf{hsum(a), hsum(b), hsum(c), hsum(d)};
#endif
}
