"""The column kernel for high sparsity, in CUDA C++: a block packs the channels that it keeps before it reads weights.

From about 60 % zeros the masked Triton kernel is bound by the zeros that it still multiplies, and Triton has no cheap
way to pack a list inside a kernel. Compiled at first use, in about a second, by the NVRTC that torch ships. Sums inside
a block have a fixed order; only the atomics between blocks have not.

torch's way to NVRTC is a private function. Where a torch lacks it, or it no longer takes what it takes here, the masked
Triton kernel does all the work, after one warning: the same results, slower from about 60 % zeros on.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

CHANNELS = 256  # of a block: one a thread while the list is made
WARPS = CHANNELS // 32
OUTPUTS = 256  # of a block: eight a lane, so one row of the tile is one 512-byte segment

_SOURCE = r"""
typedef unsigned int u32;
typedef unsigned short u16;
struct __align__(16) Eight { u32 a, b, c, d; };
#define WARPS 8
#define CHANNELS 256
#define OUTPUTS 256

__device__ __forceinline__ float widen(u16 h) {
#if BF16
  return __uint_as_float(((u32)h) << 16);
#else
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
#endif
}

__device__ __forceinline__ float rounded(float v) {
  u16 h;
#if BF16
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(v));
#else
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(v));
#endif
  return widen(h);
}

#if X32
typedef float element;
__device__ __forceinline__ float value(const element* p, int i) { return rounded(p[i]); }
#else
typedef u16 element;
__device__ __forceinline__ float value(const element* p, int i) { return widen(p[i]); }
#endif

__device__ __forceinline__ float activate(float v) {
#if ACT == 1
  return v / (1.f + expf(-v));
#elif ACT == 2
  return v < 0.f ? 0.f : v;
#elif ACT == 3
  return v < 0.f ? 0.f : v * v;
#elif ACT == 4
  return v / (1.f + expf(-1.5957691216057308f * (v + 0.044715f * v * v * v)));
#elif ACT == 5
  return 0.5f * v * (1.f + erff(v * 0.7071067811865476f));
#else
  return v;
#endif
}

// Eight weights of one row; read once, so kept out of L1.
__device__ __forceinline__ Eight row(const Eight* p) {
  Eight v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.a), "=r"(v.b), "=r"(v.c), "=r"(v.d) : "l"(p));
  return v;
}

__device__ __forceinline__ void add(float* acc, u32 pair, float x) {
  acc[0] += widen((u16)(pair & 0xffffu)) * x;
  acc[1] += widen((u16)(pair >> 16)) * x;
}

