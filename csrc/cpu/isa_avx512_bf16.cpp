// The CPU kernels on bfloat16 features for AVX512_BF16: 6 x 64 float tiles as in isa_avx512.cpp, twice its products a
// cycle.
#include "problem.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512vl,avx512dq,avx512bw,avx512bf16,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512vl,avx512dq,avx512bw,avx512bf16,avx2,fma")
#endif
#define FC_ISA avx512_bf16
#define FC_VECTOR_BYTES 64
#define FC_VECTORS_PER_PANEL 4
#include "bf16.h"
#include "isa.h"

namespace fastclip {
Isa isa_avx512_bf16() {
  using namespace avx512_bf16;
  Isa isa = isa_avx512();
  isa.name = "avx512_bf16";
  isa.bf16 = {Simd<float>::kPanel, pack<Bf16Dot>,    sums<Bf16Dot>, maxima<Bf16Dot>, nullptr, nullptr,
              gradients<Bf16Dot>,  sigmoid<Bf16Dot>, finish<float>};
  return isa;
}
}  // namespace fastclip
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
