#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels.h"
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define DYNACT_AVX512
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma")
#endif
#include "kernels_impl.h"

const dynact::Table* dynact::avx512_table() { return table("avx512"); }
#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
const dynact::Table* dynact::avx512_table() { return nullptr; }
#endif
