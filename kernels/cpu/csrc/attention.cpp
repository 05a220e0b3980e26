// Decode attention as an operator.
#include "attention.h"

#include <torch/library.h>

#include <string_view>

#include "checks.h"

namespace dynact {
namespace {

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
                        (keep->size(1) == G || keep->size(1) == H) &&
                        (keep->size(2) == S || keep->size(2) == 1)),
              "decode_attention: keep must be bool [B, G, S] or [B, H, S], or have 1 in the place of S");
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

}  // namespace

TORCH_LIBRARY_IMPL(dynact, CPU, m) { m.impl("decode_attention", decode_attention); }

}  // namespace dynact
