// A vector of W floats for the instruction set that the including file chose (DYNACT_AVX512, DYNACT_AVX2 or neither).
// Everything here has internal linkage: three copies live in one library.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "kernels.h"
#if defined(DYNACT_AVX512) || defined(DYNACT_AVX2)
#include <immintrin.h>
#endif

namespace dynact {
namespace {

inline float widen(float v) { return v; }
inline float widen(bf16 v) {
  uint32_t u = static_cast<uint32_t>(v.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

// An AMD core takes more lines on their way to its second-level cache than to its first: there they are asked for into the
// second, and earlier. Of a plain read's 27 GB/s (EPYC) rows of 576 in bf16 got 12 and get 24.
#if defined(__x86_64__) && defined(__GNUC__)
inline bool into_second() {
  __builtin_cpu_init();
  return __builtin_cpu_is("amd");
}
const bool kSecond = into_second();
#else
constexpr bool kSecond = false;
#endif
const int64_t kLead = kSecond ? 4096 : 1024;  // bytes of a row between a prefetch and its use
inline void prefetch(const void* p) {
  if (kSecond)
    __builtin_prefetch(p, 0, 2);
  else
    __builtin_prefetch(p, 0, 3);
}

#if defined(DYNACT_AVX512)

constexpr int W = 16;
struct Vec {
  __m512 v;
};
inline Vec zero() { return {_mm512_setzero_ps()}; }
inline Vec set(float a) { return {_mm512_set1_ps(a)}; }
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline __m512 widen16(__m256i h) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)); }
inline Vec load(const bf16* p) { return {widen16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
inline __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
inline Vec load(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
inline Vec load(const bf16* p, int64_t n) { return {widen16(_mm256_maskz_loadu_epi16(first(n), p))}; }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline void store(float* p, Vec a, int64_t n) { _mm512_mask_storeu_ps(p, first(n), a.v); }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec relu(Vec a) { return {_mm512_max_ps(_mm512_setzero_ps(), a.v)}; }  // the second operand wins on NaN
inline float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
// bits of a, rounded to nearest even at bit 16; NaN stays NaN
inline __m512i round_bits(__m512 a) {
  __m512i u = _mm512_castps_si512(a);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
  return _mm512_mask_mov_epi32(r, nan, _mm512_set1_epi32(0x7fc00000));
}
inline Vec round_bf16(Vec a) {
  return {_mm512_castsi512_ps(_mm512_and_si512(round_bits(a.v), _mm512_set1_epi32(0xffff0000)))};
}
inline void store(bf16* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_bits(a.v), 16)));
}
// e^a for the uses here: +inf above 88.3, 0 below -87.3, NaN stays NaN
inline Vec exp(Vec a) {
  __m512 x = _mm512_max_ps(_mm512_set1_ps(-88.0f), _mm512_min_ps(_mm512_set1_ps(89.0f), a.v));
  __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.0f / 5040);
  for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  p = _mm512_scalef_ps(p, n);
  p = _mm512_mask_mov_ps(p, _mm512_cmp_ps_mask(a.v, _mm512_set1_ps(88.3f), _CMP_GT_OQ), _mm512_set1_ps(INFINITY));
  return {_mm512_mask_mov_ps(p, _mm512_cmp_ps_mask(a.v, _mm512_set1_ps(-87.3f), _CMP_LT_OQ), _mm512_setzero_ps())};
}

#elif defined(DYNACT_AVX2)

