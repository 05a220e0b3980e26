// The instruction set in use, and the yardstick of bandwidth.
#include "runtime.h"

#include <torch/library.h>

namespace dynact {

const Table* supported(const std::string& name) {
#if defined(__x86_64__) && defined(__GNUC__)
  if (name == "avx512vnni" && supported("avx512") && __builtin_cpu_supports("avx512vnni")) return vnni_table();
  if (name == "avx512" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma"))
    return avx512_table();
  if (name == "avx2" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2_table();
#endif
  return name == "generic" ? generic_table() : nullptr;
}

static const Table* best() {
  for (const char* name : {"avx512vnni", "avx512", "avx2"})
    if (const Table* t = supported(name)) return t;
  return generic_table();
}

const Table*& table() {
  static const Table* t = best();
  return t;
}

namespace {

int64_t stream(const Tensor& buffer) {
  constexpr int64_t kPage = 4096;
  const char* p = static_cast<const char*>(buffer.const_data_ptr());
  int64_t pages = static_cast<int64_t>(buffer.nbytes()) / kPage;
  std::vector<uint64_t> sums(std::max(1, at::get_num_threads()));
  int64_t parts = static_cast<int64_t>(sums.size());
  Pool::get().run(parts, [&](int64_t i) {
    int64_t a = i * pages / parts, b = (i + 1) * pages / parts;
    sums[i] = table()->read(p + a * kPage, (b - a) * kPage);
  });
  uint64_t total = 0;
  for (uint64_t s : sums) total ^= s;
  return static_cast<int64_t>(total);
}

// The instruction set in use; a name switches to that one (for tests and comparisons).
std::string isa(std::string_view name) {
  if (!name.empty()) {
    const Table* t = supported(std::string(name));
    TORCH_CHECK_VALUE(t, "this machine cannot run ", name);
    table() = t;
  }
  return table()->name;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(dynact_cpu, m) {
  m.def("stream(Tensor buffer) -> int", stream);
  m.def("isa(str name) -> str", isa);
}

}  // namespace dynact
