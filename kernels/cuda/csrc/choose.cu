// Which neurons a copy in few bits chooses: those whose |up * act(gate)|, from the finished sums of the copy's codes, is
// not at most their threshold; listed in ascending order. A thread scores a neuron, a word of bits a warp; the block that
// arrives last makes the list of the words. Macros beside those of common.cuh:
//   WARPS of a block; BIAS  gate and up have biases
//   PDL   0, or 1: the next kernel may start when this one no longer waits
// Sums are fp32 [splits, pitch], up's from `up_at` on; scales and thresholds fp32 [n], made by no kernel before this one.
#define BITS 16
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(WARPS * 32) choose(
    const float* sums, const float* gate_scale, const float* up_scale, const u16* gate_bias, const u16* up_bias,
    const float* t_ptr, u32* words, int* arrived, int* idx, int* count, int n, int splits, int pitch, int up_at) {
  __shared__ int last, totals[WARPS];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, i = blockIdx.x * WARPS * 32 + threadIdx.x;
  float scale[2] = {0.f, 0.f}, bias[2] = {0.f, 0.f}, t = 0.f;
  if (i < n) {
    scale[0] = gate_scale[i];
    scale[1] = up_scale[i];
    t = t_ptr[i];
#if BIAS
    bias[0] = widen(gate_bias[i]);
    bias[1] = widen(up_bias[i]);
#endif
  }
  wait_for_others();
#if PDL
  let_others_start();
#endif
  bool keep = false;
  if (i < n) {
    float gate = 0.f, up = 0.f;
    for (int s = 0; s < splits; s++) {
      gate += sums[(size_t)s * pitch + i];
      up += sums[(size_t)s * pitch + up_at + i];
    }
    const float a = rounded(activate(rounded(gate * scale[0] + bias[0])));
    keep = !(rounded(fabsf(a * rounded(up * scale[1] + bias[1]))) <= t);  // NaN is kept
  }
  const u32 ballot = __ballot_sync(~0u, keep);
  if (lane == 0 && i < n) words[i / 32] = ballot;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(arrived, 1) == (int)gridDim.x - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();
  const int all = (n + 31) / 32;
  int before = 0;  // neurons listed so far
  for (int from = 0; from < all; from += WARPS * 32) {
    const int at = from + threadIdx.x;
    u32 word = 0;
    if (at < all) word = __ldcg(words + at);
    const int own = __popc(word);
    int place = own;  // of the warp, up to and with this lane
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int lower = __shfl_up_sync(~0u, place, d);
      if (lane >= d) place += lower;
    }
    if (lane == 31) totals[warp] = place;
    __syncthreads();
    place += before - own;
    for (int w = 0; w < WARPS; w++) {
      if (w < warp) place += totals[w];
      before += totals[w];
    }
    __syncthreads();
    for (int bit = 0; bit < 32; bit++)
      if (word >> bit & 1) idx[place++] = at * 32 + bit;
  }
  if (threadIdx.x == 0) {
    *count = before;
    *arrived = 0;
  }
}
