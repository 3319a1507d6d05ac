// AVX512_BF16: one instruction multiplies two pairs of bfloat16 a lane and adds both products to a float.
//
// Exact products, sums in float; denormals count as zero (Intel SDM, VDPBF16PS).
#pragma once
#include <immintrin.h>

#include "simd.h"

namespace fastclip {
namespace FC_ISA {

template <>
struct Operands<Bf16Dot> {
  typedef Simd<float>::V V;
  static FC_INLINE __m512bh one(const Bfloat16* a) {
    int32_t pair;
    __builtin_memcpy(&pair, a, 4);
    return (__m512bh)_mm512_set1_epi32(pair);
  }
  static FC_INLINE __m512bh lanes(const Bfloat16* b) { return (__m512bh)_mm512_loadu_si512(b); }
  static FC_INLINE V add_product(V sum, __m512bh a, __m512bh b) { return (V)_mm512_dpbf16_ps((__m512)sum, a, b); }

  typedef uint16_t Bits __attribute__((vector_size(32)));
  typedef uint32_t Pairs __attribute__((vector_size(64)));

  // Sixteen floats rounded to nearest, ties to even.
  static FC_INLINE Bits narrow(V v) { return (Bits)_mm512_cvtneps_pbh((__m512)v); }
  static FC_INLINE void store(Bfloat16* p, Bits v) { __builtin_memcpy(p, &v, sizeof v); }
  // first[0], second[0], first[1], second[1], ...
  static FC_INLINE void store_pairs(Bfloat16* p, Bits first, Bits second) {
    const Pairs both = __builtin_convertvector(first, Pairs) | __builtin_convertvector(second, Pairs) << 16;
    __builtin_memcpy(p, &both, sizeof both);
  }
  // The same of thirty-two elements each, which the vectors hold.
  static FC_INLINE void interleave(Bfloat16* p, V first, V second) {
    typedef uint16_t Half __attribute__((vector_size(32)));
    Half a[2], b[2];
    __builtin_memcpy(a, &first, sizeof a);
    __builtin_memcpy(b, &second, sizeof b);
    store_pairs(p, a[0], b[0]);
    store_pairs(p + 32, a[1], b[1]);
  }
};

}  // namespace FC_ISA
}  // namespace fastclip