constexpr int W = 8;
struct Vec {
  __m256 v;
};
inline Vec zero() { return {_mm256_setzero_ps()}; }
inline Vec set(float a) { return {_mm256_set1_ps(a)}; }
inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Vec load(const bf16* p) {
  __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))};
}
template <typename T>
inline Vec load(const T* p, int64_t n) {
  float a[W] = {};
  for (int64_t i = 0; i < n; ++i) a[i] = widen(p[i]);
  return load(a);
}
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
inline void store(float* p, Vec a, int64_t n) {
  float b[W];
  store(b, a);
  std::memcpy(p, b, static_cast<size_t>(n) * 4);
}
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec relu(Vec a) { return {_mm256_max_ps(_mm256_setzero_ps(), a.v)}; }  // the second operand wins on NaN
inline float sum(Vec a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
// bits of a, rounded to nearest even at bit 16; NaN stays NaN
inline __m256i round_bits(__m256 a) {
  __m256i u = _mm256_castps_si256(a);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  __m256i r = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  __m256 nan = _mm256_cmp_ps(a, a, _CMP_UNORD_Q);
  return _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc00000), _mm256_castps_si256(nan));
}
inline Vec round_bf16(Vec a) {
  return {_mm256_castsi256_ps(_mm256_and_si256(round_bits(a.v), _mm256_set1_epi32(0xffff0000)))};
}
inline void store(bf16* p, Vec a) {
  __m256i h = _mm256_srli_epi32(round_bits(a.v), 16);
  h = _mm256_permute4x64_epi64(_mm256_packus_epi32(h, h), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(h));
}
// e^a for the uses here: +inf above 88.3, 0 below -87.3, NaN stays NaN
inline Vec exp(Vec a) {
  __m256 x = _mm256_max_ps(_mm256_set1_ps(-87.3f), _mm256_min_ps(_mm256_set1_ps(88.3f), a.v));
  __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), 8);
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
  __m256 p = _mm256_set1_ps(1.0f / 5040);
  for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(c));
  __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  p = _mm256_mul_ps(p, _mm256_castsi256_ps(bits));  // NaN stays NaN: p is NaN whatever the scale is
  p = _mm256_blendv_ps(p, _mm256_set1_ps(INFINITY), _mm256_cmp_ps(a.v, _mm256_set1_ps(88.3f), _CMP_GT_OQ));
  return {_mm256_blendv_ps(p, _mm256_setzero_ps(), _mm256_cmp_ps(a.v, _mm256_set1_ps(-87.3f), _CMP_LT_OQ))};
}

#else  // plain loops; the compiler maps them to what the machine has (SSE2, NEON)

constexpr int W = 4;
struct Vec {
  float v[W];
};
template <typename F>
inline Vec each(F f) {
  Vec r;
  for (int i = 0; i < W; ++i) r.v[i] = f(i);
  return r;
}
inline Vec set(float a) {
  return each([&](int) { return a; });
}
inline Vec zero() { return set(0.0f); }
template <typename T>
inline Vec load(const T* p) {
  return each([&](int i) { return widen(p[i]); });
}
template <typename T>
inline Vec load(const T* p, int64_t n) {
  return each([&](int i) { return i < n ? widen(p[i]) : 0.0f; });
}
inline void store(float* p, Vec a) { std::memcpy(p, a.v, sizeof a.v); }
inline void store(float* p, Vec a, int64_t n) { std::memcpy(p, a.v, static_cast<size_t>(n) * 4); }
inline Vec fma(Vec a, Vec b, Vec c) {
  return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
inline Vec operator+(Vec a, Vec b) {
  return each([&](int i) { return a.v[i] + b.v[i]; });
}
inline Vec operator-(Vec a, Vec b) {
  return each([&](int i) { return a.v[i] - b.v[i]; });
}
inline Vec operator*(Vec a, Vec b) {
  return each([&](int i) { return a.v[i] * b.v[i]; });
}
inline Vec operator/(Vec a, Vec b) {
  return each([&](int i) { return a.v[i] / b.v[i]; });
}
inline Vec relu(Vec a) {
  return each([&](int i) { return a.v[i] < 0.0f ? 0.0f : a.v[i]; });
}
inline float sum(Vec a) { return (a.v[0] + a.v[1]) + (a.v[2] + a.v[3]); }
inline bf16 narrow(float a) {
  uint32_t u;
  std::memcpy(&u, &a, 4);
  if (a != a) return {0x7fc0};
  return {static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}
inline Vec round_bf16(Vec a) {
  return each([&](int i) { return widen(narrow(a.v[i])); });
}
inline void store(bf16* p, Vec a) {
  for (int i = 0; i < W; ++i) p[i] = narrow(a.v[i]);
}
inline Vec exp(Vec a) {
  return each([&](int i) { return std::exp(a.v[i]); });
}

#endif

inline Vec rounded(Vec a, const float*) { return a; }
inline Vec rounded(Vec a, const bf16*) { return round_bf16(a); }

}  // namespace
}  // namespace dynact
