// The kernels, written once over simd.h's vector. Included by isa_*.cpp, each with its own target.
#pragma once
#include "lowbit_impl.h"
#include "simd.h"

namespace dynact {
namespace {

template <typename T>
constexpr int LINE = 64 / static_cast<int>(sizeof(T));  // elements in a cache line

// Calls line(i) for every whole cache line of R rows read side by side, and returns where the rest begins. A row is
// too short for the hardware to follow, least of all over the jump to the next active one: each line is asked for kLead
// bytes ahead, and past the row's end that means the row that takes its place in the next group.
template <int R, typename T, typename Line>
inline int64_t walk(const T* const* row, const T* const* next, int64_t n, Line line) {
  const int64_t lead = kLead / static_cast<int64_t>(sizeof(T));
  const int64_t full = n / LINE<T> * LINE<T>, cut = std::max<int64_t>(0, full - lead);
  int64_t i = 0;
  for (; i < cut; i += LINE<T>) {
    for (int r = 0; r < R; ++r) prefetch(row[r] + lead + i);
    line(i);
  }
  for (; i < full; i += LINE<T>) {
    for (int r = 0; r < R; ++r) prefetch(next[r] + (i - cut));
    line(i);
  }
  return full;
}

// y += sum over R rows. y stays in cache. A group is summed before it meets y, which costs fewer roundings.
template <int R, typename T>
inline void axpy_group(const T* const* row, const T* const* next, const float* val, int64_t N, float* y) {
  Vec v[R];
  for (int r = 0; r < R; ++r) v[r] = set(val[r]);
  int64_t n = walk<R>(row, next, N, [&](int64_t i) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int u = 0; u < LINE<T>; u += W) {
      Vec s = v[0] * load(row[0] + i + u);
#pragma GCC unroll 8
      for (int r = 1; r < R; ++r) s = fma(v[r], load(row[r] + i + u), s);
      store(y + i + u, load(y + i + u) + s);
    }
  });
  for (; n < N; n += W) {
    int64_t left = std::min<int64_t>(W, N - n);
    Vec s = v[0] * load(row[0] + n, left);
    for (int r = 1; r < R; ++r) s = fma(v[r], load(row[r] + n, left), s);
    store(y + n, load(y + n, left) + s, left);
  }
}

// Calls group(rows, next rows, j) for R rows at a time while there are R, and returns how far it got.
template <int R, typename T, typename At, typename Group>
inline int64_t by_groups(int64_t j, int64_t m, At at, Group group) {
  const T *row[R], *next[R];
  for (; j + R <= m; j += R) {
    for (int r = 0; r < R; ++r) {
      row[r] = at(j + r);
      next[r] = at(std::min(j + R + r, m - 1));
    }
    group(row, next, j);
  }
  return j;
}

template <int R, typename T>
inline int64_t axpy_groups(const T* w, int64_t N, const int32_t* idx, int64_t first, const float* val, int64_t j,
                           int64_t m, float* y) {
  auto at = [&](int64_t i) { return w + (idx ? idx[i] : first + i) * N; };
  auto group = [&](const T* const* row, const T* const* next, int64_t i) {
    axpy_group<R>(row, next, val + i, N, y);
  };
  return by_groups<R, T>(j, m, at, group);
}

template <typename T>
void axpy_rows(const T* w, int64_t N, const int32_t* idx, int64_t first, const float* val, int64_t m, float* y) {
  // 8 is the fastest of 4, 6, 8 and 12 at 50 % zeros
  int64_t j = axpy_groups<8>(w, N, idx, first, val, 0, m, y);
  j = axpy_groups<4>(w, N, idx, first, val, j, m, y);
  axpy_groups<1>(w, N, idx, first, val, j, m, y);
}

