// Vectors of the instruction set this file is compiled for, exp on them, and the register-blocked micro-kernel.
//
// GCC/Clang vector extensions, no intrinsics: the same text is AVX-512, AVX2, SSE or NEON code depending on the
// target that the including file has set. No standard library is included here, so that no inline function compiled
// for a newer instruction set can be picked by the linker for an older one.
#pragma once
#include <cstdint>

#if defined(__clang__)
#define FC_UNROLL _Pragma("unroll")
#else
#define FC_UNROLL _Pragma("GCC unroll 16")
#endif
#define FC_INLINE inline __attribute__((always_inline))

namespace fastclip {
namespace FC_ISA {

constexpr int kVectorBytes = FC_VECTOR_BYTES;
constexpr int kVectorsPerPanel = FC_VECTORS_PER_PANEL;

// V: one vector of T. kLanes: its elements. kPanel: columns of a panel, the unit in which matrices are stored.
template <class T>
struct Simd {
  typedef T V __attribute__((vector_size(kVectorBytes)));
  typedef T Unaligned __attribute__((vector_size(kVectorBytes), aligned(sizeof(T)), may_alias));
  static constexpr int kLanes = kVectorBytes / int(sizeof(T));
  static constexpr int kPanel = kLanes * kVectorsPerPanel;
  static FC_INLINE V load(const T* p) { return *reinterpret_cast<const Unaligned*>(p); }
  static FC_INLINE void store(T* p, V v) { *reinterpret_cast<Unaligned*>(p) = v; }
  static FC_INLINE V fill(T s) { return V{} + s; }
};

constexpr int kRowsPerTile = 6;  // 6 x 2 (AVX2) or 6 x 4 (AVX-512) accumulators leave registers for the operands

// v, rounded to T here: without this the compiler may fuse a product with the subtraction that follows it in one kernel
// and not in the other, and forward and backward would see logits that differ by eps |S|.
template <class V>
static FC_INLINE V rounded(V v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  return v;
}

// exp(s - shift), relative error below 2e-7; NaN stays NaN. The result is at most e^60 (math.md, eq. 7); below e^-86 it
// is about e^-86 instead of a denormal, which no sum above 1e-25 can notice.
//
// Rounding s - shift, a number near 50 as a rule, would put 2e-6 into the result. So the shift and the power of two
// leave together: shift + n ln2_high is exact, shifts being multiples of 1/16, and so is its difference from s.
static FC_INLINE Simd<float>::V exp_minus(Simd<float>::V s, Simd<float>::V shift) {
  typedef Simd<float>::V V;
  typedef int32_t I __attribute__((vector_size(kVectorBytes)));
  V x = s - shift;
  x = x < -86.0f ? Simd<float>::fill(-86.0f) : x;
  const float round = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low mantissa bits
  const V shifted = x * 1.44269504f + round;
  const V n = shifted - round;
  const V exact = n * 0.693359375f + shift;
  V r = s - exact;
  r = r - n * -2.12194440e-4f;
  r = r < -0.36f ? Simd<float>::fill(-0.36f) : r;
  V p = r * 0.0013814539415761828f + 0.00836874544620514f;  // minimax on [-ln2/2, ln2/2], 3e-9
  p = p * r + 0.04166838899254799f;
  p = p * r + 0.1666652113199234f;
  p = p * r + 0.4999999403953552f;
  p = p * (r * r) + r;
  p = p + 1.0f;
  const I power = ((I)shifted << 23) + (127 << 23);
  return p * (V)power;
}

// float64 takes the C library's exp, lane by lane: plain and accurate.
static FC_INLINE Simd<double>::V exp_minus(Simd<double>::V s, Simd<double>::V shift) {
  Simd<double>::V x = s - shift;
  FC_UNROLL
  for (int i = 0; i < Simd<double>::kLanes; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

// A matrix [rows, cols] in panels: element (i, j) at [j / kPanel][i][j % kPanel], the last panel padded with zeros.
template <class T>
static FC_INLINE int64_t panel_index(int64_t rows, int64_t i, int64_t j) {
  constexpr int W = Simd<T>::kPanel;
  return (j / W) * rows * W + i * W + j % W;
}

// acc[r][v] += sum_k A(r, k) B[k][v], k < depth, with B one panel [depth][kPanel].
// WalkRows:    A(r, k) are rows of a panelled matrix with `rows` rows: k runs along its columns.
// WalkColumns: A(r, k) are columns of one panel: k runs down its rows.
struct WalkRows {};
struct WalkColumns {};

template <class T, int R>
static FC_INLINE void multiply(WalkRows, const T* a, int64_t rows, const T* b, int64_t depth,
                               typename Simd<T>::V (&acc)[R][kVectorsPerPanel]) {
  typedef Simd<T> S;
  constexpr int W = S::kPanel;
  for (int64_t k0 = 0; k0 < depth; k0 += W, a += rows * W) {
    const int64_t count = depth - k0 < W ? depth - k0 : W;
    for (int64_t k = 0; k < count; ++k, b += W) {
      typename S::V bv[kVectorsPerPanel];
      FC_UNROLL
      for (int v = 0; v < kVectorsPerPanel; ++v) bv[v] = S::load(b + v * S::kLanes);
      FC_UNROLL
      for (int r = 0; r < R; ++r) {
        FC_UNROLL
        for (int v = 0; v < kVectorsPerPanel; ++v) acc[r][v] += a[r * W + k] * bv[v];
      }
    }
  }
}

template <class T, int R>
static FC_INLINE void multiply(WalkColumns, const T* a, int64_t, const T* b, int64_t depth,
                               typename Simd<T>::V (&acc)[R][kVectorsPerPanel]) {
  typedef Simd<T> S;
  constexpr int W = S::kPanel;
  for (int64_t k = 0; k < depth; ++k, a += W, b += W) {
    typename S::V bv[kVectorsPerPanel];
    FC_UNROLL
    for (int v = 0; v < kVectorsPerPanel; ++v) bv[v] = S::load(b + v * S::kLanes);
    FC_UNROLL
    for (int r = 0; r < R; ++r) {
      FC_UNROLL
      for (int v = 0; v < kVectorsPerPanel; ++v) acc[r][v] += a[r] * bv[v];
    }
  }
}

// Calls f(first_row, integral_constant rows) over `rows` rows in tiles of kRowsPerTile, then the rest.
template <int N>
struct Count {
  static constexpr int value = N;
};

template <class F>
static FC_INLINE void for_row_tiles(int64_t rows, const F& f) {
  int64_t r = 0;
  for (; r + kRowsPerTile <= rows; r += kRowsPerTile) f(r, Count<kRowsPerTile>{});
  switch (rows - r) {
    case 5: f(r, Count<5>{}); break;
    case 4: f(r, Count<4>{}); break;
    case 3: f(r, Count<3>{}); break;
    case 2: f(r, Count<2>{}); break;
    case 1: f(r, Count<1>{}); break;
  }
}

}  // namespace FC_ISA
}  // namespace fastclip
