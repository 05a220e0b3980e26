// The CPU side of the dynact operators: checks, threads and the choice of instruction set. The schemas are defined in
// kernels/ops.py, and so are the dynact::_torch_* operators that take every call off the fast path.
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

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
namespace {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

const Table* supported(const std::string& name) {
#if defined(__x86_64__) && defined(__GNUC__)
  if (name == "avx512" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma"))
    return avx512_table();
  if (name == "avx2" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2_table();
#endif
  return name == "generic" ? generic_table() : nullptr;
}

const Table* best() {
  for (const char* name : {"avx512", "avx2"})
    if (const Table* t = supported(name)) return t;
  return generic_table();
}

const Table*& table() {
  static const Table* t = best();
  return t;
}

template <typename T>
const Kernels<T>& kernels();
template <>
const Kernels<float>& kernels() {
  return table()->f32;
}
template <>
const Kernels<bf16>& kernels() {
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
  std::vector<float> x, gate, up, val, y, parts;
  std::vector<int32_t> idx;
};

Scratch& scratch() {
  thread_local Scratch s;
  return s;
}

float* room(std::vector<float>& v, int64_t n) {
  if (static_cast<int64_t>(v.size()) < n) v.resize(n);
  return v.data();
}

int32_t* room(std::vector<int32_t>& v, int64_t n) {
  if (static_cast<int64_t>(v.size()) < n) v.resize(n);
  return v.data();
}

// ---- threads -------------------------------------------------------------------------------------------------------
// As many parts as torch has threads, and one where a part would be shorter than waking a thread. The parts are fixed
// by the sizes alone, so a result repeats bit for bit at a given number of threads.
int64_t parts_for(int64_t items, int64_t bytes) {
  constexpr int64_t kBytesWorthAThread = 1 << 20;
  if (at::in_parallel_region()) return 1;
  return std::max<int64_t>(1, std::min<int64_t>({at::get_num_threads(), items, bytes / kBytesWorthAThread}));
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

// ---- checks --------------------------------------------------------------------------------------------------------
void check_weight(const Tensor& x, const Tensor& w, int64_t dim, const char* name) {
  TORCH_CHECK(x.dim() >= 1 && w.dim() == 2, name, " needs x [..., K] and a 2-d weight, got ", x.sizes(), " and ",
              w.sizes());
  TORCH_CHECK(x.size(-1) == w.size(dim), name, ": x has ", x.size(-1), " channels, the weight has ", w.size(dim));
  TORCH_CHECK(x.scalar_type() == w.scalar_type(), name, ": x is ", x.scalar_type(), ", the weight is ",
              w.scalar_type());
}

void check_bias(const OptTensor& bias, int64_t n, const char* name) {
  TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == n), name, ": the bias must have ", n, " values");
}

void check_threshold(const Tensor& t, int64_t n, const char* name) {
  TORCH_CHECK(t.scalar_type() == at::kFloat && (t.dim() == 0 || (t.dim() == 1 && t.size(0) == n)), name,
              ": t must be fp32, 0-d or [", n, "]");
}

// The indices as checked, contiguous int32.
Tensor checked_index(const Tensor& idx, int64_t n, const char* name) {
  TORCH_CHECK(idx.dim() == 1 && at::isIntegralType(idx.scalar_type(), false), name, ": idx must be a 1-d list of integers");
  Tensor i = idx.to(at::kInt).contiguous();
  const int32_t* p = i.const_data_ptr<int32_t>();
  int32_t low = 0, high = -1;
  for (int64_t j = 0; j < i.numel(); ++j) {
    low = std::min(low, p[j]);
    high = std::max(high, p[j]);
  }
  TORCH_CHECK_INDEX(low >= 0 && high < n, name, ": idx must lie in [0, ", n, ")");
  return i;
}

Act parse_act(std::string_view act) {
  if (act == "silu") return Act::silu;
  if (act == "relu") return Act::relu;
  if (act == "relu2") return Act::relu2;
  if (act == "gelu_tanh") return Act::gelu_tanh;
  if (act == "gelu") return Act::gelu;
  TORCH_CHECK_VALUE(false, "act must be one of silu, relu, relu2, gelu_tanh, gelu; got ", act);
}

int64_t rows_of(const Tensor& x) {
  int64_t k = x.size(-1);
  return x.numel() == k ? 1 : k ? x.numel() / k : 0;
}

// One row (up to `most`) of a type that the kernels know, against weights as they lie in memory.
bool fast(const Tensor& x, std::initializer_list<const Tensor*> weights, int64_t most = 1) {
  if (x.scalar_type() != at::kFloat && x.scalar_type() != at::kBFloat16) return false;
  if (rows_of(x) < 1 || rows_of(x) > most) return false;
  for (const Tensor* w : weights)
    if (!w->is_contiguous()) return false;
  return true;
}

template <typename Signature>
auto slow(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// ---- pieces --------------------------------------------------------------------------------------------------------
// x as floats: its own memory where it is contiguous fp32. `held` keeps a copy alive.
const float* floats(const Tensor& x, std::vector<float>& buffer, Tensor& held) {
  held = x.contiguous();
  if (held.scalar_type() == at::kFloat) return data<float>(held);
  float* out = room(buffer, held.numel());
  kernels<bf16>().to_float(data<bf16>(held), held.numel(), out);
  return out;
}

void add_bias(const OptTensor& bias, const int32_t* idx, int64_t m, float* y) {
  if (!bias) return;
  Tensor b = bias->to(at::kFloat).contiguous();
  const float* p = data<float>(b);
  for (int64_t j = 0; j < m; ++j) y[j] += p[idx ? idx[j] : j];
}

Tensor empty_like_rows(const Tensor& x, int64_t N) {
  auto shape = x.sizes().vec();
  shape.back() = N;
  return at::empty(shape, x.options());
}

// f(y) fills y, N zeroed floats for each row of x; they end up in a new tensor of x's type.
template <typename F>
Tensor make_rows(const Tensor& x, int64_t N, F f) {
  Tensor out = empty_like_rows(x, N);
  int64_t size = out.numel();
  bool direct = x.scalar_type() == at::kFloat;
  float* y = direct ? out.mutable_data_ptr<float>() : room(scratch().y, size);
  std::fill(y, y + size, 0.0f);
  f(y);
  if (!direct) kernels<bf16>().from_float(y, size, static_cast<bf16*>(out.mutable_data_ptr()));
  return out;
}

Tensor sum_rows(const Tensor& x, const Tensor& wt, const Channels& c, const OptTensor& bias) {
  int64_t N = wt.size(1);
  return make_rows(x, N, [&](float* y) {
    by_type(wt, [&](auto* tag) { add_rows(data<std::remove_pointer_t<decltype(tag)>>(wt), N, c, y); });
    for (int64_t b = 0; b < c.B; ++b) add_bias(bias, nullptr, N, y + b * N);
  });
}

// The channels of x [B, K] that one threshold (stride 0) or one for each (1) keeps in any row.
Channels select(const float* x, const float* t, int64_t t_stride, int64_t K, int64_t B) {
  auto& s = scratch();
  int64_t ld = K + 16;
  int32_t* idx = room(s.idx, ld);
  float* val = room(s.val, B * ld);
  int64_t m = B == 1 ? table()->compact(x, t, t_stride, K, idx, val)
                     : table()->compact_batch(x, t, t_stride, K, B, idx, val);
  return {idx, val, m, B, ld};
}

Channels select(const float* x, const Tensor& t, int64_t K, int64_t B = 1) {
  Tensor limits = t.contiguous();
  return select(x, data<float>(limits), limits.dim(), K, B);
}

// ---- operators -----------------------------------------------------------------------------------------------------
Tensor column_gemv(const Tensor& x, const Tensor& wt, const Tensor& t, const OptTensor& bias) {
  check_weight(x, wt, 0, "column_gemv");
  check_bias(bias, wt.size(1), "column_gemv");
  check_threshold(t, wt.size(0), "column_gemv");
  if (!fast(x, {&wt}, kMaxRows)) {
    static auto op = slow<decltype(column_gemv)>("dynact::_torch_column_gemv");
    return op.call(x, wt, t, bias);
  }
  Tensor held;
  return sum_rows(x, wt, select(floats(x, scratch().x, held), t, wt.size(0), rows_of(x)), bias);
}

Tensor column_gemv_index(const Tensor& x, const Tensor& wt, const Tensor& idx, const OptTensor& bias) {
  check_weight(x, wt, 0, "column_gemv_index");
  check_bias(bias, wt.size(1), "column_gemv_index");
  Tensor list = checked_index(idx, wt.size(0), "column_gemv_index");
  if (!fast(x, {&wt})) {
    static auto op = slow<decltype(column_gemv_index)>("dynact::_torch_column_gemv_index");
    return op.call(x, wt, list, bias);
  }
  auto& s = scratch();
  Tensor held;
  const float* xf = floats(x, s.x, held);
  const int32_t* rows = list.const_data_ptr<int32_t>();
  int64_t m = list.numel();
  float* val = room(s.val, m);
  for (int64_t j = 0; j < m; ++j) val[j] = xf[rows[j]];
  return sum_rows(x, wt, {rows, val, m}, bias);
}

Tensor column_gemv_glu(const Tensor& gate, const OptTensor& up, const Tensor& wt, const Tensor& t,
                       std::string_view act, const OptTensor& bias) {
  check_weight(gate, wt, 0, "column_gemv_glu");
  check_bias(bias, wt.size(1), "column_gemv_glu");
  check_threshold(t, wt.size(0), "column_gemv_glu");
  TORCH_CHECK(!up || (up->sizes() == gate.sizes() && up->scalar_type() == gate.scalar_type()),
              "column_gemv_glu: gate and up must have one shape and type");
  Act a = parse_act(act);
  if (!fast(gate, {&wt}, kMaxRows)) {
    static auto op = slow<decltype(column_gemv_glu)>("dynact::_torch_column_gemv_glu");
    return op.call(gate, up, wt, t, act, bias);
  }
  auto& s = scratch();
  int64_t K = wt.size(0);
  Tensor held_gate, held_up;
  const float* g = floats(gate, s.gate, held_gate);
  const float* u = up ? floats(*up, s.up, held_up) : nullptr;
  float* h = room(s.x, gate.numel());
  by_type(gate, [&](auto* tag) { kernels<std::remove_pointer_t<decltype(tag)>>().glu(g, u, gate.numel(), a, h); });
  return sum_rows(gate, wt, select(h, t, K, rows_of(gate)), bias);
}

Tensor dense_gemv(const Tensor& x, const Tensor& wt, const OptTensor& bias) {
  check_weight(x, wt, 0, "dense_gemv");
  check_bias(bias, wt.size(1), "dense_gemv");
  if (!fast(x, {&wt}, kMaxRows)) {
    static auto op = slow<decltype(dense_gemv)>("dynact::_torch_dense_gemv");
    return op.call(x, wt, bias);
  }
  Tensor held;
  const float* xf = floats(x, scratch().x, held);
  int64_t K = wt.size(0), B = rows_of(x);
  if (B == 1) return sum_rows(x, wt, {nullptr, xf, K}, bias);
  const float everything = -1.0f;
  return sum_rows(x, wt, select(xf, &everything, 0, K, B), bias);
}

Tensor dense_gemv_rows(const Tensor& x, const Tensor& w, const OptTensor& bias) {
  check_weight(x, w, 1, "dense_gemv_rows");
  check_bias(bias, w.size(0), "dense_gemv_rows");
  if (!fast(x, {&w})) {
    static auto op = slow<decltype(dense_gemv_rows)>("dynact::_torch_dense_gemv_rows");
    return op.call(x, w, bias);
  }
  Tensor held;
  const float* xf = floats(x, scratch().x, held);
  return make_rows(x, w.size(0), [&](float* y) {
    by_type(w, [&](auto* tag) {
      all_dots(data<std::remove_pointer_t<decltype(tag)>>(w), w.size(1), nullptr, w.size(0), xf, y);
    });
    add_bias(bias, nullptr, w.size(0), y);
  });
}

Tensor row_gemv_index(const Tensor& x, const Tensor& w, const Tensor& idx, const OptTensor& bias) {
  check_weight(x, w, 1, "row_gemv_index");
  check_bias(bias, w.size(0), "row_gemv_index");
  Tensor list = checked_index(idx, w.size(0), "row_gemv_index");
  if (!fast(x, {&w})) {
    static auto op = slow<decltype(row_gemv_index)>("dynact::_torch_row_gemv_index");
    return op.call(x, w, list, bias);
  }
  auto& s = scratch();
  Tensor held;
  const float* xf = floats(x, s.x, held);
  const int32_t* rows = list.const_data_ptr<int32_t>();
  int64_t m = list.numel();
  float* val = room(s.val, m);
  return make_rows(x, w.size(0), [&](float* y) {
    by_type(w, [&](auto* tag) {
      all_dots(data<std::remove_pointer_t<decltype(tag)>>(w), w.size(1), rows, m, xf, val);
    });
    add_bias(bias, rows, m, val);
    for (int64_t j = 0; j < m; ++j) y[rows[j]] = val[j];
  });
}

Tensor neuron_mlp(const Tensor& x, const OptTensor& w_gate, const Tensor& w_up, const Tensor& wt_down,
                  const Tensor& idx, std::string_view act, const OptTensor& b_gate, const OptTensor& b_up,
                  const OptTensor& b_down) {
  check_weight(x, w_up, 1, "neuron_mlp");
  TORCH_CHECK(!w_gate || w_gate->sizes() == w_up.sizes(), "neuron_mlp: w_gate and w_up must have one shape");
  TORCH_CHECK(wt_down.dim() == 2 && wt_down.size(0) == w_up.size(0), "neuron_mlp: wt_down must be [F, N]");
  TORCH_CHECK(wt_down.scalar_type() == x.scalar_type() && (!w_gate || w_gate->scalar_type() == x.scalar_type()),
              "neuron_mlp: x and the weights must have one type");
  int64_t F = w_up.size(0), K = w_up.size(1);
  check_bias(b_gate, F, "neuron_mlp");
  check_bias(b_up, F, "neuron_mlp");
  check_bias(b_down, wt_down.size(1), "neuron_mlp");
  Tensor list = checked_index(idx, F, "neuron_mlp");
  Act a = parse_act(act);
  if (!fast(x, {&w_up, &wt_down}) || (w_gate && !w_gate->is_contiguous())) {
    static auto op = slow<decltype(neuron_mlp)>("dynact::_torch_neuron_mlp");
    return op.call(x, w_gate, w_up, wt_down, list, act, b_gate, b_up, b_down);
  }
  auto& s = scratch();
  Tensor held;
  const float* xf = floats(x, s.x, held);
  const int32_t* rows = list.const_data_ptr<int32_t>();
  int64_t m = list.numel();
  float *up = room(s.up, m), *gate = room(s.gate, m);
  by_type(x, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const auto& k = kernels<T>();
    if (w_gate) {
      split(m, 2 * m * K * static_cast<int64_t>(sizeof(T)), [&](int64_t from, int64_t to) {
        k.dot_rows2(data<T>(*w_gate), data<T>(w_up), K, rows + from, to - from, xf, gate + from, up + from);
      });
      add_bias(b_gate, rows, m, gate);
      k.round(gate, m);
    } else {
      all_dots(data<T>(w_up), K, rows, m, xf, up);
    }
    add_bias(b_up, rows, m, up);
    k.round(up, m);
    k.glu(w_gate ? gate : up, w_gate ? up : nullptr, m, a, gate);
  });
  // a hidden value of exactly zero (ReLU) needs no column of down
  int32_t* kept = room(s.idx, m);
  float* val = room(s.val, m);
  int64_t n = 0;
  for (int64_t j = 0; j < m; ++j) {
    kept[n] = rows[j];
    val[n] = gate[j];
    n += !(gate[j] == 0.0f);
  }
  return sum_rows(x, wt_down, {kept, val, n}, b_down);
}

Tensor cats_mlp(const Tensor& x, const Tensor& w_gate, const Tensor& w_up, const Tensor& wt_down, const Tensor& t,
                std::string_view act) {
  check_weight(x, w_gate, 1, "cats_mlp");
  TORCH_CHECK(w_gate.sizes() == w_up.sizes(), "cats_mlp: w_gate and w_up must have one shape");
  TORCH_CHECK(wt_down.dim() == 2 && wt_down.size(0) == w_up.size(0), "cats_mlp: wt_down must be [F, N]");
  TORCH_CHECK(wt_down.scalar_type() == x.scalar_type() && w_up.scalar_type() == x.scalar_type(),
              "cats_mlp: x and the weights must have one type");
  int64_t F = w_up.size(0), K = w_up.size(1);
  check_threshold(t, F, "cats_mlp");
  Act a = parse_act(act);
  if (!fast(x, {&w_gate, &w_up, &wt_down})) {
    static auto op = slow<decltype(cats_mlp)>("dynact::_torch_cats_mlp");
    return op.call(x, w_gate, w_up, wt_down, t, act);
  }
  auto& s = scratch();
  Tensor held;
  const float* xf = floats(x, s.x, held);
  float *gate = room(s.gate, F), *up = room(s.up, F);
  Channels kept{};
  by_type(x, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const auto& k = kernels<T>();
    all_dots(data<T>(w_gate), K, nullptr, F, xf, gate);
    k.round(gate, F);
    k.glu(gate, nullptr, F, a, gate);
    kept = select(gate, t, F);
    all_dots(data<T>(w_up), K, kept.idx, kept.m, xf, up);
    k.round(up, kept.m);
    for (int64_t j = 0; j < kept.m; ++j) up[j] *= kept.val[j];
    k.round(up, kept.m);
  });
  kept.val = up;
  return sum_rows(x, wt_down, kept, std::nullopt);
}

Tensor decode_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& length, const OptTensor& keep,
                        std::string_view dropped, std::optional<double> scale) {
  TORCH_CHECK(q.dim() == 4 && q.size(2) == 1 && k.dim() == 4 && v.sizes() == k.sizes() && k.size(0) == q.size(0) &&
                  k.size(3) == q.size(3) && q.size(1) % k.size(1) == 0,
              "decode_attention needs q [B, H, 1, D] and k, v [B, G, S, D] with G dividing H, got ", q.sizes(), ", ",
              k.sizes(), ", ", v.sizes());
  TORCH_CHECK(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(),
              "decode_attention: q, k and v must have one type");
  TORCH_CHECK_VALUE(dropped == "exclude" || dropped == "zeros", "dropped must be exclude or zeros, got ", dropped);
  int64_t B = q.size(0), H = q.size(1), G = k.size(1), S = k.size(2), D = k.size(3);
  int64_t L = length.item<int64_t>();
  TORCH_CHECK_INDEX(L >= 0 && L <= S, "decode_attention: length ", L, " is outside the cache of ", S);
  TORCH_CHECK(!keep || (keep->scalar_type() == at::kBool && keep->dim() == 3 && keep->size(0) == B &&
                        (keep->size(1) == G || keep->size(1) == H) && keep->size(2) == S),
              "decode_attention: keep must be bool [B, G, S] or [B, H, S]");
  auto rows = [](const Tensor& c) { return c.stride(3) == 1 && c.stride(2) == c.size(3); };
  if ((q.scalar_type() != at::kFloat && q.scalar_type() != at::kBFloat16) || !rows(k) || !rows(v)) {
    static auto op = slow<decltype(decode_attention)>("dynact::_torch_decode_attention");
    return op.call(q, k, v, length, keep, dropped, scale);
  }
  Tensor qc = q.contiguous(), kc = keep ? keep->contiguous() : Tensor();
  Tensor out = at::empty(q.sizes(), q.options());
  float factor = static_cast<float>(scale ? *scale : 1.0 / std::sqrt(static_cast<double>(D)));
  bool zeros = dropped == "zeros";
  by_type(q, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const auto& ks = kernels<T>();
    auto head = [&](int64_t b, int64_t h) {
      auto& s = scratch();
      int64_t g = h / (H / G), m = L;
      const int32_t* idx = nullptr;
      if (keep) {
        int64_t rows = kc.size(1);
        const bool* p = kc.const_data_ptr<bool>() + (b * rows + (rows == H ? h : g)) * S;
        int32_t* list = room(s.idx, L + 1);
        m = 0;
        for (int64_t i = 0; i < L; ++i) {
          list[m] = static_cast<int32_t>(i);
          m += p[i];
        }
        idx = list;
      }
      float *x = room(s.x, D), *logits = room(s.val, m), *y = room(s.y, D);
      ks.to_float(data<T>(qc) + (b * H + h) * D, D, x);
      for (int64_t i = 0; i < D; ++i) x[i] *= factor;
      ks.dot_rows(data<T>(k) + b * k.stride(0) + g * k.stride(1), D, idx, 0, m, x, logits);
      bool phantom = zeros && m < L;  // dropped entries whose logit is 0
      float peak = phantom ? 0.0f : -INFINITY;
      for (int64_t i = 0; i < m; ++i) peak = std::max(peak, logits[i]);
      float total = table()->exp_sum(logits, m, peak);
      if (phantom) total += static_cast<float>(L - m) * std::exp(-peak);
      std::fill(y, y + D, 0.0f);
      ks.axpy_rows(data<T>(v) + b * v.stride(0) + g * v.stride(1), D, idx, 0, logits, m, y);
      if (m)
        for (int64_t i = 0; i < D; ++i) y[i] /= total;
      ks.from_float(y, D, static_cast<T*>(out.mutable_data_ptr()) + (b * H + h) * D);
    };
    split(B * H, 2 * B * H * L * D * static_cast<int64_t>(sizeof(T)), [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) head(i / H, i % H);
    });
  });
  return out;
}