// y[b] += sum over R rows, for each b of a batch, rows of y `ly` apart: the weights stay in registers, the values of x
// come by broadcast.
template <int R, typename T>
inline void batch_group(const T* const* row, const T* const* next, const float* val, int64_t ld, int64_t n, int64_t B,
                        float* y, int64_t ly) {
  int64_t i = walk<R>(row, next, n, [&](int64_t i) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int u = 0; u < LINE<T>; u += W) {
      Vec w[R];
      for (int r = 0; r < R; ++r) w[r] = load(row[r] + i + u);
      for (int64_t b = 0; b < B; ++b) {
        const float* v = val + b * ld;
        float* to = y + b * ly + i + u;
        Vec s = set(v[0]) * w[0];
#pragma GCC unroll 8
        for (int r = 1; r < R; ++r) s = fma(set(v[r]), w[r], s);
        store(to, load(to) + s);
      }
    }
  });
  for (; i < n; i += W) {
    int64_t left = std::min<int64_t>(W, n - i);
    for (int64_t b = 0; b < B; ++b) {
      const float* v = val + b * ld;
      float* to = y + b * ly + i;
      Vec s = set(v[0]) * load(row[0] + i, left);
      for (int r = 1; r < R; ++r) s = fma(set(v[r]), load(row[r] + i, left), s);
      store(to, load(to, left) + s, left);
    }
  }
}

template <typename T>
void axpy_batch(const T* w, int64_t N, const int32_t* idx, const float* val, int64_t ld, int64_t m, int64_t B,
                float* y) {
  // A strip of the outputs at a time, summed in the first-level cache. Its rows are a line more than a power of two
  // apart: at N = 4096 those of y itself would all fall into one set of the cache.
  constexpr int64_t SIZE = 8192, PAD = 16;
  alignas(64) float sums[SIZE + kMaxRows * PAD];
  const int64_t strip = SIZE / B / LINE<T> * LINE<T>, ly = strip + PAD;
  for (int64_t n = 0; n < N; n += strip) {
    const int64_t width = std::min(strip, N - n);
    std::fill(sums, sums + B * ly, 0.0f);
    auto at = [&](int64_t i) { return w + n + idx[i] * N; };
    auto group = [&](auto rows) {
      constexpr int R = decltype(rows)::value;
      return [&](const T* const* row, const T* const* next, int64_t i) {
        batch_group<R>(row, next, val + i, ld, width, B, sums, ly);
      };
    };
    int64_t j = by_groups<8, T>(0, m, at, group(std::integral_constant<int, 8>()));
    j = by_groups<4, T>(j, m, at, group(std::integral_constant<int, 4>()));
    by_groups<1, T>(j, m, at, group(std::integral_constant<int, 1>()));
    for (int64_t b = 0; b < B; ++b)
      for (int64_t i = 0; i < width; ++i) y[b * N + n + i] += sums[b * ly + i];
  }
}

// R dot products side by side.
template <int R, typename T>
inline void dot_group(const T* const* row, const T* const* next, int64_t K, const float* x, float* out) {
  constexpr int U = LINE<T> / W > 1 ? 2 : 1;  // accumulators a row: a line of 16-bit weights is two vectors or more
  Vec acc[R][U];
  for (int r = 0; r < R; ++r)
    for (int u = 0; u < U; ++u) acc[r][u] = zero();
  int64_t k = walk<R>(row, next, K, [&](int64_t i) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int u = 0; u < LINE<T>; u += W) {
      Vec xv = load(x + i + u);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[r][u / W % U] = fma(load(row[r] + i + u), xv, acc[r][u / W % U]);
    }
  });
  for (; k < K; k += W) {
    int64_t left = std::min<int64_t>(W, K - k);
    Vec xv = load(x + k, left);
    for (int r = 0; r < R; ++r) acc[r][0] = fma(load(row[r] + k, left), xv, acc[r][0]);
  }
  for (int r = 0; r < R; ++r) {
    for (int u = 1; u < U; ++u) acc[r][0] = acc[r][0] + acc[r][u];
    out[r] = sum(acc[r][0]);
  }
}

template <int R, typename T>
inline int64_t dot_groups(const T* w, int64_t K, const int32_t* idx, int64_t first, int64_t j, int64_t m,
                          const float* x, float* out) {
  auto at = [&](int64_t i) { return w + (idx ? idx[i] : first + i) * K; };
  auto group = [&](const T* const* row, const T* const* next, int64_t i) {
    dot_group<R>(row, next, K, x, out + i);
  };
  return by_groups<R, T>(j, m, at, group);
}

template <typename T>
void dot_rows(const T* w, int64_t K, const int32_t* idx, int64_t first, int64_t m, const float* x, float* out) {
  int64_t j = dot_groups<4>(w, K, idx, first, 0, m, x, out);
  dot_groups<1>(w, K, idx, first, j, m, x, out);
}

