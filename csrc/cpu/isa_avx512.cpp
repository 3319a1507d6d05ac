// The CPU kernels for AVX-512: 6 x 64 float tiles, 24 accumulators of 32 registers.
#include "problem.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")
#endif
#define FC_ISA avx512
#define FC_VECTOR_BYTES 64
#define FC_VECTORS_PER_PANEL 4
#include "isa.h"

namespace fastclip {
Isa isa_avx512() { return {"avx512", avx512::kernels<float>(), avx512::kernels<double>(), {}}; }
}  // namespace fastclip
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
