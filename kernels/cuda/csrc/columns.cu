// y[n] += sum over kept channels i of x_i w[i, n], for one row x: a warp packs the channels that it keeps, then reads
// their weights, all of them before it uses any. Macros beside those of common.cuh:
//   TEST     KEEP_ALL 0, NOT_ZERO 1, SCALAR 2, PER_CHANNEL 3 of column.py; 4: the channels are listed
//   LANES    lanes that read one channel, sixteen bytes each; CHANNELS of a warp, WARPS of a block, BLOCKS resident
//   UNROLL   loads in flight a lane
//   GROUP    weights that share a scale (BITS below 16)
//   BY_POSITION: the value of idx[j] is x[j]; ALONG: neighbouring blocks share outputs, not channels
//   PDL      0, 1: the next kernel may start when this one no longer waits, 2: when all its loads are made
//   PARTIALS y: fp32 [splits, N], written; BIAS  the first split adds bias [N], which no kernel before this one made
// In int4 the products run on tensor cores: 16 outputs x 16 channels at a time. Where lanes agree in lane % 4 they hold the
// same channels, where in lane / 4 the same outputs. Codes become the upper mantissas of float16s, a pair of channels a
// word, without a conversion (see `mantissa`: 1 + code / 16 and 1 + code / 256); the factors x_i * scale go in as a sum of
// two float16s, one in column 0 and one, times 2048, in column 1. Sums are float32.
// Low-bit weights lie in strips of OUTPUTS outputs: codes [strip, channel, LANES * 16 bytes], scales bf16 [strip,
// channel, GROUPS]. 16-bit weights are W^T [K, N].
#include "common.cuh"

#define TENSOR (BITS == 4)
#if TENSOR
static_assert(LANES == 8 && UNROLL % 4 == 0, "int4 strips are 128 bytes wide");
#endif
#define SUB (32 / LANES)  // channels that a warp reads at a time
#define OUTPUTS (LANES * PER)
#define PLACE(o) ((o) + (o) / PER * 4)
#define PADDED (LANES * (PER + 4))
#if BITS < 16
#define GROUPS (OUTPUTS / GROUP)
#else
#define GROUPS 1
#endif
#if TENSOR
#define FACTOR u32  // two float16s
#else
#define FACTOR float
#endif
#define KNOWN (TEST == 0 || TEST == 4)
#define ROUNDS (CHANNELS / 32)
#define BIASES ((OUTPUTS + WARPS * 32 - 1) / (WARPS * 32))  // outputs of a thread

// Add up what lanes with the same outputs hold; each ends with its share of the outputs, from `start` on.
template <int DISTANCE, int WIDTH>
__device__ __forceinline__ int fold(float* sums, int lane) {
  if constexpr (DISTANCE < LANES) {
    return 0;
  } else {
    constexpr int half = WIDTH / 2;
    const bool upper = lane & DISTANCE;
#pragma unroll
    for (int i = 0; i < half; i++) {
      const float given = upper ? sums[i] : sums[i + half];
      sums[i] = (upper ? sums[i + half] : sums[i]) + __shfl_xor_sync(~0u, given, DISTANCE);
    }
    return (upper ? half : 0) + fold<DISTANCE / 2, half>(sums, lane);
  }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS) columns(
    const element* x_ptr, const element* up_ptr, const float* t_ptr, const int* idx_ptr,
    const int* m_ptr, const Sixteen* w_ptr, const u16* scale_ptr, const u16* bias_ptr, float* y, float* zero,
    int n_zero, int N, int K, int m, int seg1, int seg2) {
  __shared__ int channels[WARPS][CHANNELS];
  __shared__ FACTOR factors[WARPS][CHANNELS * GROUPS];
  __shared__ __align__(16) float sums[WARPS][PADDED];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, column = TENSOR ? lane / SUB : lane % LANES,
            sub = TENSOR ? lane % SUB : lane / LANES;
  const int strip = ALONG ? blockIdx.y : blockIdx.x, split = ALONG ? blockIdx.x : blockIdx.y;
  const int n0 = strip * OUTPUTS, first = (split * WARPS + warp) * CHANNELS;
#if TEST == 2 || TEST == 3
  const int segment = (n0 >= seg1) + (n0 >= seg2);
#endif
#if BITS < 16
  const size_t pitch = LANES;
  const Sixteen* w = w_ptr + (size_t)strip * K * LANES + column;
  const u16* scales = scale_ptr + (size_t)strip * K * GROUPS;
  const bool live = true;
  u16 scale[ROUNDS][GROUPS];
#else
  const size_t pitch = N / 8;
  const Sixteen* w = w_ptr + n0 / 8 + column;
  const bool live = n0 + column * 8 < N;
#endif
  Sixteen data[UNROLL];
  int n = 0, own[ROUNDS] = {}, at[ROUNDS];
  float x[ROUNDS];

  auto fetch = [&](int from) {
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      const int i = from + u * SUB + sub;
      data[u] = Sixteen{0, 0, 0, 0};
      if (i < n && live) data[u] = read_once(w + (size_t)channels[warp][i] * pitch);
    }
  };
  // Lane's channel of round r takes place at[r] in the warp's list, or none: at[r] < 0.
  auto list = [&](int r, bool keep) {
    const u32 ballot = __ballot_sync(~0u, keep);
    at[r] = keep ? n + __popc(ballot & ((1u << lane) - 1)) : -1;
    n += __popc(ballot);
    if (keep) {
      channels[warp][at[r]] = own[r];
#if BITS < 16
#pragma unroll
      for (int g = 0; g < GROUPS; g++) scale[r][g] = scales[(size_t)own[r] * GROUPS + g];
#endif
    }
  };

