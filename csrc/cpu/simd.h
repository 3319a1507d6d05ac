// Vectors of the instruction set this file is compiled for, exp on them, and the register-blocked micro-kernel.
//
// GCC/Clang vector extensions, no intrinsics: the same text is AVX-512, AVX2, SSE or NEON code depending on the
// target that the including file has set. No standard library is included here, so that no inline function compiled
// for a newer instruction set can be picked by the linker for an older one.
#pragma once
#include "problem.h"

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

template <int kBytes>
struct Integer {
  typedef int32_t Type;
};
template <>
struct Integer<8> {
  typedef int64_t Type;
};

// V: one vector of T. Lanes: of integers as wide. kLanes: its elements. kPanel: columns of a panel, the unit in which
// matrices are stored.
template <class T>
struct Simd {
  typedef T V __attribute__((vector_size(kVectorBytes)));
  typedef T Unaligned __attribute__((vector_size(kVectorBytes), aligned(sizeof(T)), may_alias));
  typedef typename Integer<sizeof(T)>::Type Lane;
  typedef Lane Lanes __attribute__((vector_size(kVectorBytes)));
  static constexpr int kLanes = kVectorBytes / int(sizeof(T));
  static constexpr int kPanel = kLanes * kVectorsPerPanel;
  static FC_INLINE V load(const T* p) { return *reinterpret_cast<const Unaligned*>(p); }
  static FC_INLINE void store(T* p, V v) { *reinterpret_cast<Unaligned*>(p) = v; }
  static FC_INLINE V fill(T s) { return V{} + s; }
};

// Lanes of two vectors, picked by number: those of b follow those of a.
template <class V, class Lanes>
static FC_INLINE V pick(V a, V b, Lanes lanes) {
#if defined(__clang__)
  constexpr int kLanes = int(sizeof(V) / sizeof(a[0]));
  V out;
  FC_UNROLL
  for (int l = 0; l < kLanes; ++l) out[l] = int(lanes[l]) < kLanes ? a[lanes[l]] : b[lanes[l] - kLanes];
  return out;
#else
  return __builtin_shuffle(a, b, lanes);
#endif
}

// Lane l of rows[r] becomes lane r of rows[l], whatever bits the lanes hold.
template <class T, int kStep = 1>
static FC_INLINE void transpose(typename Simd<T>::V (&rows)[Simd<T>::kLanes]) {
  constexpr int kLanes = Simd<T>::kLanes;
  if constexpr (kStep < kLanes) {
    typename Simd<T>::Lanes lower, upper;
    FC_UNROLL
    for (int l = 0; l < kLanes; ++l) {
      lower[l] = l & kStep ? kLanes + l - kStep : l;
      upper[l] = l & kStep ? kLanes + l : l + kStep;
    }
    FC_UNROLL
    for (int r = 0; r < kLanes; ++r) {
      if (r & kStep) continue;
      const auto a = rows[r], b = rows[r + kStep];
      rows[r] = pick(a, b, lower);
      rows[r + kStep] = pick(a, b, upper);
    }
    transpose<T, 2 * kStep>(rows);
  }
}

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
  const V lowest = shift - 86.0f;
  s = s < lowest ? lowest : s;
  const V x = s - shift;
  const float round = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low mantissa bits
  const V shifted = x * 1.44269504f + round;
  const V n = shifted - round;
  const V exact = n * 0.693359375f + shift;
  V r = s - exact;
  r = r - n * -2.12194440e-4f;
  V p = r * 0.0013814539415761828f + 0.00836874544620514f;  // minimax on [-ln2/2, ln2/2], 3e-9
  p = p * r + 0.04166838899254799f;
  p = p * r + 0.1666652113199234f;
  p = p * r + 0.4999999403953552f;
  p = p * (r * r) + r;
  const V power = (V)(((I)shifted << 23) + (127 << 23));
  return p * power + power;
}

