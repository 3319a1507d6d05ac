// The copy of the kernels for this processor, and torch's threads to run them on.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <string>

#include "problem.h"

namespace fastclip {
namespace {

bool runs_here(const std::string& name) {
#if defined(__x86_64__)
  if (name == "avx512") {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("fma");
  }
  if (name == "avx512_bf16") return runs_here("avx512") && __builtin_cpu_supports("avx512bf16");
  if (name == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return name == "baseline";
}

// The best instruction set of this processor, or the one that FASTCLIP_CPU_ISA names.
Isa choose_isa() {
  const char* wish = std::getenv("FASTCLIP_CPU_ISA");
  const std::string name = wish ? wish : "";
  STD_TORCH_CHECK(name.empty() || runs_here(name), "FASTCLIP_CPU_ISA must be avx512_bf16, avx512, avx2 or ",
                  "baseline and run on this processor, got ", name);
#if defined(__x86_64__)
  if (name == "avx512_bf16" || (name.empty() && runs_here("avx512_bf16"))) return isa_avx512_bf16();
  if (name == "avx512" || (name.empty() && runs_here("avx512"))) return isa_avx512();
  if (name == "avx2" || (name.empty() && runs_here("avx2"))) return isa_avx2();
#endif
  return isa_baseline();
}

const Isa& isa() {
  static const Isa chosen = choose_isa();
  return chosen;
}

template <class T>
const Kernels<T>& kernels();
template <>
const Kernels<float>& kernels<float>() {
  return isa().f32;
}
template <>
const Kernels<double>& kernels<double>() {
  return isa().f64;
}
template <>
const Kernels<Bf16Dot>& kernels<Bf16Dot>() {
  STD_TORCH_CHECK(isa().bf16.pack, "this processor has no bfloat16 dot products");
  return isa().bf16;
}

// Tasks are taken one at a time by whichever thread is free; no result depends on who takes which.
void parallel_for(int64_t count, void (*task)(int64_t, void*), void* context) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(count, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      for (int64_t i = next++; i < count; i = next++) task(i, context);
    }
  });
}

void serial_for(int64_t count, void (*task)(int64_t, void*), void* context) {
  for (int64_t i = 0; i < count; ++i) task(i, context);
}

// Waking the threads costs more than packing a few rows.
ParallelFor for_elements(int64_t count) { return count < (1 << 18) ? serial_for : parallel_for; }

}  // namespace
}  // namespace fastclip