#if KNOWN
#if TEST == 4
  const int count = m_ptr ? __ldcg(m_ptr) : m;  // past L1, which may hold what was listed before
#else
  const int count = K;
#endif
#pragma unroll
  for (int r = 0; r < ROUNDS; r++) {
    const int j = first + r * 32 + lane;
    own[r] = j;
#if TEST == 4
    if (j < count) own[r] = __ldcg(idx_ptr + j);
#endif
    list(r, j < count);
  }
  __syncwarp();
  fetch(0);
#endif

  // What earlier kernels did not make is asked for before the wait.
#if TEST == 2 || TEST == 3
  float limit[ROUNDS];
#pragma unroll
  for (int r = 0; r < ROUNDS; r++) {
    const int k = first + r * 32 + lane;
#if TEST == 2
    limit[r] = t_ptr[segment];
#else
    limit[r] = k < K ? t_ptr[(size_t)segment * K + k] : 0.f;
#endif
  }
#endif
#if BIAS
  u16 bias[BIASES];
#pragma unroll
  for (int i = 0; i < BIASES; i++) {
    const int o = i * WARPS * 32 + threadIdx.x;
    bias[i] = 0;
    if (split == 0 && o < OUTPUTS && n0 + o < N) bias[i] = bias_ptr[n0 + o];
  }
#endif

  wait_for_others();
#if PDL == 1
  let_others_start();
#endif
#pragma unroll
  for (int r = 0; r < ROUNDS; r++) {
    const int k = KNOWN ? own[r] : first + r * 32 + lane, from = BY_POSITION ? first + r * 32 + lane : k;
    x[r] = 0.f;
    if (KNOWN ? at[r] >= 0 : k < K) {
      x[r] = value(x_ptr, from);
#if ACT
      x[r] = rounded(activate(x[r]));
#if HAS_UP
      x[r] = rounded(x[r] * value(up_ptr, from));
#endif
#endif
    }
  }
#if !KNOWN
#pragma unroll
  for (int r = 0; r < ROUNDS; r++) {
    own[r] = first + r * 32 + lane;
    // NaN is kept, and so is a zero under a negative threshold: at 0 % everything is read.
#if TEST == 1
    list(r, own[r] < K && !(x[r] == 0.f));
#else
    list(r, own[r] < K && !(fabsf(x[r]) <= limit[r]));
#endif
  }
  __syncwarp();
  fetch(0);
#endif
  const int thread = (blockIdx.y * gridDim.x + blockIdx.x) * (WARPS * 32) + threadIdx.x;
  for (int z = thread; z < n_zero; z += gridDim.x * gridDim.y * WARPS * 32) zero[z] = 0.f;
#if TENSOR
  float ones[GROUPS];
#pragma unroll
  for (int g = 0; g < GROUPS; g++) ones[g] = 0.f;
#endif
#pragma unroll
  for (int r = 0; r < ROUNDS; r++)
    if (at[r] >= 0) {
#pragma unroll
      for (int g = 0; g < GROUPS; g++) {
#if TENSOR
        const float c = x[r] * widen_bf16(scale[r][g]);
        const u32 high = halves(c, 0.f);
        ones[g] += c;
        factors[warp][at[r] * GROUPS + g] = high | halves((c - widen_f16((u16)high)) * 2048.f, 0.f) << 16;
#elif BITS < 16
        factors[warp][at[r] * GROUPS + g] = x[r] * widen_bf16(scale[r][g]);
#else
        factors[warp][at[r]] = x[r];
#endif
      }
    }
  __syncwarp();