// y[n] += sum of kept x_i w[i, n] (PARTIALS: part[split, n] = it). test: NOT_ZERO, SCALAR, PER_CHANNEL of column.py.
extern "C" __global__ void __launch_bounds__(CHANNELS, BLOCKS) compact(
    const element* x_ptr, const element* up_ptr, const float* t_ptr, const Eight* w_ptr, const u16* bias_ptr,
    float* y, float* zero, int n_zero, int N, int K, int seg1, int seg2, int test, int has_bias) {
  __shared__ int channel[CHANNELS];
  __shared__ float kept[CHANNELS];
  __shared__ int counts[WARPS];
  __shared__ __align__(16) float sums[WARPS * OUTPUTS];
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
  const int n0 = blockIdx.x * OUTPUTS, k = blockIdx.y * CHANNELS + tid;
  const int segment = (n0 >= seg1) + (n0 >= seg2);
  const int thread = (blockIdx.y * gridDim.x + blockIdx.x) * CHANNELS + tid;
  for (int z = thread; z < n_zero; z += gridDim.x * gridDim.y * CHANNELS) zero[z] = 0.f;

  float x = 0.f;
  bool keep = false;
  if (k < K) {
    x = value(x_ptr, k);
#if ACT
    x = rounded(activate(x));
#if HAS_UP
    x = rounded(x * value(up_ptr, k));
#endif
#endif
    // NaN is kept, and so is a zero under a negative threshold: at 0 % everything is read.
    keep = test >= 2 ? !(fabsf(x) <= t_ptr[test == 2 ? segment : segment * K + k]) : !(x == 0.f);
  }
  const u32 ballot = __ballot_sync(~0u, keep);
  if (lane == 0) counts[warp] = __popc(ballot);
  __syncthreads();
  int at = __popc(ballot & ((1u << lane) - 1)), n = 0;
  for (int i = 0; i < WARPS; i++) {
    if (i == warp) at += n;
    n += counts[i];
  }
  if (keep) {
    channel[at] = k;
    kept[at] = x;
  }
  __syncthreads();

  float acc[8];
#pragma unroll
  for (int i = 0; i < 8; i++) acc[i] = 0.f;
  const int column = n0 + lane * 8;
  if (column < N) {
    const Eight* w = w_ptr + column / 8;
    const int pitch = N / 8;
    for (int j = warp; j < n; j += WARPS * UNROLL) {
      Eight v[UNROLL];
      float xs[UNROLL];
#pragma unroll
      for (int u = 0; u < UNROLL; u++) {
        const int i = j + u * WARPS;
        xs[u] = 0.f;
        v[u] = Eight{0, 0, 0, 0};
        if (i < n) {
          xs[u] = kept[i];
          v[u] = row(w + (size_t)channel[i] * pitch);
        }
      }
#pragma unroll
      for (int u = 0; u < UNROLL; u++) {
        add(acc, v[u].a, xs[u]);
        add(acc + 2, v[u].b, xs[u]);
        add(acc + 4, v[u].c, xs[u]);
        add(acc + 6, v[u].d, xs[u]);
      }
    }
  }
  float4* own = (float4*)(sums + warp * OUTPUTS + lane * 8);
  own[0] = make_float4(acc[0], acc[1], acc[2], acc[3]);
  own[1] = make_float4(acc[4], acc[5], acc[6], acc[7]);
  __syncthreads();
  if (n0 + tid < N) {
    float sum = has_bias && blockIdx.y == 0 ? widen(bias_ptr[n0 + tid]) : 0.f;
#pragma unroll
    for (int i = 0; i < WARPS; i++) sum += sums[i * OUTPUTS + tid];
#if PARTIALS
    y[(size_t)blockIdx.y * N + n0 + tid] = sum;
#else
    atomicAdd(y + n0 + tid, sum);
#endif
  }
}
"""


@cache
def _kernel(device: int, unroll: int, blocks: int, **macros: int) -> Any:
    with torch.cuda.device(device):
        major, minor = torch.cuda.get_device_capability()
        defines = {"UNROLL": unroll, "BLOCKS": blocks} | macros
        head = "".join(f"#define {name} {int(number)}\n" for name, number in defines.items())
        return torch.cuda._compile_kernel(head + _SOURCE, "compact", compute_capability=f"{major}{minor}")


@cache
def available(device: int) -> bool:
    """Whether this torch can compile the kernel; tried once."""
    try:
        _kernel(device, *_tile(0.8), BF16=True, X32=False, ACT=0, HAS_UP=False, PARTIALS=False)
    except Exception as error:  # a private function may change in any way
        warnings.warn(
            f"torch.cuda._compile_kernel cannot compile the packed kernel ({type(error).__name__}: {error}). "
            "The Triton kernel runs in its place, slower at high sparsity.",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def _tile(expected_sparsity: float) -> tuple[int, int]:
    """The best on an H100 by bench/gpu_kernels.py --tune: the fewer rows are left, the fewer in flight suffice."""
    return (16, 2) if expected_sparsity < 0.72 else (8, 4) if expected_sparsity < 0.86 else (4, 4)


def fits(wt: Tensor, segments: tuple[int, ...] = ()) -> bool:
    """Whether the packed kernel can run on these weights (16-bit, whole 16-byte groups, segments of whole blocks)."""
    return (
        wt.is_cuda
        and wt.dtype in (torch.float16, torch.bfloat16)
        and wt.shape[1] % 8 == 0
        and wt.data_ptr() % 16 == 0
        and all(size % OUTPUTS == 0 for size in segments[:-1])
        and available(wt.device.index or 0)
    )


def launch(
    x: Tensor,
    up: Tensor | None,
    t: Tensor | None,
    wt: Tensor,
    bias: Tensor | None,
    y: Tensor,
    zero: Tensor | None,
    *,
    test: int,
    edges: tuple[int, int],
    act: int,
    partials: bool,
    expected_sparsity: float = 0.8,
    tile: tuple[int, int] | None = None,
) -> None:
    """One launch; arguments as in `column.column`. tile: (rows in flight a warp, blocks resident on a processor)."""
    k, n = wt.shape
    unroll, blocks = tile or _tile(expected_sparsity)
    kernel = _kernel(
        wt.device.index or 0, unroll, blocks, BF16=wt.dtype == torch.bfloat16, X32=x.dtype == torch.float32, ACT=act,
        HAS_UP=up is not None, PARTIALS=partials,
    )  # fmt: skip
    kernel(
        grid=(-(-n // OUTPUTS), splits(k), 1),
        block=(CHANNELS, 1, 1),
        args=[
            x, x if up is None else up, x if t is None else t, wt, x if bias is None else bias, y,
            y if zero is None else zero, 0 if zero is None else zero.numel(), n, k, *edges, test, int(bias is not None),
        ],
    )  # fmt: skip


def splits(k: int) -> int:
    """Slices of the channels."""
    return -(-k // CHANNELS)
