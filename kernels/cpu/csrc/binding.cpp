// The dynact operators on the CPU: checks, and what runs on which rows. The schemas are defined in kernels/ops.py, and so
// are the dynact::_torch_* operators that take every call off the fast path.
#include <torch/library.h>

#include <string_view>

#include "checks.h"
#include "lowbit.h"
#include "runtime.h"

namespace dynact {
namespace {

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

// ---- low-bit lines, for one row of x -------------------------------------------------------------------------------
void check_packed(const Tensor& x, int64_t inputs, const char* name) {
  TORCH_CHECK(fast(x, {}) && x.size(-1) == inputs, name, " needs one row of ", inputs, " fp32 or bf16 channels, got ",
              x.sizes(), " ", x.scalar_type());
}

Tensor packed_columns(const Tensor& x, const Tensor& codes, const Tensor& peaks, int64_t bits, int64_t width,
                      const OptTensor& t, const OptTensor& idx) {
  Packed w(codes, peaks, bits, width);
  check_packed(x, w.lines, "packed_columns");
  auto& s = scratch();
  Tensor held, list;
  const float* xf = floats(x, s.x, held);
  Channels c{nullptr, xf, w.lines};
  if (idx) {
    list = checked_index(*idx, w.lines, "packed_columns");
    c = {list.const_data_ptr<int32_t>(), room(s.val, list.numel()), list.numel()};
    for (int64_t j = 0; j < c.m; ++j) s.val[j] = xf[c.idx[j]];
  } else if (t) {
    check_threshold(*t, w.lines, "packed_columns");
    c = select(xf, *t, w.lines);
  }
  return make_rows(x, w.panels * width, [&](float* y) { add_lines(w, c, y); });
}

Tensor packed_rows(const Tensor& x, const Tensor& codes, const Tensor& peaks, int64_t bits, int64_t width,
                   const OptTensor& idx) {
  Packed w(codes, peaks, bits, width);
  check_packed(x, width, "packed_rows");
  TORCH_CHECK(w.panels == 1, "packed_rows takes one panel");
  auto& s = scratch();
  Tensor held, list;
  const float* xf = floats(x, s.x, held);
  return make_rows(x, w.lines, [&](float* y) {
    if (!idx) return dot_lines(w, xf, nullptr, w.lines, y);
    list = checked_index(*idx, w.lines, "packed_rows");
    const int32_t* rows = list.const_data_ptr<int32_t>();
    float* some = room(s.val, list.numel());
    dot_lines(w, xf, rows, list.numel(), some);
    for (int64_t j = 0; j < list.numel(); ++j) y[rows[j]] = some[j];
  });
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
}

TORCH_LIBRARY_FRAGMENT(dynact_cpu, m) {
  m.def(
      "packed_columns(Tensor x, Tensor codes, Tensor peaks, int bits, int width, Tensor? t=None, Tensor? idx=None) -> "
      "Tensor",
      packed_columns);
  m.def("packed_rows(Tensor x, Tensor codes, Tensor peaks, int bits, int width, Tensor? idx=None) -> Tensor",
        packed_rows);
}

}  // namespace dynact
