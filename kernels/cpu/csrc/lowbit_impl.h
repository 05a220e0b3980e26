// Products with low-bit lines (layout: kernels.h), written once over vectors of W dwords. 16-bit integer dot products:
// two lines at a time are interleaved word by word, so that one instruction adds two channels to W outputs.
#pragma once
#include "simd.h"

namespace dynact {
namespace {

#if defined(DYNACT_AVX512)
using Words = __m512i;
inline Words load_words(const void* p) { return _mm512_loadu_si512(p); }
inline void store_words(void* p, Words a) { _mm512_storeu_si512(p, a); }
inline Words low_words(Words a, Words b) { return _mm512_unpacklo_epi16(a, b); }
inline Words high_words(Words a, Words b) { return _mm512_unpackhi_epi16(a, b); }
template <int N>
inline Words shift(Words a) { return _mm512_srli_epi16(a, N); }
inline Words mask(Words a, short m) { return _mm512_and_si512(a, _mm512_set1_epi16(m)); }
inline Words broadcast(int32_t a) { return _mm512_set1_epi32(a); }
inline Words dot(Words sum, Words a, Words b) {
#if defined(DYNACT_VNNI)
  return _mm512_dpwssd_epi32(sum, a, b);
#else
  return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
#endif
}
// dwords of (x * r / 2^15 rounded) of two lines, for W groups
inline Words paired(int16_t xa, const int16_t* ra, int16_t xb, const int16_t* rb) {
  __m256i a = _mm256_mulhrs_epi16(_mm256_set1_epi16(xa), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(ra)));
  __m256i b = _mm256_mulhrs_epi16(_mm256_set1_epi16(xb), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rb)));
  return _mm512_or_si512(_mm512_cvtepu16_epi32(a), _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16));
}
inline Vec floats(Words a) { return {_mm512_cvtepi32_ps(a)}; }
#elif defined(DYNACT_AVX2)
using Words = __m256i;
inline Words load_words(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store_words(void* p, Words a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a); }
inline Words low_words(Words a, Words b) { return _mm256_unpacklo_epi16(a, b); }
inline Words high_words(Words a, Words b) { return _mm256_unpackhi_epi16(a, b); }
template <int N>
inline Words shift(Words a) { return _mm256_srli_epi16(a, N); }
inline Words mask(Words a, short m) { return _mm256_and_si256(a, _mm256_set1_epi16(m)); }
inline Words broadcast(int32_t a) { return _mm256_set1_epi32(a); }
inline Words dot(Words sum, Words a, Words b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }
inline Words paired(int16_t xa, const int16_t* ra, int16_t xb, const int16_t* rb) {
  __m128i a = _mm_mulhrs_epi16(_mm_set1_epi16(xa), _mm_loadu_si128(reinterpret_cast<const __m128i*>(ra)));
  __m128i b = _mm_mulhrs_epi16(_mm_set1_epi16(xb), _mm_loadu_si128(reinterpret_cast<const __m128i*>(rb)));
  return _mm256_or_si256(_mm256_cvtepu16_epi32(a), _mm256_slli_epi32(_mm256_cvtepu16_epi32(b), 16));
}
inline Vec floats(Words a) { return {_mm256_cvtepi32_ps(a)}; }
#else
struct Words {
  int16_t v[2 * W];
};
inline Words load_words(const void* p) {
  Words r;
  std::memcpy(r.v, p, sizeof r.v);
  return r;
}
inline void store_words(void* p, Words a) { std::memcpy(p, a.v, sizeof a.v); }
inline Words interleaved(const int16_t* a, const int16_t* b) {
  Words r;
  for (int i = 0; i < W; ++i) r.v[2 * i] = a[i], r.v[2 * i + 1] = b[i];
  return r;
}
inline Words low_words(Words a, Words b) { return interleaved(a.v, b.v); }
inline Words high_words(Words a, Words b) { return interleaved(a.v + W, b.v + W); }
template <int N>
inline Words shift(Words a) {
  for (int16_t& v : a.v) v = static_cast<int16_t>(static_cast<uint16_t>(v) >> N);
  return a;
}
inline Words mask(Words a, short m) {
  for (int16_t& v : a.v) v &= m;
  return a;
}
inline Words broadcast(int32_t a) {
  Words r;
  for (int i = 0; i < W; ++i) std::memcpy(r.v + 2 * i, &a, 4);
  return r;
}
inline Words dot(Words sum, Words a, Words b) {
  for (int i = 0; i < W; ++i) {
    int32_t s;
    std::memcpy(&s, sum.v + 2 * i, 4);
    s += a.v[2 * i] * b.v[2 * i] + a.v[2 * i + 1] * b.v[2 * i + 1];
    std::memcpy(sum.v + 2 * i, &s, 4);
  }
  return sum;
}
inline Words paired(int16_t xa, const int16_t* ra, int16_t xb, const int16_t* rb) {
  Words r;
  for (int i = 0; i < W; ++i) {
    r.v[2 * i] = static_cast<int16_t>((xa * ra[i] + (1 << 14)) >> 15);
    r.v[2 * i + 1] = static_cast<int16_t>((xb * rb[i] + (1 << 14)) >> 15);
  }
  return r;
}
inline Vec floats(Words a) {
  int32_t v[W];
  std::memcpy(v, a.v, sizeof v);
  return each([&](int i) { return static_cast<float>(v[i]); });
}
#endif

