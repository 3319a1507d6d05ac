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

// out [D] = value(k), which may be made of what lies there.
template <class T, class Out, class F>
static FC_INLINE void store_row(int64_t D, Out* out, const F& value) {
  constexpr int W = Simd<T>::kPanel;
  T values[W];
  int64_t k0 = 0;
  for (; k0 + W <= D; k0 += W) {
    for (int l = 0; l < W; ++l) values[l] = value(k0 + l);
    for (int l = 0; l < W; ++l) narrow(values[l], out + k0 + l);
  }
  for (; k0 < D; ++k0) narrow(value(k0), out + k0);
}

template <class T, class In, class Out>
static void finish_row(const Finish<T>& f, int64_t i) {
  constexpr int W = Simd<T>::kPanel;
  const int64_t D = f.x.width;
  const In* x = row_of<In>(f.x, i);
  const T* dx = f.dx + i * ((D + W - 1) / W * W);
  const double length = f.normalize ? length_of(x, D, true) : 1.0, divisor = f.factor ? double(f.factor[i]) : 1.0;
  const double inner = f.normalize || f.inner ? inner_product(x, dx, D) / length : 0.0;
  if (f.inner) f.inner[i] = inner / divisor;
  if (!f.grad) return;
  Out* out = static_cast<Out*>(f.grad) + i * D;
  // A length clamped to eps is a constant: no component along x^ to remove.
  const T along = f.normalize && !(length <= kShortest) ? T(inner) : T(0);
  const T divided_by = T(length), scale = T(f.scale / (length * divisor));
  if (along == T(0)) {
    store_row<T>(D, out, [=](int64_t k) { return scale * dx[k]; });
  } else {
    store_row<T>(D, out, [=](int64_t k) { return scale * (dx[k] - widen(x[k]) / divided_by * along); });
  }
}

template <class T, class In>
static void finish_rows(const Finish<T>& f, int64_t first, int64_t last) {
  const auto row = f.wide ? finish_row<T, In, T> : finish_row<T, In, In>;
  for (int64_t i = first; i < last; ++i) row(f, i);
}

template <class T>
static void finish(const Finish<T>& x, const Finish<T>& y, ParallelFor run) {
  constexpr int64_t kRows = 64;  // rows a task
  const int64_t x_tasks = (x.x.rows + kRows - 1) / kRows, y_tasks = (y.x.rows + kRows - 1) / kRows;
  parallel(run, x_tasks + y_tasks, [&](int64_t task) {
    const Finish<T>& f = task < x_tasks ? x : y;
    const int64_t first = (task < x_tasks ? task : task - x_tasks) * kRows;
    const int64_t last = first + kRows < f.x.rows ? first + kRows : f.x.rows;
    if constexpr (sizeof(T) == 8) {
      finish_rows<T, double>(f, first, last);
    } else {
      switch (f.x.element) {
        case Element::bf16: finish_rows<T, Bfloat16>(f, first, last); break;
        case Element::f16: finish_rows<T, Half>(f, first, last); break;
        default: finish_rows<T, float>(f, first, last);
      }
    }
  });
}

}  // namespace FC_ISA
}  // namespace fastclip
