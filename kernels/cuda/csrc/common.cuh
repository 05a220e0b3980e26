// What the kernels of this folder share. Macros: BITS (16, 8, 4) of a weight, BF16 (or float16) of activations and of
// 16-bit weights, ACT and HAS_UP as in kernels/cuda/common.py, PDL (programmatic dependent launch).
#define INF __int_as_float(0x7f800000)
typedef unsigned int u32;
typedef unsigned short u16;
struct __align__(16) Sixteen { u32 word[4]; };

__device__ __forceinline__ float widen_bf16(u16 h) { return __uint_as_float(((u32)h) << 16); }

#ifndef ON_HOST  // the tests run the kernels on a CPU, thread by thread
__device__ __forceinline__ float widen_f16(u16 h) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
}

__device__ __forceinline__ float widen(u16 h) {
#if BF16
  return widen_bf16(h);
#else
  return widen_f16(h);
#endif
}

__device__ __forceinline__ u16 narrow(float v) {
  u16 h;
#if BF16
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(v));
#else
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(v));
#endif
  return h;
}

// Sixteen bytes of weights; read once, so kept out of L1.
__device__ __forceinline__ Sixteen read_once(const Sixteen* p) {
  Sixteen v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3]) : "l"(p));
  return v;
}

// Until the kernels before this one are done, where this one was launched early.
__device__ __forceinline__ void wait_for_others() {
#if PDL
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// sums[16 outputs x 8] += weights[16 x 16 channels] x factors[16 x 8] on a tensor core; PTX: mma.m16n8k16.
__device__ __forceinline__ void multiply(float* sums, const u32* weights, const u32* factors) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(weights[0]), "r"(weights[1]), "r"(weights[2]), "r"(weights[3]), "r"(factors[0]), "r"(factors[1]));
}

// Two floats as float16s in one word, `low` in its lower half.
__device__ __forceinline__ u32 halves(float low, float high) {
  u32 pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// The next kernel may start: its blocks take what room is left and wait.
__device__ __forceinline__ void let_others_start() {
#if PDL
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
#endif

__device__ __forceinline__ float rounded(float v) { return widen(narrow(v)); }

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

// A code of 4 or 8 bits becomes the mantissa of a number between 1 and 2: no conversion, one logical operation a weight
// and a rotation for two (one). Bits 19 to 22 hold a high nibble, 15 to 18 a low one, which stays where it is: those
// numbers are 1 + code / 16 and 1 + code / 256. Who sums them takes the ones off again: `decoded`.
#define ONE 0x3f800000u
__device__ __forceinline__ float mantissa(u32 word, u32 field) { return __uint_as_float((word & field) | ONE); }

#if BITS == 16
__device__ __forceinline__ float weight(const Sixteen& v, int i) {
#if BF16
  return __uint_as_float(i % 2 ? v.word[i / 2] & 0xffff0000u : v.word[i / 2] << 16);
#else
  return widen((u16)(v.word[i / 2] >> (i % 2 * 16)));
#endif
}
__device__ __forceinline__ float decoded(float sum, float ones, int i) { return sum; }
#elif BITS == 8
__device__ __forceinline__ float weight(const Sixteen& v, int i) {
  return mantissa(__funnelshift_r(v.word[i / 4], v.word[i / 4], i % 4 * 8), 0x7f8000u);
}
// sum of c * weight, ones = sum of c: the sum of c * (code - 128).
__device__ __forceinline__ float decoded(float sum, float ones, int i) { return (sum - 1.5f * ones) * 256.f; }
#else
__device__ __forceinline__ float weight(const Sixteen& v, int i) {
  const u32 word = __funnelshift_r(v.word[i / 8], v.word[i / 8], i % 8 / 2 * 8);
  return mantissa(word, i % 2 ? 0x780000u : 0x78000u);
}
__device__ __forceinline__ float decoded(float sum, float ones, int i) {
  return i % 2 ? (sum - 1.5f * ones) * 16.f : (sum - 1.03125f * ones) * 256.f;
}
#endif
#define PER (128 / BITS)  // weights of sixteen bytes
