// Enough of CUDA to run a kernel of kernels/cuda/csrc on a CPU: blocks in turn, a thread each, barriers for lockstep.
#pragma once
#include <atomic>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>
#define ON_HOST
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
using std::min;
struct float4 { float x, y, z, w; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct Index { unsigned x, y; };
inline thread_local Index threadIdx, blockIdx;
inline Index gridDim;
inline float host_shared_[1 << 15];
inline float* shared = host_shared_;
inline std::unique_ptr<std::barrier<>> block_;
inline std::vector<std::unique_ptr<std::barrier<>>> warps_;
inline uint32_t lanes_[64][32];
inline std::mutex mutex_;
inline void __syncthreads() { block_->arrive_and_wait(); }
inline void __syncwarp() { warps_[threadIdx.x / 32]->arrive_and_wait(); }
template <class T> T exchanged(T own, int from) {
  uint32_t* all = lanes_[threadIdx.x / 32];
  std::memcpy(all + threadIdx.x % 32, &own, 4);
  __syncwarp();
  T theirs;
  std::memcpy(&theirs, all + from, 4);
  __syncwarp();
  return theirs;
}
inline float __shfl_xor_sync(unsigned, float v, int d) { return exchanged(v, (threadIdx.x % 32) ^ d); }
inline int __shfl_up_sync(unsigned, int v, int d) {
  const int lane = threadIdx.x % 32;
  return exchanged(v, lane < d ? lane : lane - d);
}
inline unsigned __ballot_sync(unsigned, bool v) {
  uint32_t* all = lanes_[threadIdx.x / 32];
  all[threadIdx.x % 32] = v;
  __syncwarp();
  unsigned ballot = 0;
  for (int i = 0; i < 32; i++) ballot |= all[i] << i;
  __syncwarp();
  return ballot;
}
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline float __uint_as_float(unsigned v) { float f; std::memcpy(&f, &v, 4); return f; }
inline float __int_as_float(int v) { return __uint_as_float((unsigned)v); }
inline unsigned __funnelshift_r(unsigned low, unsigned high, int by) {
  return (unsigned)(((uint64_t)high << 32 | low) >> (by & 31));
}
inline float rsqrtf(float v) { return 1 / std::sqrt(v); }
inline void __threadfence() {}
template <class T> T __ldcg(const T* p) { return *p; }
template <class T> T atomicAdd(T* p, T v) {
  std::lock_guard<std::mutex> lock(mutex_);
  T old = *p;
  *p += v;
  return old;
}
struct Sixteen;
inline float widen(uint16_t h) { return __uint_as_float((unsigned)h << 16); }  // bfloat16 only
inline uint16_t narrow(float v) {
  uint32_t u;
  std::memcpy(&u, &v, 4);
  return v != v ? 0x7fc0 : (u + 0x7fff + (u >> 16 & 1)) >> 16;
}
inline float widen_f16(uint16_t h) { _Float16 f; std::memcpy(&f, &h, 2); return (float)f; }
inline uint32_t halves(float low, float high) {
  const _Float16 pair[2] = {(_Float16)low, (_Float16)high};
  uint32_t word;
  std::memcpy(&word, pair, 4);
  return word;
}
inline uint32_t __byte_perm(uint32_t a, uint32_t b, unsigned how) {
  const uint64_t both = (uint64_t)b << 32 | a;
  uint32_t word = 0;
  for (int i = 0; i < 4; i++) word |= (uint32_t)(both >> (how >> 4 * i & 7) * 8 & 255) << 8 * i;
  return word;
}
inline uint32_t operands_[64][32][6];
inline void multiply(float* sums, const uint32_t* weights, const uint32_t* factors) {
  const int lane = threadIdx.x % 32;
  uint32_t(*all)[6] = operands_[threadIdx.x / 32];
  for (int i = 0; i < 4; i++) all[lane][i] = weights[i];
  for (int i = 0; i < 2; i++) all[lane][4 + i] = factors[i];
  __syncwarp();
  auto half = [](uint32_t word, int high) { return widen_f16((uint16_t)(word >> 16 * high)); };
  for (int i = 0; i < 4; i++) {  // row lane / 4 (+ 8), column 2 * (lane % 4) (+ 1)
    const int row = lane / 4, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; k++)
      sums[i] += half(all[row * 4 + k % 8 / 2][i / 2 + k / 8 * 2], k % 2) *
                 half(all[column * 4 + k % 8 / 2][4 + k / 8], k % 2);
  }
  __syncwarp();
}
template <class T> T read_once(const T* p) { return *p; }
inline void wait_for_others() {}
inline void let_others_start() {}

template <class... A, size_t... I>
void call_(void (*f)(A...), void** args, std::index_sequence<I...>) { f(*(A*)args[I]...); }
template <class... A>
void run_(void (*f)(A...), int gx, int gy, int threads, void** args) {
  gridDim = {(unsigned)gx, (unsigned)gy};
  for (int b = 0; b < gx * gy; b++) {
    block_ = std::make_unique<std::barrier<>>(threads);
    warps_.clear();
    for (int w = 0; w < threads / 32; w++) warps_.push_back(std::make_unique<std::barrier<>>(32));
    std::vector<std::thread> pool;
    for (int t = 0; t < threads; t++)
      pool.emplace_back([=] {
        threadIdx = {(unsigned)t, 0};
        blockIdx = {(unsigned)(b % gx), (unsigned)(b / gx)};
        call_(f, args, std::index_sequence_for<A...>{});
      });
    for (auto& t : pool) t.join();
  }
}
