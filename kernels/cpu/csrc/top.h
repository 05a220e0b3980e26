// The k largest of one row. A threshold is found bit by bit, by counting what is not below it: loops without branches,
// which compilers vectorise, where a selection by swaps guesses every comparison.
#pragma once
#include <climits>
#include <cstdint>
#include <cstring>

namespace dynact {

// Integers in the order of the floats; NaN above all of them, -0 with 0.
inline int32_t order_key(float x) {
  if (x != x) return INT_MAX;
  x += 0.0f;
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits ^ ((bits >> 31) & INT_MAX);
}

// The places of the k largest of keys [n], ascending, 0 < k <= n; of equal ones the first. wide: keys of floats, else
// of values of bf16, whose lower half says nothing: keys are halved.
inline void top_places(int32_t* keys, int64_t n, int64_t k, bool wide, int32_t* to) {
  const auto at_least = [&](int32_t least) {
    int32_t count = 0;
    for (int64_t i = 0; i < n; ++i) count += keys[i] >= least;
    return count;
  };
  const int bits = wide ? 32 : 16;
  if (!wide)
    for (int64_t i = 0; i < n; ++i) keys[i] >>= 16;
  int32_t cut = at_least(0) >= k ? 0 : INT_MIN >> (32 - bits);
  int64_t count = n;
  for (int bit = bits - 2; bit >= 0 && count != k; --bit) {
    const int32_t higher = cut + (1 << bit);
    const int64_t found = at_least(higher);
    if (found >= k) cut = higher, count = found;
  }
  int64_t equal = 0, j = 0;  // how many at the cut still go in
  for (int64_t i = 0; i < n; ++i) equal += keys[i] > cut;
  equal = k - equal;
  for (int64_t i = 0; i < n && j < k; ++i) {
    const bool at_cut = keys[i] == cut;
    const bool in = keys[i] > cut || (at_cut && equal > 0);
    equal -= at_cut;
    to[j] = static_cast<int32_t>(i);
    j += in;
  }
}

}  // namespace dynact