template <typename T>
void dot_rows2(const T* wa, const T* wb, int64_t K, const int32_t* idx, int64_t m, const float* x, float* a, float* b) {
  const T *row[4], *next[4];
  float out[4];
  auto pair = [&](int64_t j, const T** p) {
    p[0] = wa + idx[j] * K;
    p[1] = wb + idx[j] * K;
  };
  int64_t j = 0;
  for (; j + 2 <= m; j += 2) {
    for (int r = 0; r < 2; ++r) {
      pair(j + r, row + 2 * r);
      pair(std::min(j + 2 + r, m - 1), next + 2 * r);
    }
    dot_group<4>(row, next, K, x, out);
    for (int r = 0; r < 2; ++r) {
      a[j + r] = out[2 * r];
      b[j + r] = out[2 * r + 1];
    }
  }
  if (j < m) {
    pair(j, row);
    dot_group<2>(row, row, K, x, out);
    a[j] = out[0];
    b[j] = out[1];
  }
}

inline Vec sigmoid_times(Vec x, Vec z) { return x / (set(1.0f) + exp(zero() - z)); }  // x * sigmoid(z)

template <Act A>
inline Vec activate(Vec x) {
  if constexpr (A == Act::silu) return sigmoid_times(x, x);
  if constexpr (A == Act::relu) return relu(x);
  if constexpr (A == Act::relu2) return relu(x) * relu(x);
  if constexpr (A == Act::gelu_tanh)  // 0.5 (1 + tanh z) = sigmoid(2 z), z = sqrt(2 / pi) (x + 0.044715 x^3)
    return sigmoid_times(x, set(1.5957691216f) * fma(x * x * x, set(0.044715f), x));
  if constexpr (A == Act::gelu) {
    float a[W];
    store(a, x);
    for (float& v : a) v = 0.5f * v * std::erfc(-0.70710678f * v);
    return load(a);
  }
}

template <Act A, typename T>
void glu_loop(const float* gate, const float* up, int64_t n, float* out) {
  const T* tag = nullptr;
  for (int64_t i = 0; i < n; i += W) {
    int64_t left = std::min<int64_t>(W, n - i);
    Vec h = rounded(activate<A>(load(gate + i, left)), tag);
    if (up) h = rounded(h * load(up + i, left), tag);
    store(out + i, h, left);
  }
}

template <typename T>
void glu(const float* gate, const float* up, int64_t n, Act act, float* out) {
  switch (act) {
    case Act::silu: return glu_loop<Act::silu, T>(gate, up, n, out);
    case Act::relu: return glu_loop<Act::relu, T>(gate, up, n, out);
    case Act::relu2: return glu_loop<Act::relu2, T>(gate, up, n, out);
    case Act::gelu_tanh: return glu_loop<Act::gelu_tanh, T>(gate, up, n, out);
    case Act::gelu: return glu_loop<Act::gelu, T>(gate, up, n, out);
  }
}

template <typename T>
void to_float(const T* x, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(out + i, load(x + i));
  if (i < n) store(out + i, load(x + i, n - i), n - i);
}

void from_float(const float* x, int64_t n, float* out) { std::memcpy(out, x, static_cast<size_t>(n) * 4); }
void from_float(const float* x, int64_t n, bf16* out) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(out + i, load(x + i));
  if (i < n) {
    bf16 tail[W];
    store(tail, load(x + i, n - i));
    std::memcpy(out + i, tail, static_cast<size_t>(n - i) * 2);
  }
}

template <typename T>
void round_values(float* x, int64_t n) {
  const T* tag = nullptr;
  for (int64_t i = 0; i < n; i += W) {
    int64_t left = std::min<int64_t>(W, n - i);
    store(x + i, rounded(load(x + i, left), tag), left);
  }
}

