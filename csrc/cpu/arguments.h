// From an operator's tensors to what the kernels take: checks sizes and types, fills in the pointers.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "processor.h"

namespace fastclip {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
T* data(const Tensor& t, int64_t at_least, const char* name) {
  STD_TORCH_CHECK(t.numel() >= at_least && t.is_contiguous(), name, " must be contiguous and hold ", at_least,
                  " elements, got ", t.numel());
  return static_cast<T*>(t.data_ptr());
}

Element element_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Double: return Element::f64;
    case ScalarType::BFloat16: return Element::bf16;
    case ScalarType::Half: return Element::f16;
    default: return Element::f32;
  }
}

// Calls f with the precision that the kernels compute in, which `stored`, the packed features, tells by its dtype.
template <class F>
void with_precision(const Tensor& stored, const F& f) {
  switch (stored.scalar_type()) {
    case ScalarType::Double: f(double{}); break;
    case ScalarType::BFloat16: f(Bf16Dot{}); break;
    default: f(float{});
  }
}

// The same for the kernels that Bf16Dot leaves to float.
template <class F>
void with_type(const Tensor& computed, const F& f) {
  if (computed.scalar_type() == ScalarType::Double) {
    f(double{});
  } else {
    f(float{});
  }
}

// Calls f with the precision that the features x are multiplied in.
template <class F>
void with_precision_of(const Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return isa().bf16.pack ? f(Bf16Dot{}) : f(float{});
    default: f(float{});
  }
}

int64_t padded(int64_t n, int64_t panel) { return (n + panel - 1) / panel * panel; }

int64_t groups(int64_t count, int64_t unit) { return std::min(kMaxGroups, (count + unit - 1) / unit); }
int64_t row_groups(int64_t N) { return groups(N, kBlock); }
int64_t col_groups(int64_t M) { return groups(M, 64); }

std::string isa_name() { return isa().name; }
int64_t panel(bool is_double) { return is_double ? isa().f64.panel : isa().f32.panel; }
bool has_bf16_dot() { return isa().bf16.pack; }
// Room for one wave of G of an n x m problem, and no more than that problem needs.
int64_t wave_elements(int64_t n, int64_t m) {
  const auto blocks = [](int64_t count) { return std::min(kWave, (count + kBlock - 1) / kBlock); };
  return blocks(n) * blocks(m) * kBlock * kBlock;
}

// The rows of y^, m of them d wide, that one wave meets; an even number, for those that lie in pairs.
int64_t y_wave_elements(int64_t m, int64_t d, bool is_double) {
  return padded(std::min(kWave * kBlock, m), 2) * padded(d, panel(is_double));
}

Features features(const Tensor& x) {
  STD_TORCH_CHECK(x.stride(1) == 1 || x.size(1) == 1, "rows of the features must be contiguous");
  return {x.data_ptr(), element_of(x), x.size(0), x.size(1), x.stride(0)};
}

template <class P>
Pack<P> pack_rows(const Tensor& x, bool normalize, const Tensor& length, const Tensor& factor, const Tensor& rows) {
  const int64_t n = x.size(0), d = x.size(1), W = kernels<P>().panel;
  STD_TORCH_CHECK(Precision<P>::kPair == 1 || x.scalar_type() == ScalarType::BFloat16, "the features must be bfloat16");
  return {features(x),
          normalize,
          data<Real<P>>(length, n, "length"),
          rows.numel() ? data<Stored<P>>(rows, n * padded(d, W), "rows") : nullptr,
          nullptr,
          factor.numel() ? data<Real<P>>(factor, padded(n, W), "factor") : nullptr};
}

template <class P>
Similarity<P> similarity(const Tensor& x_rows, const Tensor& y_columns, const Tensor& x_factor, const Tensor& y_factor,
                         int64_t n, int64_t m, int64_t d, double scale) {
  const int64_t W = kernels<P>().panel;
  return {n,
          m,
          d,
          data<Stored<P>>(x_rows, n * padded(d, W), "x_rows"),
          data<Stored<P>>(y_columns, padded(m, W) * padded(d, Precision<P>::kPair), "y_columns"),
          x_factor.numel() ? data<Real<P>>(x_factor, n, "x_factor") : nullptr,
          x_factor.numel() ? data<Real<P>>(y_factor, padded(m, W), "y_factor") : nullptr,
          Real<P>(scale),
          nullptr,
          nullptr,
          nullptr,
          false,
          {}};
}

template <class P>
void set_shifts(Similarity<P>& S, const Tensor& row_shift, const Tensor& col_shift) {
  typedef Real<P> T;
  S.row_shift = data<T>(row_shift, S.N, "row_shift");
  S.col_shift = data<T>(col_shift, S.M, "col_shift");
  const T first = S.row_shift[0];
  const auto is_first = [first](T shift) { return shift == first; };
  S.one_shift =
      std::all_of(S.row_shift, S.row_shift + S.N, is_first) && std::all_of(S.col_shift, S.col_shift + S.M, is_first);
}

template <class P>
void set_positive(Similarity<P>& S, const Tensor& positive) {
  S.positive = data<int64_t>(positive, S.N, "positive");
  const bool in_range = std::all_of(S.positive, S.positive + S.N, [&](int64_t p) { return p >= 0 && p < S.M; });
  STD_TORCH_CHECK(in_range, "positive must be column indices in [0, ", S.M, ")");
}

// Empty tensors: no mask.
template <class P>
void set_mask(Similarity<P>& S, const Tensor& row_ids, const Tensor& col_ids, const Tensor& row_limit,
              const Tensor& col_limit) {
  if (row_ids.numel() == 0) return;
  S.mask = {data<int64_t>(row_ids, S.N, "row_ids"), data<int64_t>(col_ids, S.M, "col_ids"),
            data<Real<P>>(row_limit, S.N, "row_limit"), data<Real<P>>(col_limit, S.M, "col_limit")};
}

// Scratch of the matrix products, of a problem that says which it wants.
template <template <class> class Problem, class P>
void set_room(Problem<P>& p, bool turns_y, const Tensor& x_pairs, const Tensor& y_wave, const Tensor& positive_g) {
  const int64_t width = padded(p.S.D, kernels<P>().panel);
  const int64_t y_rows = y_wave_elements(p.S.M, p.S.D, sizeof(Real<P>) == 8);
  if (turns_y) p.y_wave = data<Stored<P>>(y_wave, y_rows, "y_wave");
  if (Precision<P>::kPair == 1) return;
  if (p.dy) p.x_pairs = data<Stored<P>>(x_pairs, padded(p.S.N, 2) * width, "x_pairs");
  p.positive_g = data<Real<P>>(positive_g, p.S.N, "positive_g");
}

template <class T>
Finish<T> finish_side(const Tensor& x, const Tensor& dx, const Tensor& factor, double scale, bool normalize,
                      const Tensor& grad, const Tensor& inner) {
  if (!dx.numel()) return {};
  const int64_t n = x.size(0), d = x.size(1);
  return {features(x),
          normalize,
          data<T>(dx, n * padded(d, kernels<T>().panel), "dx"),
          factor.numel() ? data<T>(factor, n, "factor") : nullptr,
          T(scale),
          grad.numel() ? data<char>(grad, n * d, "grad") : nullptr,
          grad.numel() && grad.scalar_type() != x.scalar_type(),
          data<double>(inner, n, "inner")};
}

}  // namespace
}  // namespace fastclip
