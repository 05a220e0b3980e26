// A decoder step's attention in one launch, batch 1: rotary embedding of the new token's q and k, the write into the
// cache, attention over a stretch of the cache by each block; the block of a head that comes last adds the stretches up
// in a fixed order. The first tile of the cache is asked for before this kernel waits for q, k and v.
// Macros beside those of common.cuh (X32: what q, k and v are): D of a head, SPLITS, WARPS, R query heads a KV head.
#define BITS 16
#include "common.cuh"

#define SPAN (D / 8)          // lanes of a token
#define AT_ONCE (32 / SPAN)   // tokens of one load
#define LOADS 8
#define TILE (WARPS * AT_ONCE * LOADS)

// Rotary embedding of the eight entries of a head from d on.
__device__ __forceinline__ void rotate(const element* p, int d, const float* cosine, const float* sine, float* out) {
  const int other = d < D / 2 ? d + D / 2 : d - D / 2;
  const float sign = d < D / 2 ? -1.f : 1.f;
#pragma unroll
  for (int j = 0; j < 8; j++)
    out[j] = rounded(rounded(value(p, d + j) * cosine[j]) + rounded(sign * value(p, other + j) * sine[j]));
}

// parts: fp32 [heads, SPLITS, D + 2], a stretch's sum of values, its largest score (base 2) and its mass.
extern "C" __global__ void __launch_bounds__(WARPS * 32) attend(
    const element* q_ptr, const element* k_ptr, const element* v_ptr, const u16* cos_ptr, const u16* sin_ptr,
    u16* k_cache, u16* v_cache, const long long* length_ptr, float* parts, int* arrived, u16* out, int k_head,
    int k_token, int v_head, int v_token, float scale) {
  __shared__ float sums[WARPS][D];
  __shared__ float tops[WARPS], masses[WARPS];
  const int head = blockIdx.x, split = blockIdx.y, kv = head / R;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, part = lane % SPAN, token = lane / SPAN;
  const int length = (int)*length_ptr, stretch = (length + SPLITS - 1) / SPLITS;
  const int first = split * stretch, last = min(first + stretch, length);
  const u16* keys = k_cache + (size_t)kv * k_head;
  const u16* values = v_cache + (size_t)kv * v_head;
  Sixteen k[LOADS], v[LOADS];
  auto fetch = [&](int from) {
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
      const int at = from + (warp * LOADS + i) * AT_ONCE + token;
      k[i] = v[i] = Sixteen{0, 0, 0, 0};
      if (at < last) {
        k[i] = read_once((const Sixteen*)(keys + (size_t)at * k_token) + part);
        v[i] = read_once((const Sixteen*)(values + (size_t)at * v_token) + part);
      }
    }
  };
  fetch(first);
  const bool newest = split == SPLITS - 1 && warp == 0;  // takes the new token, by the lanes of token 0
  float cosine[8], sine[8];
#pragma unroll
  for (int j = 0; j < 8; j++) cosine[j] = widen(cos_ptr[part * 8 + j]), sine[j] = widen(sin_ptr[part * 8 + j]);
  wait_for_others();
#if PDL
  let_others_start();
#endif
  const float base = scale * 1.4426950408889634f;
  float q[8], new_k[8], new_v[8], acc[8], top = -INF, mass = 0.f;
  rotate(q_ptr + head * D, part * 8, cosine, sine, q);
  if (newest) {
    rotate(k_ptr + kv * D, part * 8, cosine, sine, new_k);
#pragma unroll
    for (int j = 0; j < 8; j++) new_v[j] = value(v_ptr + kv * D, part * 8 + j);
  }
