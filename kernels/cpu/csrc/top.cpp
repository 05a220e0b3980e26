// The k largest of one row. A threshold is found bit by bit, by counting what is not below it: loops without branches,
// which compilers vectorise, where a selection by swaps guesses every comparison.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <climits>

#include "runtime.h"

namespace dynact {
namespace {

// Integers in the order of the floats; NaN above all of them, -0 with 0.
inline int32_t key(float x) {
  if (x != x) return INT_MAX;
  x += 0.0f;
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits ^ ((bits >> 31) & INT_MAX);
}

int64_t at_least(const int32_t* keys, int64_t n, int32_t least) {
  int32_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += keys[i] >= least;
  return count;
}

// The places of the k largest of score [n], ascending; of equal ones the first.
Tensor top_indices(const Tensor& score, int64_t k) {
  TORCH_CHECK_VALUE(score.dim() == 1 && score.is_contiguous() && score.is_cpu(), "top_indices takes one row on a CPU");
  int64_t n = score.numel();
  TORCH_CHECK_VALUE(0 < k && k <= n && n < INT_MAX, "top_indices: k must be in 1..", n, ", got ", k);
  static thread_local std::vector<int32_t> keys;
  keys.resize(n);
  if (score.scalar_type() == at::kFloat) {
    const float* x = score.const_data_ptr<float>();
    for (int64_t i = 0; i < n; ++i) keys[i] = key(x[i]);
  } else {
    TORCH_CHECK_VALUE(score.scalar_type() == at::kBFloat16, "top_indices takes float32 and bfloat16");
    const at::BFloat16* x = score.const_data_ptr<at::BFloat16>();
    for (int64_t i = 0; i < n; ++i) keys[i] = key(static_cast<float>(x[i]));
  }
  int bits = 32;
  if (score.scalar_type() == at::kBFloat16) {  // the lower half says nothing
    bits = 16;
    for (int64_t i = 0; i < n; ++i) keys[i] >>= 16;
  }
  int32_t cut = at_least(keys.data(), n, 0) >= k ? 0 : INT_MIN >> (32 - bits);
  int64_t count = n;
  for (int bit = bits - 2; bit >= 0 && count != k; --bit) {
    int32_t higher = cut + (1 << bit);
    int64_t found = at_least(keys.data(), n, higher);
    if (found >= k) cut = higher, count = found;
  }
  Tensor out = at::empty({k}, score.options().dtype(at::kInt));
  int32_t* to = out.mutable_data_ptr<int32_t>();
  int64_t equal = 0, j = 0;  // how many at the cut still go in
  for (int64_t i = 0; i < n; ++i) equal += keys[i] > cut;
  equal = k - equal;
  for (int64_t i = 0; i < n && j < k; ++i) {
    bool at_cut = keys[i] == cut;
    bool in = keys[i] > cut || (at_cut && equal > 0);
    equal -= at_cut;
    to[j] = static_cast<int32_t>(i);
    j += in;
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(dynact_cpu, m) { m.def("top_indices(Tensor score, int k) -> Tensor", top_indices); }

}  // namespace dynact
