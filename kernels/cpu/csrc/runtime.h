// What the operators share: the instruction set in use, buffers, threads and the products over rows of a weight.
#pragma once
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "kernels.h"
#include "pool.h"

namespace dynact {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

const Table* supported(const std::string& name);  // nullptr where this machine cannot run it
const Table*& table();                            // the one in use

template <typename T>
const Kernels<T>& kernels();
template <>
inline const Kernels<float>& kernels() {
  return table()->f32;
}
template <>
inline const Kernels<bf16>& kernels() {
  return table()->b16;
}

// Calls f with a null pointer of the element type.
template <typename F>
auto by_type(const Tensor& x, F f) {
  return x.scalar_type() == at::kFloat ? f(static_cast<float*>(nullptr)) : f(static_cast<bf16*>(nullptr));
}

template <typename T>
const T* data(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

// Buffers that a thread keeps between calls: a fresh allocation costs as much as a small kernel.
struct Scratch {
  std::vector<float> x, gate, up, val, y, parts, moved, low;
  std::vector<int32_t> idx, keys;
};

inline Scratch& scratch() {
  thread_local Scratch s;
  return s;
}

inline float* room(std::vector<float>& v, int64_t n) {
  if (static_cast<int64_t>(v.size()) < n) v.resize(n);
  return v.data();
}

inline int32_t* room(std::vector<int32_t>& v, int64_t n) {
  if (static_cast<int64_t>(v.size()) < n) v.resize(n);
  return v.data();
}

// ---- threads -------------------------------------------------------------------------------------------------------
// As many parts as torch has threads, and one where a part would be shorter than waking a thread, or handing it to one
// that is awake. The parts are fixed by the sizes alone, so a result repeats bit for bit at a given number of threads.
inline int64_t parts_for(int64_t items, int64_t bytes) {
  const int64_t worth = Pool::mode() == Pool::kOutside ? 1 << 20 : 1 << 15;
  if (at::in_parallel_region()) return 1;
  return std::max<int64_t>(1, std::min<int64_t>({at::get_num_threads(), items, bytes / worth}));
}

// f(begin, end) over [0, items).
template <typename F>
void split(int64_t items, int64_t bytes, F f) {
  int64_t parts = parts_for(items, bytes);
  if (parts == 1) return f(0, items);
  Pool::get().run(parts, [&](int64_t p) { f(p * items / parts, (p + 1) * items / parts); });
}

// The channels that take part in a product: m of them, listed in idx (nullptr: 0 ... m - 1, of one row), and their values
// in each of B rows of x, ld apart.
struct Channels {
  const int32_t* idx;
  const float* val;
  int64_t m, B = 1, ld = 0;
};

// y[b] += sum_j val[b][j] * wt[row_j]: active rows are shared out, each part has a y of its own, summed in a fixed order.
template <typename T>
void add_rows(const T* wt, int64_t N, const Channels& c, float* y) {
  int64_t parts = parts_for(c.m, c.m * N * static_cast<int64_t>(sizeof(T)));
  const auto& k = kernels<T>();
  auto add = [&](int64_t from, int64_t to, float* sum) {
    if (c.B > 1) return k.axpy_batch(wt, N, c.idx + from, c.val + from, c.ld, to - from, c.B, sum);
    k.axpy_rows(wt, N, c.idx ? c.idx + from : nullptr, c.idx ? 0 : from, c.val + from, to - from, sum);
  };
  if (parts == 1) return add(0, c.m, y);
  int64_t size = c.B * N;
  float* own = room(scratch().parts, (parts - 1) * size);
  std::fill(own, own + (parts - 1) * size, 0.0f);
  Pool::get().run(parts, [&](int64_t p) {
    add(p * c.m / parts, (p + 1) * c.m / parts, p ? own + (p - 1) * size : y);
  });
  for (int64_t p = 1; p < parts; ++p)
    for (int64_t n = 0; n < size; ++n) y[n] += own[(p - 1) * size + n];
}

template <typename T>
void all_dots(const T* w, int64_t K, const int32_t* idx, int64_t m, const float* x, float* out) {
  split(m, m * K * static_cast<int64_t>(sizeof(T)), [&](int64_t a, int64_t b) {
    kernels<T>().dot_rows(w, K, idx ? idx + a : nullptr, idx ? 0 : a, b - a, x, out + a);
  });
}
// The channels of x [B, K] that one threshold (stride 0) or one for each (1) keeps in any row.
inline Channels select(const float* x, const float* t, int64_t t_stride, int64_t K, int64_t B) {
  auto& s = scratch();
  int64_t ld = K + 16;
  int32_t* idx = room(s.idx, ld);
  float* val = room(s.val, B * ld);
  int64_t m = B == 1 ? table()->compact(x, t, t_stride, K, idx, val)
                     : table()->compact_batch(x, t, t_stride, K, B, idx, val);
  return {idx, val, m, B, ld};
}

inline Channels select(const float* x, const Tensor& t, int64_t K, int64_t B = 1) {
  Tensor limits = t.contiguous();
  return select(x, data<float>(limits), limits.dim(), K, B);
}

inline Act parse_act(std::string_view act) {
  if (act == "silu") return Act::silu;
  if (act == "relu") return Act::relu;
  if (act == "relu2") return Act::relu2;
  if (act == "gelu_tanh") return Act::gelu_tanh;
  if (act == "gelu") return Act::gelu;
  TORCH_CHECK_VALUE(false, "act must be one of silu, relu, relu2, gelu_tanh, gelu; got ", act);
}

}  // namespace dynact
