// Checks of arguments that several operators make.
#pragma once
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <initializer_list>

#include "runtime.h"

namespace dynact {

// ---- checks --------------------------------------------------------------------------------------------------------
inline void check_weight(const Tensor& x, const Tensor& w, int64_t dim, const char* name) {
  TORCH_CHECK(x.dim() >= 1 && w.dim() == 2, name, " needs x [..., K] and a 2-d weight, got ", x.sizes(), " and ",
              w.sizes());
  TORCH_CHECK(x.size(-1) == w.size(dim), name, ": x has ", x.size(-1), " channels, the weight has ", w.size(dim));
  TORCH_CHECK(x.scalar_type() == w.scalar_type(), name, ": x is ", x.scalar_type(), ", the weight is ",
              w.scalar_type());
}

inline void check_bias(const OptTensor& bias, int64_t n, const char* name) {
  TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == n), name, ": the bias must have ", n, " values");
}

inline void check_threshold(const Tensor& t, int64_t n, const char* name) {
  TORCH_CHECK(t.scalar_type() == at::kFloat && (t.dim() == 0 || (t.dim() == 1 && t.size(0) == n)), name,
              ": t must be fp32, 0-d or [", n, "]");
}

// The indices as checked, contiguous int32.
inline Tensor checked_index(const Tensor& idx, int64_t n, const char* name) {
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

inline int64_t rows_of(const Tensor& x) {
  int64_t k = x.size(-1);
  return x.numel() == k ? 1 : k ? x.numel() / k : 0;
}

// One row (up to `most`) of a type that the kernels know, against weights as they lie in memory.
inline bool fast(const Tensor& x, std::initializer_list<const Tensor*> weights, int64_t most = 1) {
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

}  // namespace dynact