constexpr int kParts = 16 / W;  // vectors in a chunk of 64 bytes

// The j-th weight of every word.
template <int BITS, int J>
inline Words field(Words a) {
  constexpr int last = 16 / BITS - 1;
  if constexpr (J == 0) return mask(a, (1 << BITS) - 1);
  if constexpr (J == last) return shift<BITS * J>(a);
  return mask(shift<BITS * J>(a), (1 << BITS) - 1);
}

template <int J, typename F>
inline void each_field(F f) {
  if constexpr (J > 0) {
    each_field<J - 1>(f);
    f(std::integral_constant<int, J - 1>());
  }
}

// How many groups of R lines ahead the next are asked for: narrow lines are soon done.
inline int64_t groups_ahead(int64_t R, int64_t stride) { return std::max<int64_t>(1, 4 * kLead / (R * stride)); }

// acc += P pairs of lines; multipliers: [P][groups], a dword for two lines.
template <int BITS, int P>
inline void add_pairs(const uint8_t* const* line, const uint8_t* const* next, int64_t stride, int64_t chunks,
                      const int32_t* multiplier, int64_t apart, int32_t* acc) {
  constexpr int FIELDS = 16 / BITS;
  const int64_t lead = std::min<int64_t>(kLead, stride);
  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t ahead = 64 * c + lead;
    for (int r = 0; r < 2 * P; ++r) prefetch(ahead < stride ? line[r] + ahead : next[r] + (ahead - stride));
#pragma GCC unroll 4
    for (int q = 0; q < kParts; ++q) {
      int32_t* to = acc + c * FIELDS * 32 + q * W;
      Words sum[2][FIELDS];
#pragma GCC unroll 4
      for (int j = 0; j < FIELDS; ++j)
        for (int h = 0; h < 2; ++h) sum[h][j] = load_words(to + 32 * j + 16 * h);
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        const Words a = load_words(line[2 * p] + 64 * c + 4 * W * q), b = load_words(line[2 * p + 1] + 64 * c + 4 * W * q);
        const Words low = low_words(a, b), high = high_words(a, b);
        each_field<FIELDS>([&](auto field_of) __attribute__((always_inline)) {
          constexpr int j = decltype(field_of)::value;
          const Words m = broadcast(multiplier[p * apart + c * FIELDS + j]);
          sum[0][j] = dot(sum[0][j], field<BITS, j>(low), m);
          sum[1][j] = dot(sum[1][j], field<BITS, j>(high), m);
        });
      }
#pragma GCC unroll 4
      for (int j = 0; j < FIELDS; ++j)
        for (int h = 0; h < 2; ++h) store_words(to + 32 * j + 16 * h, sum[h][j]);
    }
  }
}

// 16 scales of a line from group g on, or a copy where they are its last.
inline const int16_t* scales_at(const uint8_t* line, int64_t chunks, int64_t g, int64_t groups, int16_t* copy) {
  const int16_t* r = reinterpret_cast<const int16_t*>(line + 64 * chunks) + g;
  if (g + W <= groups) return r;
  std::fill(copy, copy + W, int16_t(0));
  std::memcpy(copy, r, static_cast<size_t>(groups - g) * 2);
  return copy;
}

