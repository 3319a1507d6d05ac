// The CPU kernels for AVX2 with FMA: 6 x 16 float tiles, 12 accumulators of 16 registers.
#include "problem.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define FC_ISA avx2
#define FC_VECTOR_BYTES 32
#define FC_VECTORS_PER_PANEL 2
#include "isa.h"

namespace fastclip {
Isa isa_avx2() { return {"avx2", avx2::kernels<float>(), avx2::kernels<double>(), {}}; }
}  // namespace fastclip
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
