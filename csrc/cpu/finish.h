// The gradients in the user's type, from the accumulated products (math.md, eq. 8).
#pragma once
#include "pack.h"

namespace fastclip {
namespace FC_ISA {

// <x, dx>, panel by panel into as many sums: no waiting for the last addition.
template <class T, class In>
static FC_INLINE double inner_product(const In* x, const T* dx, int64_t D) {
  constexpr int W = Simd<T>::kPanel;
  double lanes[W] = {}, inner = 0.0;
  const auto add = [&](int64_t k, int l) { lanes[l] += double(widen(x[k])) * double(dx[k]); };
  int64_t k0 = 0;
  for (; k0 + W <= D; k0 += W) {
    for (int l = 0; l < W; ++l) add(k0 + l, l);
  }
  for (int l = 0; k0 + l < D; ++l) add(k0 + l, l);
  for (int l = 0; l < W; ++l) inner += lanes[l];
  return inner;
}

template <class T, class In>
static void finish_row(const Finish<T>& f, int64_t i) {
  constexpr int W = Simd<T>::kPanel;
  const int64_t D = f.x.width;
  const In* x = row_of<In>(f.x, i);
  const T* dx = f.dx + i * ((D + W - 1) / W * W);
  const double length = f.normalize ? length_of(x, D, true) : 1.0, divisor = f.factor ? double(f.factor[i]) : 1.0;
  const double inner = inner_product(x, dx, D) / length;
  f.inner[i] = inner / divisor;
  if (!f.grad) return;
  In* out = static_cast<In*>(f.grad) + i * D;
  // A length clamped to eps is a constant: no component along x^ to remove.
  const T along = f.normalize && !(length <= kShortest) ? T(inner) : T(0);
  const T divided_by = T(length), scale = T(f.scale / (length * divisor));
  const auto gradient = [&](int64_t k) { return scale * (dx[k] - widen(x[k]) / divided_by * along); };
  T values[W];  // the gradient may lie where dx does
  int64_t k0 = 0;
  for (; k0 + W <= D; k0 += W) {
    for (int l = 0; l < W; ++l) values[l] = gradient(k0 + l);
    for (int l = 0; l < W; ++l) narrow(values[l], out + k0 + l);
  }
  for (; k0 < D; ++k0) narrow(gradient(k0), out + k0);
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
