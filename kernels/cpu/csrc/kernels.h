// The kernels that one instruction set offers, as a table of plain functions. No torch here: these files compile
// in seconds and once per instruction set (see isa_*.cpp); binding.cpp picks a table at run time.
#pragma once
#include <cstdint>

namespace dynact {

struct bf16 {
  uint16_t bits;
};

constexpr int64_t kMaxRows = 16;  // of a batch; more rows are a matrix product of the library's

enum class Act { silu, relu, relu2, gelu_tanh, gelu };

template <typename T>
struct Kernels {
  // y[n] += sum_j val[j] * w[row_j][n] for 0 <= n < N; row_j = idx ? idx[j] : first + j.
  void (*axpy_rows)(const T* w, int64_t N, const int32_t* idx, int64_t first, const float* val, int64_t m, float* y);
  // y[b][n] += sum_j val[b][j] * w[idx[j]][n] for b < B: a weight is read once for all rows of the batch, 2 <= B <= 16.
  // Rows of val are ld apart (no multiple of 4 KiB, or they share a set of the cache), those of y N.
  void (*axpy_batch)(const T* w, int64_t N, const int32_t* idx, const float* val, int64_t ld, int64_t m, int64_t B,
                     float* y);
  // out[j] = sum_k w[row_j][k] * x[k]; row_j = idx ? idx[j] : first + j.
  void (*dot_rows)(const T* w, int64_t K, const int32_t* idx, int64_t first, int64_t m, const float* x, float* out);
  // Both products of a gated MLP, two weight matrices read side by side.
  void (*dot_rows2)(const T* wa, const T* wb, int64_t K, const int32_t* idx, int64_t m, const float* x, float* a,
                    float* b);
  // out = round(round(act(gate)) * up), every intermediate rounded to T; up may be null (then out = round(act(gate))).
  // The inputs are floats that hold values of T.
  void (*glu)(const float* gate, const float* up, int64_t n, Act act, float* out);
  // x = float(T(x)): the rounding of a value that the module would have stored as T.
  void (*round)(float* x, int64_t n);
  void (*to_float)(const T* x, int64_t n, float* out);
  void (*from_float)(const float* x, int64_t n, T* out);
};

// Low-bit lines: chunks of 64 bytes that hold 32 16-bit words, then a signed 16-bit scale for every 32 weights. A word
// holds 16 / bits weights, lowest first: weight 32 j + 16 h + d of a chunk is the j-th of word 8 (d / 4) + 4 h + d % 4,
// stored as code + 2^(bits - 1). Two lines interleaved word by word are then pairs for a 16-bit dot product, whose sums
// lie in natural order. A weight is code * scale * peak / 2^15, peak being the group's.
constexpr int64_t chunk_weights(int64_t bits) { return 512 / bits; }
constexpr int64_t line_chunks(int64_t bits, int64_t width) {
  return (width + chunk_weights(bits) - 1) / chunk_weights(bits);
}
constexpr int64_t line_groups(int64_t bits, int64_t width) {
  return line_chunks(bits, width) * (chunk_weights(bits) / 32);
}
constexpr int64_t line_bytes(int64_t bits, int64_t width) {
  return line_chunks(bits, width) * 64 + line_groups(bits, width) * 2;
}
// int32 values that axpy_lines needs to work in
constexpr int64_t lowbit_room(int64_t bits, int64_t width) {
  return line_groups(bits, width) * (32 + 1 + 4) + 5 * 16;
}

struct LowBit {
  // x as 16-bit integers; returns the unit, |largest| / 32767 (NaN where there is one). x has room for n + 16.
  float (*narrow)(const float* val, int64_t n, int16_t* x);
  // y[n] += unit * sum_j x[j] * line[idx[j]][n]; idx nullptr: lines first + j. work: lowbit_room.
  void (*axpy_lines)(const uint8_t* lines, int64_t stride, int64_t bits, int64_t width, const float* peak,
                     const int32_t* idx, int64_t first, const int16_t* x, float unit, int64_t m, int32_t* work, float* y);
  // x * peak as 16-bit integers in the order of a line's words, and for each group what its codes' offset adds, as the
  // dword lanes of a vector; returns the unit.
  float (*spread)(const float* x, int64_t width, int64_t bits, const float* peak, int16_t* own, int32_t* less);
  // out[j] = unit * line[idx[j]] . x
  void (*dot_lines)(const uint8_t* lines, int64_t stride, int64_t bits, int64_t groups, const int32_t* idx, int64_t first,
                    const int16_t* own, const int32_t* less, float unit, int64_t m, float* out);
};

struct Table {
  const char* name;
  Kernels<float> f32;
  Kernels<bf16> b16;
  // Keeps x_i where not(|x_i| <= t_i), so a NaN is kept; t has stride 0 (one threshold) or 1. idx and val need
  // room for K + 16 entries. Returns how many were kept, in rising order of i.
  int64_t (*compact)(const float* x, const float* t, int64_t t_stride, int64_t K, int32_t* idx, float* val);
  // The same for x [B, K], 2 <= B <= 16: channel i is kept if any row keeps it. val is [B][K + 16], 0 where a row drops
  // what another keeps.
  int64_t (*compact_batch)(const float* x, const float* t, int64_t t_stride, int64_t K, int64_t B, int32_t* idx,
                           float* val);
  // logits -> exp(logits - peak), in place; returns their sum.
  float (*exp_sum)(float* logits, int64_t n, float peak);
  // Streams n bytes (a multiple of 4096) through the registers.
  uint64_t (*read)(const char* p, int64_t n);
  LowBit low;
};

const Table* vnni_table();  // AVX-512 with VNNI; nullptr where the compiler's target has no such instructions
const Table* avx512_table();
const Table* avx2_table();
const Table* generic_table();

}  // namespace dynact
