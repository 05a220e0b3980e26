// Dot products of one row x with lines, weights by output or neuron: y[row] = x . w[row], or with GLU act(x . gate[row])
// * (x . up[row]). A warp takes ROWS rows (neurons) at a time and reads UNROLL chunks of each before it uses any; a
// chunk is sixteen bytes a lane. Macros beside those of common.cuh:
//   LISTED   rows are idx[0..m); ROWS of a warp, WARPS of a block, BLOCKS resident, UNROLL
//   GROUP    weights that share a scale (BITS below 16)
//   FRESH    the kernel before this one makes the list: nothing is read before it is done
//   BY_POSITION  the result of idx[j] goes to y[j]; WIDE  y is fp32, else 16-bit; ADD  it is added to
//   BIAS     bias [rows] is added before anything is rounded, with GLU up_bias too; no kernel before this one made them
//   PDL      0, 1: the next kernel may start when this one no longer waits, 2: when its loads are made
// Low-bit lines: codes [rows, CHUNK bytes each], scales bf16 [rows, groups]. 16-bit weights are [rows, K].
#include "common.cuh"

#define CHUNK (32 * PER)  // weights
#define XS(chunk, i, lane) (((chunk) * (PER / 4) + (i)) * 32 + ((lane) ^ ((i) & 7)))
#define LINES (ROWS * (GLU + 1))
#if BITS == 4
#define SUMS 2  // low and high nibbles have sums of their own
#else
#define SUMS 1
#endif

extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS) rows(
    const element* x_ptr, const int* idx_ptr, const int* m_ptr, const Sixteen* w_ptr,
    const u16* scale_ptr, const Sixteen* up_ptr, const u16* up_scale_ptr, const u16* bias_ptr,
    const u16* up_bias_ptr, void* y_ptr, int m, int K, int pitch) {
#ifndef ON_HOST
  extern __shared__ __align__(16) float shared[];
#endif
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, chunks = (K + CHUNK - 1) / CHUNK;
  float4* xs = (float4*)shared;             // [chunks, PER / 4, 32 lanes]
  float* ones = shared + chunks * CHUNK;    // [chunks, SUMS, 32 lanes], sums of x
#if FRESH
  wait_for_others();
#endif
#if LISTED
  const int count = m_ptr ? __ldcg(m_ptr) : m;
#else
  const int count = m;
#endif
#if BITS < 16
  const int groups = (K + GROUP - 1) / GROUP;
#endif
  Sixteen data[LINES][UNROLL];
#if BITS < 16
  u16 scale[LINES][UNROLL];
#endif
  int row[ROWS];
#if BIAS
  u16 bias[GLU + 1] = {};  // of the row that this lane writes
#endif

  // Ask for UNROLL chunks, from `chunk` on, of this warp's rows.
  auto fetch = [&](int chunk) {
#pragma unroll
    for (int u = 0; u < UNROLL; u++)
#pragma unroll
      for (int l = 0; l < LINES; l++) {
        const int at = (chunk + u) * 32 + lane, r = row[l % ROWS];
        data[l][u] = Sixteen{0, 0, 0, 0};
        const bool live = r >= 0 && chunk + u < chunks && at < pitch;
        if (live) data[l][u] = read_once((l < ROWS ? w_ptr : up_ptr) + (size_t)r * pitch + at);
#if BITS < 16
        scale[l][u] = 0;
        if (live) scale[l][u] = (l < ROWS ? scale_ptr : up_scale_ptr)[(size_t)r * groups + at * PER / GROUP];
#endif
      }
  };
  auto choose = [&](int tile) {
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const int j = tile * ROWS + r;
      row[r] = j < count ? j : -1;
#if LISTED
      if (j < count) row[r] = __ldcg(idx_ptr + j);
#endif
#if BIAS
      if (lane == r && j < count) {
        bias[0] = bias_ptr[row[r]];
#if GLU
        bias[1] = up_bias_ptr[row[r]];
#endif
      }
#endif
    }
  };

  int tile = blockIdx.x * WARPS + warp;
  choose(tile);
  fetch(0);
#if !FRESH
  wait_for_others();