template <int BITS>
void axpy_lines_of(const uint8_t* lines, int64_t stride, int64_t width, const float* peak, const int32_t* idx,
                   int64_t first, const int16_t* x, float unit, int64_t m, int32_t* work, float* y) {
  constexpr int PAIRS = 4, FIELDS = 16 / BITS, OFFSET = 1 << (BITS - 1);
  constexpr int64_t BLOCK = 256;  // lines whose int32 sums can't overflow: 256 * 255 * 32767 < 2^31
  const int64_t chunks = line_chunks(BITS, width), groups = chunks * FIELDS, apart = groups + 16;
  const int64_t ahead = 2 * PAIRS * groups_ahead(2 * PAIRS, stride);
  int32_t *acc = work, *sums = acc + groups * 32, *multiplier = sums + apart;
  const Words ones = broadcast(0x00010001);
  auto at = [&](int64_t j) { return lines + (idx ? idx[j] : first + j) * stride; };
  for (int64_t from = 0; from < m; from += BLOCK) {
    const int64_t to = std::min(m, from + BLOCK);
    std::memset(acc, 0, static_cast<size_t>(groups * 32 + apart) * 4);
    for (int64_t j = from; j < to; j += 2 * PAIRS) {
      const uint8_t *line[2 * PAIRS], *next[2 * PAIRS];
      int16_t own[2 * PAIRS];
      for (int r = 0; r < 2 * PAIRS; ++r) {
        line[r] = at(std::min(j + r, to - 1));
        next[r] = at(std::min(j + ahead + r, m - 1));
        own[r] = j + r < to ? x[j + r] : int16_t(0);
        for (int64_t b = 64 * chunks; b < stride; b += 64) prefetch(next[r] + b);
      }
      const int pairs = to - j > 4 ? 4 : to - j > 2 ? 2 : 1;
      for (int64_t g = 0; g < groups; g += W) {
        int16_t a[W], b[W];
        Words sum = load_words(sums + g);
        for (int p = 0; p < pairs; ++p) {
          const Words both = paired(own[2 * p], scales_at(line[2 * p], chunks, g, groups, a), own[2 * p + 1],
                                    scales_at(line[2 * p + 1], chunks, g, groups, b));
          store_words(multiplier + p * apart + g, both);
          sum = dot(sum, both, ones);
        }
        store_words(sums + g, sum);
      }
      if (pairs == 4)
        add_pairs<BITS, 4>(line, next, stride, chunks, multiplier, apart, acc);
      else if (pairs == 2)
        add_pairs<BITS, 2>(line, next, stride, chunks, multiplier, apart, acc);
      else
        add_pairs<BITS, 1>(line, next, stride, chunks, multiplier, apart, acc);
    }
    for (int64_t g = 0; g < groups; ++g) {
      const float scale = unit * peak[g];
      const int32_t less = OFFSET * sums[g];
      const int64_t n = std::min<int64_t>(32, width - 32 * g);
      for (int64_t i = 0; i < n; ++i) y[32 * g + i] += scale * static_cast<float>(acc[32 * g + i] - less);
    }
  }
}

void axpy_lines(const uint8_t* lines, int64_t stride, int64_t bits, int64_t width, const float* peak, const int32_t* idx,
                int64_t first, const int16_t* x, float unit, int64_t m, int32_t* work, float* y) {
  (bits == 4 ? axpy_lines_of<4> : axpy_lines_of<8>)(lines, stride, width, peak, idx, first, x, unit, m, work, y);
}

inline float largest(const float* x, int64_t n) {  // of |x|, as the bits compare: a NaN is larger than all
  uint32_t top = 0;
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, 4);
    top = std::max(top, bits & 0x7fffffff);
  }
  float f;
  std::memcpy(&f, &top, 4);
  return f;
}

inline int16_t nearest(float v) {  // to nearest even, for |v| <= 2^15
  v += 12582912.0f;
  int32_t bits;
  std::memcpy(&bits, &v, 4);
  return static_cast<int16_t>(bits);
}

float narrow(const float* val, int64_t n, int16_t* x) {
  const float unit = largest(val, n) / 32767.0f, by = unit > 0.0f ? 1.0f / unit : 0.0f;
  for (int64_t i = 0; i < n; ++i) x[i] = nearest(val[i] * by);
  return unit;
}

