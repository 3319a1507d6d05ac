// Reads the user's rows, writes x^ = x / |x| (or x itself) in panels. Also the other end: gradients in the user's type.
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

template <class P, class In>
static void pack_block(const Pack<P>& p, int64_t i0, int64_t rows, double* factor) {
  typedef Real<P> T;
  constexpr int W = Simd<T>::kPanel;
  const int64_t D = p.x.width, depth = whole_pairs<P>(D);
  for (int64_t i = 0; i < rows; ++i) {
    const double length = length_of(row_of<In>(p.x, i0 + i), D, p.normalize);
    p.length[i0 + i] = T(length);
    factor[i] = p.normalize ? 1.0 / length : 1.0;
    if (!p.factor) continue;
    factor[i] = power_towards_one(length);  // exact: bfloat16 holds the product as it held the feature
    p.factor[i0 + i] = T(1.0 / (length * factor[i]));
  }
  if (p.factor && i0 + rows == p.x.rows) {
    for (int64_t i = i0 + rows; i % W; ++i) p.factor[i] = T(0);
  }
  if (p.rows) {
    Stored<P>* block = p.rows + i0 * ((D + W - 1) / W * W);
    for (int64_t k0 = 0; k0 < D; k0 += W) {
      const int64_t count = D - k0 < W ? D - k0 : W;
      for (int64_t i = 0; i < rows; ++i) {
        const In* x = row_of<In>(p.x, i0 + i) + k0;
        Stored<P>* out = block + k0 * rows + i * W;
        for (int64_t k = 0; k < count; ++k) narrow(T(widen(x[k]) * factor[i]), out + k);
        for (int64_t k = count; k < W; ++k) out[k] = {};
      }
    }
  }
  if (p.columns) {
    for (int64_t j0 = 0; j0 < rows; j0 += W) {
      Stored<P>* panel = p.columns + (i0 + j0) * depth;
      const int64_t count = rows - j0 < W ? rows - j0 : W;
      constexpr int64_t kStrip = 16;  // so many k at a time: whole cache lines of both sides stay in L1
      for (int64_t k0 = 0; k0 < depth; k0 += kStrip) {
        const int64_t k1 = k0 + kStrip < D ? k0 + kStrip : D, end = k0 + kStrip < depth ? k0 + kStrip : depth;
        for (int64_t j = 0; j < count; ++j) {
          const In* x = row_of<In>(p.x, i0 + j0 + j);
          for (int64_t k = k0; k < k1; ++k) narrow(T(widen(x[k]) * factor[j0 + j]), panel + pair_index<P>(k, j));
        }
        for (int64_t j = 0; j < W; ++j) {
          for (int64_t k = j < count ? k1 : k0; k < end; ++k) panel[pair_index<P>(k, j)] = {};
        }
      }
    }
  }
}

template <class T, class In>
static void finish_row(const Finish<T>& f, int64_t i) {
  constexpr int W = Simd<T>::kPanel;
  const int64_t D = f.x.width, padded = (D + W - 1) / W * W;
  const In* x = row_of<In>(f.x, i);
  T* dx = f.dx + i * padded;
  const double length = f.normalize ? length_of(x, D, true) : 1.0, factor = 1.0 / length;
  if (f.factor) {
    for (int64_t k = 0; k < D; ++k) dx[k] /= f.factor[i];
  }
  double lanes[W] = {}, inner = 0.0;
  for (int64_t k0 = 0; k0 < D; k0 += W) {
    const int64_t count = D - k0 < W ? D - k0 : W;
    for (int64_t k = 0; k < count; ++k) lanes[k] += double(T(widen(x[k0 + k]) * factor)) * double(dx[k0 + k]);
  }
  for (int k = 0; k < W; ++k) inner += lanes[k];
  f.inner[i] = inner;
  if (!f.grad) return;
  In* out = static_cast<In*>(f.grad) + i * D;
  // A length clamped to eps is a constant: no component along x^ to remove.
  const T along = f.normalize && !(length <= kShortest) ? T(inner) : T(0), divisor = T(length);
  for (int64_t k = 0; k < D; ++k) {
    narrow(f.scale * (dx[k] - T(widen(x[k]) * factor) * along) / divisor, out + k);
  }
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

template <class T>
static void finish(const Finish<T>& x, const Finish<T>& y, ParallelFor run) {
  constexpr int64_t kRows = 64;  // rows a task
  const int64_t x_tasks = (x.x.rows + kRows - 1) / kRows, y_tasks = (y.x.rows + kRows - 1) / kRows;
  parallel(run, x_tasks + y_tasks, [&](int64_t task) {
    const Finish<T>& f = task < x_tasks ? x : y;
    const int64_t first = (task < x_tasks ? task : task - x_tasks) * kRows;
    for (int64_t i = first; i < first + kRows && i < f.x.rows; ++i) {
      if constexpr (sizeof(T) == 8) {
        finish_row<T, double>(f, i);
      } else {
        switch (f.x.element) {
          case Element::bf16: finish_row<T, Bfloat16>(f, i); break;
          case Element::f16: finish_row<T, Half>(f, i); break;
          default: finish_row<T, float>(f, i);
        }
      }
    }
  });
}

}  // namespace FC_ISA
}  // namespace fastclip