int64_t compact(const float* x, const float* t, int64_t t_stride, int64_t K, int32_t* idx, float* val) {
  int64_t m = 0, i = 0;
#if defined(DYNACT_AVX512)
  __m512i pos = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (; i < K; i += W) {
    __mmask16 in = K - i >= W ? 0xffff : first(K - i);
    __m512 v = _mm512_maskz_loadu_ps(in, x + i);
    __m512 lim = t_stride ? _mm512_maskz_loadu_ps(in, t + i) : _mm512_set1_ps(*t);
    __mmask16 keep = _mm512_mask_cmp_ps_mask(in, _mm512_abs_ps(v), lim, _CMP_NLE_UQ);
    // compress in registers and store whole vectors: the compressing store is microcoded on some machines
    _mm512_storeu_ps(val + m, _mm512_maskz_compress_ps(keep, v));
    _mm512_storeu_si512(idx + m, _mm512_maskz_compress_epi32(keep, pos));
    m += __builtin_popcount(keep);
    pos = _mm512_add_epi32(pos, _mm512_set1_epi32(W));
  }
#else
  for (; i < K; ++i) {  // no branch: the pattern is random
    idx[m] = static_cast<int32_t>(i);
    val[m] = x[i];
    m += !(std::fabs(x[i]) <= t[i * t_stride]);
  }
#endif
  return m;
}

int64_t compact_batch(const float* x, const float* t, int64_t t_stride, int64_t K, int64_t B, int32_t* idx,
                      float* val) {
  const int64_t ld = K + 16;
  int64_t m = 0, i = 0;
#if defined(DYNACT_AVX512)
  __m512i pos = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (; i < K; i += W) {
    __mmask16 in = K - i >= W ? 0xffff : first(K - i), keep[kMaxRows], any = 0;
    __m512 lim = t_stride ? _mm512_maskz_loadu_ps(in, t + i) : _mm512_set1_ps(*t);
    for (int64_t b = 0; b < B; ++b) {
      __m512 v = _mm512_abs_ps(_mm512_maskz_loadu_ps(in, x + b * K + i));
      any |= keep[b] = _mm512_mask_cmp_ps_mask(in, v, lim, _CMP_NLE_UQ);
    }
    for (int64_t b = 0; b < B; ++b) {
      __m512 v = _mm512_maskz_loadu_ps(keep[b], x + b * K + i);
      _mm512_storeu_ps(val + b * ld + m, _mm512_maskz_compress_ps(any, v));
    }
    _mm512_storeu_si512(idx + m, _mm512_maskz_compress_epi32(any, pos));
    m += __builtin_popcount(any);
    pos = _mm512_add_epi32(pos, _mm512_set1_epi32(W));
  }
#else
  for (; i < K; ++i) {
    bool any = false;
    for (int64_t b = 0; b < B; ++b) {
      float v = x[b * K + i];
      bool keep = !(std::fabs(v) <= t[i * t_stride]);
      val[b * ld + m] = keep ? v : 0.0f;
      any |= keep;
    }
    idx[m] = static_cast<int32_t>(i);
    m += any;
  }
#endif
  return m;
}

float exp_sum(float* logits, int64_t n, float peak) {
  Vec p = set(peak), acc = zero();
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    Vec e = exp(load(logits + i) - p);
    store(logits + i, e);
    acc = acc + e;
  }
  float total = sum(acc);
  if (i < n) {
    float tail[W];
    store(tail, exp(load(logits + i, n - i) - p));
    for (int64_t j = i; j < n; ++j) total += logits[j] = tail[j - i];
  }
  return total;
}

uint64_t read(const char* p, int64_t n) {
  const int64_t part = n / 4;  // four streams, as the kernels have
  Vec acc[4] = {zero(), zero(), zero(), zero()};
  for (int64_t i = 0; i < part; i += 64)
    for (int s = 0; s < 4; ++s) {
      const char* q = p + s * part + i;
      for (int u = 0; u < 16; u += W) acc[s] = acc[s] + load(reinterpret_cast<const float*>(q) + u);
    }
  float total = sum(acc[0] + acc[1] + acc[2] + acc[3]);
  uint32_t bits;
  std::memcpy(&bits, &total, 4);
  return bits;
}

template <typename T>
constexpr Kernels<T> kernels_for() {
  return {axpy_rows<T>, axpy_batch<T>,    dot_rows<T>, dot_rows2<T>,
          glu<T>,       round_values<T>, to_float<T>, from_float};
}

const Table* table(const char* name) {
  static const Table t = {name, kernels_for<float>(), kernels_for<bf16>(), compact, compact_batch, exp_sum, read,
                          kLowBit};
  return &t;
}

}  // namespace
}  // namespace dynact