// float64 takes the C library's exp, lane by lane: plain and accurate.
static FC_INLINE Simd<double>::V exp_minus(Simd<double>::V s, Simd<double>::V shift) {
  Simd<double>::V x = s - shift;
  FC_UNROLL
  for (int i = 0; i < Simd<double>::kLanes; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

// A matrix [rows, cols] in panels: element (i, j) at [j / kPanel][i][j % kPanel], the last panel padded with zeros.
// Where it is multiplied along its rows, kPair of them lie side by side and their number is rounded up: element (i, j)
// of a panel is at [i / kPair][j][i % kPair].
template <class P>
static FC_INLINE int64_t whole_pairs(int64_t rows) {
  return (rows + Precision<P>::kPair - 1) / Precision<P>::kPair * Precision<P>::kPair;
}

template <class P>
static FC_INLINE int64_t pair_index(int64_t i, int64_t j) {
  constexpr int kPair = Precision<P>::kPair;
  return (i / kPair * Simd<Real<P>>::kPanel + j) * kPair + i % kPair;
}

// What one instruction of a matrix product takes: kPair elements of A, the same for all lanes, and kPair for each lane
// of B.
template <class P>
struct Operands {
  typedef typename Simd<P>::V V;
  static FC_INLINE P one(const P* a) { return *a; }
  static FC_INLINE V lanes(const P* b) { return Simd<P>::load(b); }
  static FC_INLINE V add_product(V sum, P a, V b) { return sum + a * b; }
};

// acc[r][v] += sum_k A(r, k) B[k][v], k < depth, with B one panel [depth][kPanel] that is multiplied along its rows.
// WalkRows:    A(r, k) are rows of a panelled matrix with `rows` rows: k runs along its columns.
// WalkColumns: A(r, k) are columns of one panel that is multiplied along its rows too.
struct WalkRows {};
struct WalkColumns {};

template <class P, int R>
static FC_INLINE void multiply_step(const Stored<P>* a, int64_t row_stride, const Stored<P>* b,
                                    typename Simd<Real<P>>::V (&acc)[R][kVectorsPerPanel]) {
  typedef Operands<P> O;
  constexpr int kLanes = Simd<Real<P>>::kLanes * Precision<P>::kPair;
  decltype(O::lanes(b)) bv[kVectorsPerPanel];
  FC_UNROLL
  for (int v = 0; v < kVectorsPerPanel; ++v) bv[v] = O::lanes(b + v * kLanes);
  FC_UNROLL
  for (int r = 0; r < R; ++r) {
    const auto av = O::one(a + r * row_stride);
    FC_UNROLL
    for (int v = 0; v < kVectorsPerPanel; ++v) acc[r][v] = O::add_product(acc[r][v], av, bv[v]);
  }
}

template <class P, int R>
static FC_INLINE void multiply(WalkRows, const Stored<P>* a, int64_t rows, const Stored<P>* b, int64_t depth,
                               typename Simd<Real<P>>::V (&acc)[R][kVectorsPerPanel]) {
  constexpr int W = Simd<Real<P>>::kPanel, kPair = Precision<P>::kPair;
  for (int64_t k0 = 0; k0 < depth; k0 += W, a += rows * W) {
    const int64_t count = depth - k0 < W ? depth - k0 : W;
    for (int64_t k = 0; k < count; k += kPair, b += W * kPair) multiply_step<P, R>(a + k, W, b, acc);
  }
}

template <class P, int R>
static FC_INLINE void multiply(WalkColumns, const Stored<P>* a, int64_t, const Stored<P>* b, int64_t depth,
                               typename Simd<Real<P>>::V (&acc)[R][kVectorsPerPanel]) {
  constexpr int W = Simd<Real<P>>::kPanel, kPair = Precision<P>::kPair;
  for (int64_t k = 0; k < depth; k += kPair, a += W * kPair, b += W * kPair) multiply_step<P, R>(a, kPair, b, acc);
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