#if TENSOR
  float acc[16][4];
#pragma unroll
  for (int i = 0; i < 16; i++)
#pragma unroll
    for (int j = 0; j < 4; j++) acc[i][j] = 0.f;
#pragma unroll
  for (int g = 0; g < GROUPS; g++)
#pragma unroll
    for (int d = 16; d; d >>= 1) ones[g] += __shfl_xor_sync(~0u, ones[g], d);
  for (int from = 0; from < n; from += UNROLL * SUB) {
    if (from) fetch(from);
#pragma unroll
    for (int u = 0; u < UNROLL; u += 4)
      if (from + u * SUB < n) {  // the same for the whole warp
        u32 factor[GROUPS][2];
#pragma unroll
        for (int g = 0; g < GROUPS; g++) {
          u32 c[4] = {0, 0, 0, 0};
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const int at = from + (u + i) * SUB + sub;
            if (column < 2 && at < n) c[i] = factors[warp][at * GROUPS + g];
          }
          factor[g][0] = __byte_perm(c[0], c[1], column == 1 ? 0x7632 : 0x5410);
          factor[g][1] = __byte_perm(c[2], c[3], column == 1 ? 0x7632 : 0x5410);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
          // Outputs 0 to 7 of the lane's word i: two by two rows r and r + 8 of a product.
          u32 codes[2][4];
#pragma unroll
          for (int h = 0; h < 2; h++) {
            const u32 a = data[u + 2 * h].word[i], b = data[u + 2 * h + 1].word[i];
            codes[h][0] = __byte_perm(a, b, 0x5410);
            codes[h][1] = __byte_perm(a, b, 0x4501);
            codes[h][2] = __byte_perm(a, b, 0x7632);
            codes[h][3] = __byte_perm(a, b, 0x6723);
          }
#pragma unroll
          for (int p = 0; p < 4; p++) {
            const u32 w[4] = {(codes[0][p] & 0x003c003cu) | 0x3c003c00u, (codes[0][p] & 0x03c003c0u) | 0x3c003c00u,
                              (codes[1][p] & 0x003c003cu) | 0x3c003c00u, (codes[1][p] & 0x03c003c0u) | 0x3c003c00u};
            multiply(acc[4 * i + p], w, factor[(64 * i + 16 * p) / GROUP]);
          }
        }
      }
  }
#if PDL == 2
  let_others_start();
#endif
  if (sub == 0)
#pragma unroll
    for (int i = 0; i < 16; i++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const float sum = acc[i][2 * h] + acc[i][2 * h + 1] * (1.f / 2048.f);
        sums[warp][PLACE(16 * i + 8 * h + column)] = decoded(sum, ones[16 * i / GROUP], h);
      }
#else
  float acc[PER], ones = 0.f;
#pragma unroll
  for (int i = 0; i < PER; i++) acc[i] = 0.f;
#if BITS < 16
  const int group = column * PER / GROUP;
#else
  const int group = 0;
#endif
  for (int from = 0; from < n; from += UNROLL * SUB) {
    if (from) fetch(from);
#pragma unroll
    for (int u = 0; u < UNROLL; u++)
      if (from + u * SUB < n) {  // the same for the whole warp
        const int i = from + u * SUB + sub;
        const float c = i < n ? factors[warp][i * GROUPS + group] : 0.f;
        ones += c;
#pragma unroll
        for (int j = 0; j < PER; j++) acc[j] += c * weight(data[u], j);
      }
  }
#if PDL == 2
  let_others_start();
#endif
#pragma unroll
  for (int j = 0; j < PER; j++) acc[j] = decoded(acc[j], ones, j);

  const int start = fold<16, PER>(acc, lane);
  constexpr int width = PER / SUB;
  float* place = sums[warp] + column * (PER + 4) + start;
#pragma unroll
  for (int i = 0; i < width; i++) place[i] = acc[i];
#endif
  __syncthreads();
#pragma unroll
  for (int b = 0; b < BIASES; b++) {
    const int o = b * WARPS * 32 + threadIdx.x;
    if (o < OUTPUTS && n0 + o < N) {
#if BIAS
      float sum = widen(bias[b]);
#else
      float sum = 0.f;
#endif
#pragma unroll
      for (int i = 0; i < WARPS; i++) sum += sums[i][PLACE(o)];
#if PARTIALS
      y[(size_t)split * N + n0 + o] = sum;
#else
      atomicAdd(y + n0 + o, sum);
#endif
    }
  }
}
