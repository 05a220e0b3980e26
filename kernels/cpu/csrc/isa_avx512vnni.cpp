#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels.h"
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define DYNACT_AVX512
#define DYNACT_VNNI
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma")
#endif
#include "kernels_impl.h"

const dynact::Table* dynact::vnni_table() { return table("avx512vnni"); }
#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
const dynact::Table* dynact::vnni_table() { return nullptr; }
#endif
