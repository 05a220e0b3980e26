// Low-bit lines and their products, threads included. The layout is that of kernels/lowbit.py.
#pragma once
#include "runtime.h"

namespace dynact {

// `lines` lines of `width` weights each, in int4 or int8 with a scale for 32 weights, `panels` times.
// codes: uint8 [panels, lines, stride]; peaks: fp32 [panels, groups].
struct Packed {
  Tensor codes, peaks;
  int64_t bits, width, panels, lines, stride, groups;

  Packed(const Tensor& codes_, const Tensor& peaks_, int64_t bits_, int64_t width_)
      : codes(codes_), peaks(peaks_), bits(bits_), width(width_) {
    TORCH_CHECK(bits == 4 || bits == 8, "weights have 4 or 8 bits, not ", bits);
    TORCH_CHECK(codes.dim() == 3 && codes.is_contiguous() && codes.scalar_type() == at::kByte, "codes are uint8 [P, L, S]");
    panels = codes.size(0), lines = codes.size(1), stride = codes.size(2), groups = line_groups(bits, width);
    TORCH_CHECK(width > 0 && stride >= line_bytes(bits, width), "a line of ", width, " weights is longer than ", stride);
    TORCH_CHECK(peaks.scalar_type() == at::kFloat && peaks.is_contiguous() && peaks.dim() == 2 &&
                    peaks.size(0) == panels && peaks.size(1) == groups,
                "peaks are fp32 [", panels, ", ", groups, "]");
  }

  const uint8_t* panel(int64_t p) const { return codes.const_data_ptr<uint8_t>() + p * lines * stride; }
  const float* peak(int64_t p) const { return data<float>(peaks) + p * groups; }
};

inline int16_t* room16(std::vector<int32_t>& v, int64_t n) { return reinterpret_cast<int16_t*>(room(v, (n + 1) / 2)); }

// y [panels * width] += sum_j val[j] * line[idx[j]], the values rounded to 16 bits of the largest.
inline void add_alike(const Packed& w, const Channels& c, float* y) {
  const LowBit& k = table()->low;
  static thread_local std::vector<int32_t> narrow;
  int16_t* x = room16(narrow, c.m + 16);
  const float unit = k.narrow(c.val, c.m, x);
  auto lines = [&](int64_t p, int64_t from, int64_t to, float* sum) {
    static thread_local std::vector<int32_t> sums;
    int32_t* acc = room(sums, lowbit_room(w.bits, w.width));
    k.axpy_lines(w.panel(p), w.stride, w.bits, w.width, w.peak(p), c.idx ? c.idx + from : nullptr, c.idx ? 0 : from,
                 x + from, unit, to - from, acc, sum);
  };
  const int64_t bytes = c.m * w.stride * w.panels;
  if (w.panels > 1)
    return split(w.panels, bytes, [&](int64_t a, int64_t b) {
      for (int64_t p = a; p < b; ++p) lines(p, 0, c.m, y + p * w.width);
    });
  // as in add_rows: each part has a y of its own, summed in a fixed order
  const int64_t parts = parts_for(c.m, bytes), N = w.width;
  if (parts == 1) return lines(0, 0, c.m, y);
  float* own = room(scratch().parts, (parts - 1) * N);
  std::fill(own, own + (parts - 1) * N, 0.0f);
  Pool::get().run(parts, [&](int64_t p) {
    lines(0, p * c.m / parts, (p + 1) * c.m / parts, p ? own + (p - 1) * N : y);
  });
  for (int64_t p = 1; p < parts; ++p)
    for (int64_t n = 0; n < N; ++n) y[n] += own[(p - 1) * N + n];
}

// As add_alike, but where a few values are far larger than the rest they are summed apart: their unit would leave a small
// value times a small scale next to no bits. `outliers` of kernels/lowbit.py is the same rule.
inline void add_lines(const Packed& w, const Channels& c, float* y) {
  float top = 0.0f;
  for (int64_t j = 0; j < c.m; ++j) top = std::max(top, std::abs(c.val[j]));
  const float bar = top / 16;
  int64_t far = 0;
  for (int64_t j = 0; j < c.m; ++j) far += std::abs(c.val[j]) > bar;
  if (far == 0 || 16 * far > c.m) return add_alike(w, c, y);
  static thread_local std::vector<int32_t> places;
  static thread_local std::vector<float> values;
  int32_t* at = room(places, c.m);
  float* val = room(values, c.m);
  int64_t outer = 0, inner = far;
  for (int64_t j = 0; j < c.m; ++j) {
    int64_t& to = std::abs(c.val[j]) > bar ? outer : inner;
    at[to] = c.idx ? c.idx[j] : static_cast<int32_t>(j);
    val[to++] = c.val[j];
  }
  Channels large = c, others = c;
  large.idx = at, large.val = val, large.m = far;
  others.idx = at + far, others.val = val + far, others.m = c.m - far;
  add_alike(w, large, y);
  add_alike(w, others, y);
}

// out[j] = line[idx[j]] . x (idx nullptr: line j), x [width] rounded to 16 bits of its largest weighted value.
inline void dot_lines(const Packed& w, const float* x, const int32_t* idx, int64_t m, float* out) {
  const LowBit& k = table()->low;
  static thread_local std::vector<int32_t> buffer;
  const int64_t n = w.groups * 32;
  int16_t* own = room16(buffer, n + 32 * w.groups);
  int32_t* less = reinterpret_cast<int32_t*>(own + n);
  const float unit = k.spread(x, w.width, w.bits, w.peak(0), own, less);
  split(m, m * w.stride, [&](int64_t a, int64_t b) {
    k.dot_lines(w.panel(0), w.stride, w.bits, w.groups, idx ? idx + a : nullptr, idx ? 0 : a, own, less, unit, b - a,
                out + a);
  });
}

}  // namespace dynact
