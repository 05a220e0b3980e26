// One head of decode attention.
#pragma once
#include "runtime.h"

namespace dynact {

// y [D] = softmax(factor * q k^T) v over the m entries in idx (nullptr: the first m) of k and v [S, D]. q is scaled in
// place. `phantom` dropped entries, whose key and value count as 0, take their share of the softmax.
template <typename T>
void attend_head(float* q, const T* k, const T* v, int64_t D, const int32_t* idx, int64_t m, float factor,
                 int64_t phantom, float* y) {
  const auto& ks = kernels<T>();
  float* logits = room(scratch().val, m);
  for (int64_t i = 0; i < D; ++i) q[i] *= factor;
  ks.dot_rows(k, D, idx, 0, m, q, logits);
  float peak = phantom ? 0.0f : -INFINITY;
  for (int64_t i = 0; i < m; ++i) peak = std::max(peak, logits[i]);
  float total = table()->exp_sum(logits, m, peak);
  if (phantom) total += static_cast<float>(phantom) * std::exp(-peak);
  std::fill(y, y + D, 0.0f);
  ks.axpy_rows(v, D, idx, 0, logits, m, y);
  if (m)
    for (int64_t i = 0; i < D; ++i) y[i] /= total;
}

}  // namespace dynact