#endif
#if PDL == 1
  let_others_start();
#endif
  // Lane `owner` of a warp multiplies weights owner * PER .. of a chunk; XS leaves no two of eight neighbours in a bank.
  for (int quad = threadIdx.x; quad < chunks * CHUNK / 4; quad += WARPS * 32) {
    const int chunk = quad / (CHUNK / 4), owner = quad / (PER / 4) % 32, i = quad % (PER / 4);
    float v[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const int k = quad * 4 + j;
      v[j] = 0.f;
      if (k < K) v[j] = value(x_ptr, k);
    }
    xs[XS(chunk, i, owner)] = make_float4(v[0], v[1], v[2], v[3]);
  }
  __syncthreads();
#if BITS < 16
  for (int at = threadIdx.x; at < chunks * 32; at += WARPS * 32) {
    float even = 0.f, odd = 0.f;
#pragma unroll
    for (int i = 0; i < PER / 4; i++) {
      const float4 v = xs[XS(at / 32, i, at % 32)];
      even += v.x + v.z;
      odd += v.y + v.w;
    }
    ones[at / 32 * SUMS * 32 + at % 32] = SUMS == 1 ? even + odd : even;
    if (SUMS == 2) ones[(at / 32 * SUMS + 1) * 32 + at % 32] = odd;
  }
  __syncthreads();
#endif

  for (; tile * ROWS < count; tile += gridDim.x * WARPS) {
    float total[LINES];
#pragma unroll
    for (int l = 0; l < LINES; l++) total[l] = 0.f;
    if (tile != (int)(blockIdx.x * WARPS + warp)) {
      choose(tile);
      fetch(0);
    }
    for (int chunk = 0; chunk < chunks; chunk += UNROLL) {
      if (chunk) fetch(chunk);
#pragma unroll
      for (int u = 0; u < UNROLL; u++)
        if (chunk + u < chunks) {
          float sum[LINES][2];
#pragma unroll
          for (int l = 0; l < LINES; l++) sum[l][0] = sum[l][1] = 0.f;
#pragma unroll
          for (int i = 0; i < PER; i += 4) {
            const float4 x = xs[XS(chunk + u, i / 4, lane)];
#pragma unroll
            for (int l = 0; l < LINES; l++) {
              sum[l][0] += x.x * weight(data[l][u], i);
              sum[l][1] += x.y * weight(data[l][u], i + 1);
              sum[l][0] += x.z * weight(data[l][u], i + 2);
              sum[l][1] += x.w * weight(data[l][u], i + 3);
            }
          }
#pragma unroll
          for (int l = 0; l < LINES; l++) {
#if BITS == 16
            total[l] += sum[l][0] + sum[l][1];
#elif BITS == 8
            total[l] += widen_bf16(scale[l][u]) * decoded(sum[l][0] + sum[l][1], ones[(chunk + u) * 32 + lane], 0);
#else
            const float* own = ones + (chunk + u) * 64 + lane;
            total[l] += widen_bf16(scale[l][u]) * (decoded(sum[l][0], own[0], 0) + decoded(sum[l][1], own[32], 1));
#endif
          }
        }
    }
#if PDL == 2
    let_others_start();
#endif
#pragma unroll
    for (int l = 0; l < LINES; l++)
#pragma unroll
      for (int d = 16; d; d >>= 1) total[l] += __shfl_xor_sync(~0u, total[l], d);
#pragma unroll
    for (int r = 0; r < ROWS; r++)
      if (lane == r && row[r] >= 0) {
#if BIAS
        total[r] += widen(bias[0]);
#if GLU
        total[r + ROWS] += widen(bias[1]);
#endif
#endif
        const int place = BY_POSITION ? tile * ROWS + r : row[r];
#if GLU
        const float v = rounded(activate(rounded(total[r]))) * rounded(total[r + ROWS]);
#else
        const float v = total[r];
#endif
#if WIDE
        ((float*)y_ptr)[place] = v + (ADD ? ((float*)y_ptr)[place] : 0.f);
#else
        ((u16*)y_ptr)[place] = narrow(v);
#endif
      }
  }
}
