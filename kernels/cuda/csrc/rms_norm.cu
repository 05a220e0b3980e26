// The RMS norm of the residual stream, rounded before the weight as Llama's is: one block. Macros: those of common.cuh
// (X32), WARPS.
#define BITS 16
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(WARPS * 32) rms_norm(
    const float* h_ptr, const u16* weight_ptr, u16* y_ptr, int n, float eps) {
  __shared__ float squares[WARPS];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  wait_for_others();
#if PDL
  let_others_start();
#endif
  float square = 0.f;
  for (int i = threadIdx.x; i < n; i += WARPS * 32) square += h_ptr[i] * h_ptr[i];
#pragma unroll
  for (int d = 16; d; d >>= 1) square += __shfl_xor_sync(~0u, square, d);
  if (lane == 0) squares[warp] = square;
  __syncthreads();
  square = 0.f;
#pragma unroll
  for (int i = 0; i < WARPS; i++) square += squares[i];
  const float inverse = rsqrtf(square / n + eps);
  for (int i = threadIdx.x; i < n; i += WARPS * 32)
    y_ptr[i] = narrow(rounded(h_ptr[i] * inverse) * widen(weight_ptr[i]));
}
