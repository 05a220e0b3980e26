// One projection of the fused step.
#pragma once
#include "lowbit.h"
#include "runtime.h"
#include "top.h"

namespace dynact {

// A projection: weights as they lie in memory, and what the selection of its input channels is at the moment.
struct Matrix {
  Tensor weight, bias, limit, index;  // bias fp32; limit fp32, 0-d or [K]; index int32
  bool columns = false;               // W^T [K, N]; else W [N, K]
  std::optional<Packed> packed;       // low-bit lines instead of `weight`: channels where columns, else outputs
  int64_t inputs = 0, outputs = 0;
  int64_t top = 0;      // this many channels, by |x| or by |x| * worth, fp32 [K]; 0: not counted
  Tensor worth;
  float centre = 0.0f;  // taken off every input before the selection sees it
  Tensor into, out;     // [r, K] and [r, N]: x into^T out, of all of x, joins the output

  // y [outputs] = x W^T + bias over the channels that the selection keeps.
  template <typename T>
  void apply(const float* x, float* y) const {
    if (centre != 0.0f) x = moved<T>(x);
    if (columns) {
      std::fill(y, y + outputs, 0.0f);
      Channels c = channels<T>(x);
      if (packed)
        add_lines(*packed, c, y);
      else
        add_rows(data<T>(weight), outputs, c, y);
    } else {
      rows<T>(x, nullptr, outputs, y);
    }
    if (bias.defined()) add(nullptr, outputs, y);
    if (into.defined()) add_low_rank<T>(x, y);
  }

  // y[j] = output rows[j] of x W^T + bias, for a weight that lies by rows.
  template <typename T>
  void some(const float* x, const int32_t* list, int64_t m, float* y) const {
    rows<T>(x, list, m, y);
    if (bias.defined()) add(list, m, y);
  }

 private:
  template <typename T>
  Channels largest(const float* x) const {
    const float* by = worth.defined() ? data<float>(worth) : nullptr;
    int32_t* keys = room(scratch().keys, inputs);
    for (int64_t i = 0; i < inputs; ++i) keys[i] = order_key(by ? std::abs(x[i]) * by[i] : std::abs(x[i]));
    int32_t* list = room(scratch().idx, inputs);
    top_places(keys, inputs, top, by || std::is_same_v<T, float>, list);
    float* val = room(scratch().val, top);
    for (int64_t j = 0; j < top; ++j) val[j] = x[list[j]];
    return {list, val, top};
  }

  template <typename T>
  Channels channels(const float* x) const {
    if (top) return largest<T>(x);
    if (index.defined()) {
      const int32_t* list = index.const_data_ptr<int32_t>();
      const int64_t m = index.numel();
      float* val = room(scratch().val, m);
      for (int64_t j = 0; j < m; ++j) val[j] = x[list[j]];
      return {list, val, m};
    }
    if (limit.defined()) return select(x, data<float>(limit), limit.dim(), inputs, 1);
    return {nullptr, x, inputs};
  }

  template <typename T>
  void rows(const float* x, const int32_t* list, int64_t m, float* y) const {
    if (packed)
      dot_lines(*packed, x, list, m, y);
    else
      all_dots(data<T>(weight), inputs, list, m, x, y);
  }

  template <typename T>
  const float* moved(const float* x) const {
    float* own = room(scratch().moved, inputs);
    for (int64_t i = 0; i < inputs; ++i) own[i] = x[i] - centre;
    kernels<T>().round(own, inputs);
    return own;
  }

  // Both products and what they join are values that the module would have stored.
  template <typename T>
  void add_low_rank(const float* x, float* y) const {
    const int64_t r = into.size(0);
    float* part = room(scratch().low, r + outputs);
    float* sum = part + r;
    all_dots(data<T>(into), inputs, nullptr, r, x, part);
    kernels<T>().round(part, r);
    std::fill(sum, sum + outputs, 0.0f);
    add_rows(data<T>(out), outputs, {nullptr, part, r}, sum);
    kernels<T>().round(sum, outputs);
    kernels<T>().round(y, outputs);
    for (int64_t j = 0; j < outputs; ++j) y[j] += sum[j];
  }

  void add(const int32_t* list, int64_t m, float* y) const {
    const float* p = data<float>(bias);
    for (int64_t j = 0; j < m; ++j) y[j] += p[list ? list[j] : j];
  }
};

}  // namespace dynact