float spread(const float* x, int64_t width, int64_t bits, const float* peak, int16_t* own, int32_t* less) {
  const int64_t groups = line_groups(bits, width);
  const int32_t offset = 1 << (bits - 1);
  float top = 0.0f;
  for (int64_t g = 0; 32 * g < width; ++g) {
    const float most = largest(x + 32 * g, std::min<int64_t>(32, width - 32 * g)) * peak[g];
    if (!(most <= top)) top = most;  // a NaN stays
    if (top != top) break;
  }
  const float unit = top / 32767.0f, by = unit > 0.0f ? 1.0f / unit : 0.0f;
  for (int64_t g = 0; g < groups; ++g) {
    int16_t* to = own + 32 * g;
    for (int e = 0; e < 32; ++e) {
      const int h = e / 16, d = e % 16;
      const float v = 32 * g + e < width ? x[32 * g + e] * peak[g] * by : 0.0f;
      to[8 * (d / 4) + 4 * h + d % 4] = nearest(v);
    }
    for (int lane = 0; lane < W; ++lane) {
      int32_t sum = 0;
      for (int q = 0; q < kParts; ++q) sum += to[2 * (q * W + lane)] + to[2 * (q * W + lane) + 1];
      less[g * W + lane] = -offset * sum;
    }
  }
  return unit;
}

// R lines side by side.
template <int BITS, int R>
inline void dot_group_of(const uint8_t* const* line, const uint8_t* const* next, int64_t stride, int64_t groups,
                         const int16_t* own, const int32_t* less, float unit, float* out) {
  constexpr int FIELDS = 16 / BITS;
  const int64_t chunks = groups / FIELDS, lead = std::min<int64_t>(kLead, stride);
  Vec sum[R];
  for (int r = 0; r < R; ++r) {
    sum[r] = zero();
    for (int64_t b = 64 * chunks; b < stride; b += 64) prefetch(next[r] + b);
  }
  for (int64_t g = 0; g < groups; g += 16) {
    const int64_t some = std::min<int64_t>(16, groups - g);
    float scale[R][16];
    for (int r = 0; r < R; ++r) {
      const int16_t* s = reinterpret_cast<const int16_t*>(line[r] + 64 * chunks) + g;
      for (int64_t i = 0; i < some; ++i) scale[r][i] = s[i];
    }
    for (int64_t c = 0; c < some / FIELDS; ++c) {
      const int64_t at = 64 * (g / FIELDS + c), ahead = at + lead;
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        prefetch(ahead < stride ? line[r] + ahead : next[r] + (ahead - stride));
        Words part[FIELDS];
        for (int j = 0; j < FIELDS; ++j) part[j] = load_words(less + (g + c * FIELDS + j) * W);
#pragma GCC unroll 4
        for (int q = 0; q < kParts; ++q) {
          const Words v = load_words(line[r] + at + 4 * W * q);
          each_field<FIELDS>([&](auto field_of) __attribute__((always_inline)) {
            constexpr int j = decltype(field_of)::value;
            part[j] = dot(part[j], field<BITS, j>(v), load_words(own + (g + c * FIELDS + j) * 32 + 2 * W * q));
          });
        }
        for (int j = 0; j < FIELDS; ++j) sum[r] = fma(floats(part[j]), set(scale[r][c * FIELDS + j]), sum[r]);
      }
    }
  }
  for (int r = 0; r < R; ++r) out[r] = unit * (1.0f / 32768.0f) * dynact::sum(sum[r]);
}

template <int BITS>
void dot_lines_of(const uint8_t* lines, int64_t stride, int64_t groups, const int32_t* idx, int64_t first,
                  const int16_t* own, const int32_t* less, float unit, int64_t m, float* out) {
  auto at = [&](int64_t j) { return lines + (idx ? idx[j] : first + j) * stride; };
  const uint8_t *line[4], *next[4];
  const int64_t ahead = 4 * groups_ahead(4, stride);
  int64_t j = 0;
  for (; j + 4 <= m; j += 4) {
    for (int r = 0; r < 4; ++r) line[r] = at(j + r), next[r] = at(std::min(j + ahead + r, m - 1));
    dot_group_of<BITS, 4>(line, next, stride, groups, own, less, unit, out + j);
  }
  for (; j < m; ++j) {
    line[0] = at(j), next[0] = at(std::min(j + 1, m - 1));
    dot_group_of<BITS, 1>(line, next, stride, groups, own, less, unit, out + j);
  }
}

void dot_lines(const uint8_t* lines, int64_t stride, int64_t bits, int64_t groups, const int32_t* idx, int64_t first,
               const int16_t* own, const int32_t* less, float unit, int64_t m, float* out) {
  (bits == 4 ? dot_lines_of<4> : dot_lines_of<8>)(lines, stride, groups, idx, first, own, less, unit, m, out);
}

constexpr LowBit kLowBit = {narrow, axpy_lines, spread, dot_lines};

}  // namespace
}  // namespace dynact
