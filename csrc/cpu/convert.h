// Between the element types of features and what is computed in.
#pragma once
#include "problem.h"
#include "simd.h"

namespace fastclip {
namespace FC_ISA {

static FC_INLINE float from_bits(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}
static FC_INLINE uint32_t to_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

static FC_INLINE float widen(float x) { return x; }
static FC_INLINE double widen(double x) { return x; }
static FC_INLINE float widen(Bfloat16 x) { return from_bits(uint32_t(x.bits) << 16); }
static FC_INLINE float widen(Half x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, magnitude = uint32_t(x.bits & 0x7fffu) << 13;
  // The exponent's bias differs by 112; multiplying by 2^112 also puts float16's denormals right.
  const float value = from_bits(magnitude) * from_bits(0x77800000u);
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;  // Inf and NaN
  return from_bits(to_bits(value) | special | sign);
}

static FC_INLINE void narrow(float value, float* out) { *out = value; }
static FC_INLINE void narrow(double value, double* out) { *out = value; }
static FC_INLINE void narrow(float value, Bfloat16* out) {
  const uint32_t bits = to_bits(value);
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);  // to nearest, ties to even
  out->bits = value != value ? uint16_t(0x7fc0) : uint16_t(rounded >> 16);
}
static FC_INLINE void narrow(float value, Half* out) {
  const uint32_t bits = to_bits(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;  // NaN
  } else if (magnitude >= 0x47800000u) {
    half = 0x7c00u;  // 65536 and above, Inf
  } else if (magnitude < 0x38800000u) {
    // Below 2^-14: adding 0.5 lets the float adder round to a multiple of 2^-24, float16's denormal step.
    half = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out->bits = uint16_t(sign | half);
}

}  // namespace FC_ISA
}  // namespace fastclip
