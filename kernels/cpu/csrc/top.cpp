// The operator that tells the k largest of one row.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "runtime.h"
#include "top.h"

namespace dynact {
namespace {

// The places of the k largest of score [n], ascending; of equal ones the first.
Tensor top_indices(const Tensor& score, int64_t k) {
  TORCH_CHECK_VALUE(score.dim() == 1 && score.is_contiguous() && score.is_cpu(), "top_indices takes one row on a CPU");
  int64_t n = score.numel();
  TORCH_CHECK_VALUE(0 < k && k <= n && n < INT_MAX, "top_indices: k must be in 1..", n, ", got ", k);
  static thread_local std::vector<int32_t> keys;
  keys.resize(n);
  if (score.scalar_type() == at::kFloat) {
    const float* x = score.const_data_ptr<float>();
    for (int64_t i = 0; i < n; ++i) keys[i] = order_key(x[i]);
  } else {
    TORCH_CHECK_VALUE(score.scalar_type() == at::kBFloat16, "top_indices takes float32 and bfloat16");
    const at::BFloat16* x = score.const_data_ptr<at::BFloat16>();
    for (int64_t i = 0; i < n; ++i) keys[i] = order_key(static_cast<float>(x[i]));
  }
  Tensor out = at::empty({k}, score.options().dtype(at::kInt));
  top_places(keys.data(), n, k, score.scalar_type() == at::kFloat, out.mutable_data_ptr<int32_t>());
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(dynact_cpu, m) { m.def("top_indices(Tensor score, int k) -> Tensor", top_indices); }

}  // namespace dynact
