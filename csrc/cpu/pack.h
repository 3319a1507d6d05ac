// Reads the user's rows, writes x^ = x / |x| (or x itself) in panels. Also the other end: gradients in the user's type.
#pragma once
#include "problem.h"
#include "simd.h"

namespace fastclip {
namespace FC_ISA {

struct Bfloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

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

template <class T, class In>
static void pack_block(const Pack<T>& p, int64_t i0, int64_t rows, double* factor) {
  constexpr int W = Simd<T>::kPanel;
  const int64_t D = p.x.width;
  for (int64_t i = 0; i < rows; ++i) {
    const double length = length_of(row_of<In>(p.x, i0 + i), D, p.normalize);
    p.length[i0 + i] = T(length);
    factor[i] = p.normalize ? 1.0 / length : 1.0;
  }
  if (p.rows) {
    T* block = p.rows + i0 * ((D + W - 1) / W * W);
    for (int64_t k0 = 0; k0 < D; k0 += W) {
      const int64_t count = D - k0 < W ? D - k0 : W;
      for (int64_t i = 0; i < rows; ++i) {
        const In* x = row_of<In>(p.x, i0 + i) + k0;
        T* out = block + k0 * rows + i * W;
        for (int64_t k = 0; k < count; ++k) out[k] = T(widen(x[k]) * factor[i]);
        for (int64_t k = count; k < W; ++k) out[k] = T(0);
      }
    }
  }
  if (p.columns) {
    for (int64_t j0 = 0; j0 < rows; j0 += W) {
      T* panel = p.columns + (i0 + j0) * D;
      const int64_t count = rows - j0 < W ? rows - j0 : W;
      constexpr int64_t kStrip = 16;  // so many k at a time: whole cache lines of both sides stay in L1
      for (int64_t k0 = 0; k0 < D; k0 += kStrip) {
        const int64_t k1 = k0 + kStrip < D ? k0 + kStrip : D;
        for (int64_t j = 0; j < count; ++j) {
          const In* x = row_of<In>(p.x, i0 + j0 + j);
          for (int64_t k = k0; k < k1; ++k) panel[k * W + j] = T(widen(x[k]) * factor[j0 + j]);
        }
        for (int64_t j = count; j < W; ++j) {
          for (int64_t k = k0; k < k1; ++k) panel[k * W + j] = T(0);
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
  const T* dx = f.dx + i * padded;
  const double length = f.normalize ? length_of(x, D, true) : 1.0, factor = 1.0 / length;
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
template <class T>
static void pack(const Pack<T>& x, const Pack<T>& y, ParallelFor run) {
  const int64_t x_blocks = (x.x.rows + kBlock - 1) / kBlock, y_blocks = (y.x.rows + kBlock - 1) / kBlock;
  parallel(run, x_blocks + y_blocks, [&](int64_t task) {
    double factor[kBlock];
    const Pack<T>& p = task < x_blocks ? x : y;
    const int64_t i0 = (task < x_blocks ? task : task - x_blocks) * kBlock;
    const int64_t rows = p.x.rows - i0 < kBlock ? p.x.rows - i0 : kBlock;
    if constexpr (sizeof(T) == 8) {
      pack_block<T, double>(p, i0, rows, factor);
    } else {
      switch (p.x.element) {
        case Element::bf16: pack_block<T, Bfloat16>(p, i0, rows, factor); break;
        case Element::f16: pack_block<T, Half>(p, i0, rows, factor); break;
        default: pack_block<T, float>(p, i0, rows, factor);
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