int64_t stream(const Tensor& buffer) {
  constexpr int64_t kPage = 4096;
  const char* p = static_cast<const char*>(buffer.const_data_ptr());
  int64_t pages = static_cast<int64_t>(buffer.nbytes()) / kPage;
  std::vector<uint64_t> sums(std::max(1, at::get_num_threads()));
  int64_t parts = static_cast<int64_t>(sums.size());
  Pool::get().run(parts, [&](int64_t i) {
    int64_t a = i * pages / parts, b = (i + 1) * pages / parts;
    sums[i] = table()->read(p + a * kPage, (b - a) * kPage);
  });
  uint64_t total = 0;
  for (uint64_t s : sums) total ^= s;
  return static_cast<int64_t>(total);
}

// The instruction set in use; a name switches to that one (for tests and comparisons).
std::string isa(std::string_view name) {
  if (!name.empty()) {
    const Table* t = supported(std::string(name));
    TORCH_CHECK_VALUE(t, "this machine cannot run ", name);
    table() = t;
  }
  return table()->name;
}

}  // namespace

TORCH_LIBRARY_IMPL(dynact, CPU, m) {
  m.impl("column_gemv", column_gemv);
  m.impl("column_gemv_index", column_gemv_index);
  m.impl("column_gemv_glu", column_gemv_glu);
  m.impl("dense_gemv", dense_gemv);
  m.impl("dense_gemv_rows", dense_gemv_rows);
  m.impl("row_gemv_index", row_gemv_index);
  m.impl("neuron_mlp", neuron_mlp);
  m.impl("cats_mlp", cats_mlp);
  m.impl("decode_attention", decode_attention);
}

TORCH_LIBRARY(dynact_cpu, m) {
  m.def("stream(Tensor buffer) -> int", stream);
  m.def("isa(str name) -> str", isa);
}

}  // namespace dynact
