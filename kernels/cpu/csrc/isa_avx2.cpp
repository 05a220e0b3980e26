#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels.h"
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define DYNACT_AVX2
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#include "kernels_impl.h"

const dynact::Table* dynact::avx2_table() { return table("avx2"); }
#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
const dynact::Table* dynact::avx2_table() { return nullptr; }
#endif
