// Decode attention as an operator.
#include "attention.h"

#include <torch/library.h>

#include <algorithm>
#include <string_view>
#include <vector>

#include "checks.h"

namespace dynact {
namespace {

void check_shapes(const char* name, const Tensor& q, const Tensor& k, const Tensor& v, int64_t length) {
  TORCH_CHECK(q.dim() == 4 && q.size(2) == 1 && k.dim() == 4 && v.sizes() == k.sizes() && k.size(0) == q.size(0) &&
                  k.size(3) == q.size(3) && q.size(1) % k.size(1) == 0,
              name, " needs q [B, H, 1, D] and k, v [B, G, S, D] with G dividing H, got ", q.sizes(), ", ", k.sizes(),
              ", ", v.sizes());
  TORCH_CHECK(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(), name,
              ": q, k and v must have one type");
  TORCH_CHECK_INDEX(length >= 0 && length <= k.size(2), name, ": length ", length, " is outside the cache of ",
                    k.size(2));
}

// Whether the fast path takes q and a cache of rows that lie one after the other.
bool fast(const Tensor& q, const Tensor& k, const Tensor& v) {
  auto rows = [](const Tensor& c) { return c.stride(3) == 1 && c.stride(2) == c.size(3); };
  return (q.scalar_type() == at::kFloat || q.scalar_type() == at::kBFloat16) && rows(k) && rows(v);
}

Tensor decode_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& length, const OptTensor& keep,
                        std::string_view dropped, std::optional<double> scale) {
  int64_t L = length.item<int64_t>();
  check_shapes("decode_attention", q, k, v, L);
  TORCH_CHECK_VALUE(dropped == "exclude" || dropped == "zeros", "dropped must be exclude or zeros, got ", dropped);
  int64_t B = q.size(0), H = q.size(1), G = k.size(1), S = k.size(2), D = k.size(3);
  TORCH_CHECK(!keep || (keep->scalar_type() == at::kBool && keep->dim() == 3 && keep->size(0) == B &&
                        (keep->size(1) == G || keep->size(1) == H) &&
                        (keep->size(2) == S || keep->size(2) == 1)),
              "decode_attention: keep must be bool [B, G, S] or [B, H, S], or have 1 in the place of S");
  if (!fast(q, k, v)) {
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
        int64_t rows = kc.size(1), width = kc.size(2);
        const bool* p = kc.const_data_ptr<bool>() + (b * rows + (rows == H ? h : g)) * width;
        if (width < S) {  // one for all entries: nothing of a dropped head is read
          m = *p ? L : 0;
        } else {
          int32_t* list = room(s.idx, L + 1);
          m = 0;
          for (int64_t i = 0; i < L; ++i) {
            list[m] = static_cast<int32_t>(i);
            m += p[i];
          }
          idx = list;
        }
      }
      float *x = room(s.x, D), *y = room(s.y, D);
      ks.to_float(data<T>(qc) + (b * H + h) * D, D, x);
      attend_head(x, data<T>(k) + b * k.stride(0) + g * k.stride(1), data<T>(v) + b * v.stride(0) + g * v.stride(1), D,
                  idx, m, factor, zeros ? L - m : 0, y);
      ks.from_float(y, D, static_cast<T*>(out.mutable_data_ptr()) + (b * H + h) * D);
    };
    split(B * H, 2 * B * H * L * D * static_cast<int64_t>(sizeof(T)), [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) head(i / H, i % H);
    });
  });
  return out;
}

// Scores of all of K first; then only the V of blocks that any query head of the group needs.
Tensor skip_softmax(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& length, double log_scale,
                    int64_t block, std::optional<double> scale) {
  int64_t L = length.item<int64_t>();
  check_shapes("skip_softmax", q, k, v, L);
  TORCH_CHECK_VALUE(L > 0 && block > 0, "skip_softmax needs a length and a block of at least 1");
  if (!fast(q, k, v)) {
    static auto op = slow<decltype(skip_softmax)>("dynact::_torch_skip_softmax");
    return op.call(q, k, v, length, log_scale, block, scale);
  }
  int64_t B = q.size(0), H = q.size(1), G = k.size(1), D = k.size(3), R = H / G;
  Tensor qc = q.contiguous(), out = at::empty(q.sizes(), q.options());
  float factor = static_cast<float>(scale ? *scale : 1.0 / std::sqrt(static_cast<double>(D)));
  float limit = static_cast<float>(std::min(0.0, log_scale - std::log(static_cast<double>(L))));
  by_type(q, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const auto& ks = kernels<T>();
    auto group = [&](int64_t b, int64_t g) {
      auto& s = scratch();
      const T* keys = data<T>(k) + b * k.stride(0) + g * k.stride(1);
      const T* values = data<T>(v) + b * v.stride(0) + g * v.stride(1);
      float *x = room(s.x, D), *y = room(s.y, D), *logits = room(s.val, R * L);
      int32_t* idx = room(s.idx, L);
      for (int64_t r = 0; r < R; ++r) {
        ks.to_float(data<T>(qc) + (b * H + g * R + r) * D, D, x);
        for (int64_t i = 0; i < D; ++i) x[i] *= factor;
        ks.dot_rows(keys, D, nullptr, 0, L, x, logits + r * L);
      }
      std::vector<float> highest(static_cast<size_t>(R), -INFINITY);
      int64_t m = 0;
      for (int64_t first = 0; first < L; first += block) {
        int64_t last = std::min(first + block, L);
        bool needed = false;
        for (int64_t r = 0; r < R; ++r) {
          float peak = *std::max_element(logits + r * L + first, logits + r * L + last);
          float& most = highest[static_cast<size_t>(r)];
          most = std::max(most, peak);
          needed = needed || !(peak - most < limit);
        }
        for (int64_t i = first; needed && i < last; ++i, ++m) {
          idx[m] = static_cast<int32_t>(i);
          for (int64_t r = 0; r < R; ++r) logits[r * L + m] = logits[r * L + i];
        }
      }
      for (int64_t r = 0; r < R; ++r) {
        float total = table()->exp_sum(logits + r * L, m, highest[static_cast<size_t>(r)]);
        std::fill(y, y + D, 0.0f);
        ks.axpy_rows(values, D, idx, 0, logits + r * L, m, y);
        for (int64_t i = 0; i < D; ++i) y[i] /= total;
        ks.from_float(y, D, static_cast<T*>(out.mutable_data_ptr()) + (b * H + g * R + r) * D);
      }
    };
    split(B * G, 2 * B * G * L * D * static_cast<int64_t>(sizeof(T)), [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) group(i / G, i % G);
    });
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(dynact, CPU, m) {
  m.impl("decode_attention", decode_attention);
  m.impl("skip_softmax", skip_softmax);
}

}  // namespace dynact
