// Reads the user's rows, writes x^ = x / |x| (or x itself) in panels.
#pragma once
#include "convert.h"
#include "problem.h"
#include "simd.h"

namespace fastclip {
namespace FC_ISA {

constexpr double kShortest = 1e-12;  // F.normalize's eps

template <class In>
static FC_INLINE const In* row_of(const Features& x, int64_t i) {
  return static_cast<const In*>(x.data) + i * x.row_stride;
}

// The length of a row, at least F.normalize's eps where it divides; NaN stays NaN.
template <class In>
static FC_INLINE double length_of(const In* x, int64_t D, bool normalize) {
  double lanes[16] = {}, square = 0.0;  // sixteen sums at a time: no waiting for the last addition
  for (int64_t k = 0; k < D / 16 * 16; k += 16) {
    for (int l = 0; l < 16; ++l) lanes[l] += double(widen(x[k + l])) * double(widen(x[k + l]));
  }
  for (int64_t k = D / 16 * 16; k < D; ++k) lanes[k % 16] += double(widen(x[k])) * double(widen(x[k]));
  for (int l = 0; l < 16; ++l) square += lanes[l];
  const double norm = __builtin_sqrt(square);
  return normalize && norm < kShortest ? kShortest : norm;
}

// The power of two that brings a length into [1, 2); 1 for Inf and NaN.
static FC_INLINE double power_towards_one(double length) {
  uint64_t bits;
  __builtin_memcpy(&bits, &length, 8);
  const uint64_t exponent = bits >> 52 & 0x7ffu;
  const uint64_t inverse = exponent == 0x7ffu ? 0x3ffull << 52 : (0x7feull - exponent) << 52;
  double power;
  __builtin_memcpy(&power, &inverse, 8);
  return power;
}

// out = the first `count` of x, times the factor, as the matrices hold it.
template <class P, class In>
static FC_INLINE void convert(const In* x, int64_t count, double factor, Stored<P>* out) {
  for (int64_t k = 0; k < count; ++k) narrow(Real<P>(widen(x[k]) * factor), out + k);
}
// A power of two: nothing to round.
template <>
FC_INLINE void convert<Bf16Dot>(const Bfloat16* x, int64_t count, double factor, Bfloat16* out) {
  const float power = float(factor);
  for (int64_t k = 0; k < count; ++k) out[k].bits = uint16_t(to_bits(widen(x[k]) * power) >> 16);
}

template <class P, class In>
static void pack_rows(const Pack<P>& p, int64_t i0, int64_t rows, const double* factor) {
  constexpr int W = Simd<Real<P>>::kPanel;
  const int64_t D = p.x.width;
  Stored<P>* block = p.rows + i0 * ((D + W - 1) / W * W);
  for (int64_t k0 = 0; k0 < D; k0 += W) {
    const int64_t count = D - k0 < W ? D - k0 : W;
    for (int64_t i = 0; i < rows; ++i) {
      Stored<P>* out = block + k0 * rows + i * W;
      convert<P>(row_of<In>(p.x, i0 + i) + k0, count, factor[i], out);
      for (int64_t k = count; k < W; ++k) out[k] = {};
    }
  }
}

// A square of lanes at a time, each of kPair elements.
template <class P, class In>
static void pack_columns(const Pack<P>& p, int64_t i0, int64_t rows, const double* factor) {
  typedef Simd<Real<P>> L;
  constexpr int W = L::kPanel, kLanes = L::kLanes, kPair = Precision<P>::kPair, kDeep = kLanes * kPair;
  const int64_t D = p.x.width, depth = whole_pairs<P>(D);
  for (int64_t j0 = 0; j0 < rows; j0 += W) {
    Stored<P>* panel = p.columns + (i0 + j0) * depth;
    for (int64_t k0 = 0; k0 < depth; k0 += kDeep) {
      const int64_t count = D - k0 < kDeep ? D - k0 : kDeep, lanes = (count + kPair - 1) / kPair;
      for (int64_t j = j0; j < j0 + W; j += kLanes) {
        alignas(kVectorBytes) Stored<P> square[kLanes][kDeep] = {};
        for (int64_t r = 0; r < kLanes && j + r < rows; ++r) {
          convert<P>(row_of<In>(p.x, i0 + j + r) + k0, count, factor[j + r], square[r]);
        }
        typename L::V turned[kLanes];
        for (int r = 0; r < kLanes; ++r) __builtin_memcpy(&turned[r], square[r], kVectorBytes);
        transpose<Real<P>>(turned);
        for (int64_t k = 0; k < lanes; ++k) {
          __builtin_memcpy(panel + ((k0 / kPair + k) * W + j - j0) * kPair, &turned[k], kVectorBytes);
        }
      }
    }
  }
}

template <class P, class In>
static void pack_block(const Pack<P>& p, int64_t i0, int64_t rows, double* factor) {
  typedef Real<P> T;
  for (int64_t i = 0; i < rows; ++i) {
    const double length = length_of(row_of<In>(p.x, i0 + i), p.x.width, p.normalize);
    p.length[i0 + i] = T(length);
    factor[i] = p.normalize ? 1.0 / length : 1.0;
    if (!p.factor) continue;
    factor[i] = power_towards_one(length);  // exact: bfloat16 holds the product as it held the feature
    p.factor[i0 + i] = T(1.0 / (length * factor[i]));
  }
  if (p.factor && i0 + rows == p.x.rows) {
    for (int64_t i = i0 + rows; i % Simd<T>::kPanel; ++i) p.factor[i] = T(0);
  }
  if (p.rows) pack_rows<P, In>(p, i0, rows, factor);
  if (p.columns) pack_columns<P, In>(p, i0, rows, factor);
}

// Both sides at once: a thread is woken once.
template <class P>
static void pack(const Pack<P>& x, const Pack<P>& y, ParallelFor run) {
  const int64_t x_blocks = (x.x.rows + kBlock - 1) / kBlock, y_blocks = (y.x.rows + kBlock - 1) / kBlock;
  parallel(run, x_blocks + y_blocks, [&](int64_t task) {
    double factor[kBlock];
    const Pack<P>& p = task < x_blocks ? x : y;
    const int64_t i0 = (task < x_blocks ? task : task - x_blocks) * kBlock;
    const int64_t rows = p.x.rows - i0 < kBlock ? p.x.rows - i0 : kBlock;
    if constexpr (sizeof(Stored<P>) == 8) {
      pack_block<P, double>(p, i0, rows, factor);
    } else if constexpr (sizeof(Stored<P>) == 2) {
      pack_block<P, Bfloat16>(p, i0, rows, factor);
    } else {
      switch (p.x.element) {
        case Element::bf16: pack_block<P, Bfloat16>(p, i0, rows, factor); break;
        case Element::f16: pack_block<P, Half>(p, i0, rows, factor); break;
        default: pack_block<P, float>(p, i0, rows, factor);
      }
    }
  });
}

}  // namespace FC_ISA
}  // namespace fastclip