#pragma unroll
  for (int j = 0; j < 8; j++) q[j] *= base, acc[j] = 0.f;
  for (int from = first; from < last; from += TILE) {
    if (from != first) fetch(from);
    float score[LOADS], best = top;
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
      float s = 0.f;
#pragma unroll
      for (int j = 0; j < 8; j++) s += q[j] * weight(k[i], j);
#pragma unroll
      for (int d = SPAN / 2; d; d >>= 1) s += __shfl_xor_sync(~0u, s, d);
      score[i] = from + (warp * LOADS + i) * AT_ONCE + token < last ? s : -INF;
      best = fmaxf(best, score[i]);
    }
    if (best > -INF) {
      const float old = exp2f(top - best);
      mass *= old;
#pragma unroll
      for (int j = 0; j < 8; j++) acc[j] *= old;
#pragma unroll
      for (int i = 0; i < LOADS; i++) {
        const float p = exp2f(score[i] - best);
        mass += p;
#pragma unroll
        for (int j = 0; j < 8; j++) acc[j] += p * weight(v[i], j);
      }
      top = best;
    }
  }
  if (newest) {
    float s = 0.f;
#pragma unroll
    for (int j = 0; j < 8; j++) {
      s += q[j] * new_k[j];
      if (head % R == 0 && token == 0) {
        k_cache[(size_t)kv * k_head + (size_t)length * k_token + part * 8 + j] = narrow(new_k[j]);
        v_cache[(size_t)kv * v_head + (size_t)length * v_token + part * 8 + j] = narrow(new_v[j]);
      }
    }
#pragma unroll
    for (int d = SPAN / 2; d; d >>= 1) s += __shfl_xor_sync(~0u, s, d);
    if (token == 0) {
      const float best = fmaxf(top, s), old = exp2f(top - best), p = exp2f(s - best);
      mass = mass * old + p;
#pragma unroll
      for (int j = 0; j < 8; j++) acc[j] = acc[j] * old + p * new_v[j];
      top = best;
    }
  }
  // One sum a warp: lanes with the same part of a head.
#pragma unroll
  for (int d = SPAN; d < 32; d <<= 1) {
    const float theirs = __shfl_xor_sync(~0u, top, d), best = fmaxf(top, theirs);
    const float share = best > -INF ? exp2f(top - best) : 0.f;
    mass = mass * share;
    mass += __shfl_xor_sync(~0u, mass, d);
#pragma unroll
    for (int j = 0; j < 8; j++) {
      acc[j] *= share;
      acc[j] += __shfl_xor_sync(~0u, acc[j], d);
    }
    top = best;
  }
  if (token == 0) {
#pragma unroll
    for (int j = 0; j < 8; j++) sums[warp][part * 8 + j] = acc[j];
  }
  if (lane == 0) tops[warp] = top, masses[warp] = mass;
  __syncthreads();
  float best = -INF;
#pragma unroll
  for (int i = 0; i < WARPS; i++) best = fmaxf(best, tops[i]);
#if SPLITS == 1
  float whole = 0.f;
#pragma unroll
  for (int i = 0; i < WARPS; i++)
    if (tops[i] > -INF) whole += exp2f(tops[i] - best) * masses[i];
  for (int d = threadIdx.x; d < D; d += WARPS * 32) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < WARPS; i++)
      if (tops[i] > -INF) sum += exp2f(tops[i] - best) * sums[i][d];
    out[head * D + d] = narrow(sum / whole);
  }
#else
  __shared__ int last_one;
  float* own = parts + ((size_t)head * SPLITS + split) * (D + 2);
  for (int d = threadIdx.x; d < D + 2; d += WARPS * 32) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < WARPS; i++)
      if (tops[i] > -INF) sum += exp2f(tops[i] - best) * (d < D ? sums[i][d] : masses[i]);
    own[d] = d == D + 1 ? best : sum;
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last_one = atomicAdd(arrived + head, 1) == SPLITS - 1;
  __syncthreads();
  if (!last_one) return;
  __threadfence();
  const float* all = parts + (size_t)head * SPLITS * (D + 2);
  for (int d = threadIdx.x; d < D; d += WARPS * 32) {
    float highest = -INF, sum = 0.f, total = 0.f;
#pragma unroll
    for (int s = 0; s < SPLITS; s++) highest = fmaxf(highest, __ldcg(all + s * (D + 2) + D + 1));
#pragma unroll
    for (int s = 0; s < SPLITS; s++) {
      const float theirs = __ldcg(all + s * (D + 2) + D + 1);
      const float share = theirs > -INF ? exp2f(theirs - highest) : 0.f;
      sum += share * __ldcg(all + s * (D + 2) + d);
      total += share * __ldcg(all + s * (D + 2) + D);
    }
    out[head * D + d] = narrow(sum / total);
  }
  if (threadIdx.x == 0) arrived[head] = 0;
#endif
}
