// The CPU kernels as PyTorch operators (namespace fastclip_cpu), for fastclip/backends/cpu.py to call.
//
// LibTorch's stable ABI: one binary serves torch 2.10 and newer. Every buffer is allocated in Python; an operator
// checks sizes, fills in the pointers and runs the copy of the kernels for this processor.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <limits>
#include <string>

#include "problem.h"

namespace fastclip {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

bool runs_here(const std::string& name) {
#if defined(__x86_64__)
  if (name == "avx512") {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("fma");
  }
  if (name == "avx512_bf16") return runs_here("avx512") && __builtin_cpu_supports("avx512bf16");
  if (name == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return name == "baseline";
}

// The best instruction set of this processor, or the one that FASTCLIP_CPU_ISA names.
Isa choose_isa() {
  const char* wish = std::getenv("FASTCLIP_CPU_ISA");
  const std::string name = wish ? wish : "";
  STD_TORCH_CHECK(name.empty() || runs_here(name), "FASTCLIP_CPU_ISA must be avx512_bf16, avx512, avx2 or ",
                  "baseline and run on this processor, got ", name);
#if defined(__x86_64__)
  if (name == "avx512_bf16" || (name.empty() && runs_here("avx512_bf16"))) return isa_avx512_bf16();
  if (name == "avx512" || (name.empty() && runs_here("avx512"))) return isa_avx512();
  if (name == "avx2" || (name.empty() && runs_here("avx2"))) return isa_avx2();
#endif
  return isa_baseline();
}

const Isa& isa() {
  static const Isa chosen = choose_isa();
  return chosen;
}

template <class T>
const Kernels<T>& kernels();
template <>
const Kernels<float>& kernels<float>() {
  return isa().f32;
}
template <>
const Kernels<double>& kernels<double>() {
  return isa().f64;
}
template <>
const Kernels<Bf16Dot>& kernels<Bf16Dot>() {
  STD_TORCH_CHECK(isa().bf16.pack, "this processor has no bfloat16 dot products");
  return isa().bf16;
}

// Tasks are taken one at a time by whichever thread is free; no result depends on who takes which.
void parallel_for(int64_t count, void (*task)(int64_t, void*), void* context) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(count, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      for (int64_t i = next++; i < count; i = next++) task(i, context);
    }
  });
}

void serial_for(int64_t count, void (*task)(int64_t, void*), void* context) {
  for (int64_t i = 0; i < count; ++i) task(i, context);
}

// Waking the threads costs more than packing a few rows.
ParallelFor for_elements(int64_t count) { return count < (1 << 18) ? serial_for : parallel_for; }

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
  return ((blocks(n) - 1) * kWave + blocks(m)) * kBlock * kBlock;
}

// The rows of y^, m of them d wide, that one wave meets; an even number, for those that lie in pairs.
int64_t y_wave_elements(int64_t m, int64_t d, bool is_double) {
  return padded(std::min(kWave * kBlock, m), 2) * padded(d, panel(is_double));
}

template <class P>
Pack<P> pack_rows(const Tensor& x, bool normalize, const Tensor& length, const Tensor& factor, const Tensor& rows) {
  const int64_t n = x.size(0), d = x.size(1), W = kernels<P>().panel;
  STD_TORCH_CHECK(x.stride(1) == 1 || d == 1, "rows of the features must be contiguous");
  STD_TORCH_CHECK(Precision<P>::kPair == 1 || x.scalar_type() == ScalarType::BFloat16, "the features must be bfloat16");
  return {{x.data_ptr(), element_of(x), n, d, x.stride(0)},
          normalize,
          data<Real<P>>(length, n, "length"),
          rows.numel() ? data<Stored<P>>(rows, n * padded(d, W), "rows") : nullptr,
          nullptr,
          factor.numel() ? data<Real<P>>(factor, padded(n, W), "factor") : nullptr};
}

void pack(Tensor x, Tensor y, bool normalize, Tensor x_length, Tensor x_factor, Tensor x_rows, Tensor y_length,
          Tensor y_factor, Tensor y_rows, Tensor y_columns) {
  with_precision(x_rows, [&](auto precision) {
    typedef decltype(precision) P;
    const Pack<P> of_x = pack_rows<P>(x, normalize, x_length, x_factor, x_rows);
    Pack<P> of_y = pack_rows<P>(y, normalize, y_length, y_factor, y_rows);
    const int64_t columns = padded(y.size(0), kernels<P>().panel) * padded(y.size(1), Precision<P>::kPair);
    if (y_columns.numel()) of_y.columns = data<Stored<P>>(y_columns, columns, "y_columns");
    kernels<P>().pack(of_x, of_y, for_elements(x.numel() + y.numel()));
  });
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

// Whether a fixed shift lost nothing: backends/shift.py's needs_exact_path, without five passes over the sums.
template <class T>
bool in_range(const T* sum, int64_t count) {
  return std::all_of(sum, sum + count, [](T s) { return s >= T(1e-25) && s <= std::numeric_limits<T>::max(); });
}

// True if every sum is in the range where a fixed shift loses nothing.
bool sums(Tensor x_rows, Tensor y_columns, Tensor x_factor, Tensor y_factor, int64_t n, int64_t m, int64_t d,
          double scale, Tensor positive, Tensor row_ids, Tensor col_ids, Tensor row_limit, Tensor col_limit,
          Tensor row_shift, Tensor col_shift, Tensor row_partial, Tensor col_partial, Tensor dots, Tensor row_sum,
          Tensor col_sum, Tensor pos) {
  bool lost_nothing = false;
  with_precision(x_rows, [&](auto precision) {
    typedef decltype(precision) P;
    typedef Real<P> T;
    Sums<P> p = {similarity<P>(x_rows, y_columns, x_factor, y_factor, n, m, d, scale),
                 dots.numel() ? data<T>(dots, n * padded(m, kernels<P>().panel), "dots") : nullptr,
                 row_groups(n),
                 col_groups(m),
                 nullptr,
                 nullptr,
                 data<T>(row_sum, n, "row_sum"),
                 data<T>(col_sum, m, "col_sum"),
                 data<T>(pos, n, "pos")};
    set_positive(p.S, positive);
    set_mask(p.S, row_ids, col_ids, row_limit, col_limit);
    set_shifts(p.S, row_shift, col_shift);
    p.row_partial = data<double>(row_partial, p.col_groups * n, "row_partial");
    p.col_partial = data<double>(col_partial, p.row_groups * m, "col_partial");
    kernels<P>().sums(p, parallel_for);
    lost_nothing = in_range(p.row_sum, n) && in_range(p.col_sum, m);
  });
  return lost_nothing;
}

void maxima(Tensor x_rows, Tensor y_columns, Tensor x_factor, Tensor y_factor, int64_t n, int64_t m, int64_t d,
            double scale, Tensor positive, Tensor row_ids, Tensor col_ids, Tensor row_limit, Tensor col_limit,
            Tensor row_partial, Tensor col_partial, Tensor row_max, Tensor col_max) {
  with_precision(x_rows, [&](auto precision) {
    typedef decltype(precision) P;
    typedef Real<P> T;
    Maxima<P> p = {similarity<P>(x_rows, y_columns, x_factor, y_factor, n, m, d, scale),
                   row_groups(n),
                   col_groups(m),
                   nullptr,
                   nullptr,
                   data<T>(row_max, n, "row_max"),
                   data<T>(col_max, m, "col_max")};
    set_positive(p.S, positive);
    set_mask(p.S, row_ids, col_ids, row_limit, col_limit);
    p.row_partial = data<T>(row_partial, p.col_groups * n, "row_partial");
    p.col_partial = data<T>(col_partial, p.row_groups * m, "col_partial");
    kernels<P>().maxima(p, parallel_for);
  });
}

void pair_scores(Tensor x_rows, Tensor y_columns, Tensor x_factor, Tensor y_factor, int64_t n, int64_t m, int64_t d,
                 double scale, Tensor rows, Tensor cols, Tensor out) {
  with_type(x_rows, [&](auto zero) {
    typedef decltype(zero) T;
    const int64_t count = rows.numel();
    const int64_t *i = data<int64_t>(rows, count, "rows"), *j = data<int64_t>(cols, count, "cols");
    const auto inside = [](int64_t limit) { return [limit](int64_t at) { return at >= 0 && at < limit; }; };
    STD_TORCH_CHECK(std::all_of(i, i + count, inside(n)) && std::all_of(j, j + count, inside(m)),
                    "pairs must lie in the ", n, " x ", m, " similarity matrix");
    kernels<T>().pair_scores(similarity<T>(x_rows, y_columns, x_factor, y_factor, n, m, d, scale), i, j, count,
                             data<T>(out, count, "out"), parallel_for);
  });
}

void ranks(Tensor x_rows, Tensor y_columns, Tensor x_factor, Tensor y_factor, int64_t n, int64_t m, int64_t d,
           double scale, Tensor row_threshold, Tensor col_threshold, Tensor row_partial, Tensor col_partial,
           Tensor row_rank, Tensor col_rank) {
  with_type(x_rows, [&](auto zero) {
    typedef decltype(zero) T;
    Ranks<T> p = {similarity<T>(x_rows, y_columns, x_factor, y_factor, n, m, d, scale),
                  row_groups(n),
                  col_groups(m),
                  data<T>(row_threshold, n, "row_threshold"),
                  data<T>(col_threshold, m, "col_threshold"),
                  nullptr,
                  nullptr,
                  data<int64_t>(row_rank, n, "row_rank"),
                  data<int64_t>(col_rank, m, "col_rank")};
    p.row_partial = data<int64_t>(row_partial, p.col_groups * n, "row_partial");
    p.col_partial = data<int64_t>(col_partial, p.row_groups * m, "col_partial");
    kernels<T>().ranks(p, parallel_for);
  });
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

void gradients(Tensor x_rows, Tensor y_columns, Tensor x_factor, Tensor y_factor, int64_t n, int64_t m, int64_t d,
               double scale, Tensor positive, Tensor row_ids, Tensor col_ids, Tensor row_limit, Tensor col_limit,
               Tensor row_shift, Tensor col_shift, Tensor dots, Tensor x_values, Tensor y_values, int64_t width,
               Tensor grad_row_sum, Tensor grad_col_sum, Tensor grad_pos, Tensor wave, Tensor x_pairs, Tensor y_wave,
               Tensor positive_g, Tensor dx, Tensor dy, Tensor slope) {
  with_precision(x_rows, [&](auto precision) {
    typedef decltype(precision) P;
    typedef Real<P> T;
    const int64_t W = kernels<P>().panel, stride = padded(width, W);
    Gradients<P> p = {similarity<P>(x_rows, y_columns, x_factor, y_factor, n, m, d, scale),
                      dots.numel() ? data<T>(dots, n * padded(m, W), "dots") : nullptr,
                      data<Stored<P>>(x_values, dy.numel() ? n * stride : 0, "x_values"),
                      y_values.numel() ? data<Stored<P>>(y_values, m * stride, "y_values") : nullptr,
                      width,
                      data<T>(grad_row_sum, n, "grad_row_sum"),
                      data<T>(grad_col_sum, m, "grad_col_sum"),
                      data<T>(grad_pos, n, "grad_pos"),
                      data<T>(wave, wave_elements(n, m), "wave"),
                      nullptr,
                      nullptr,
                      nullptr,
                      dx.numel() ? data<T>(dx, n * stride, "dx") : nullptr,
                      dy.numel() ? data<T>(dy, m * stride, "dy") : nullptr,
                      slope.numel() ? data<double>(slope, 1 + kWave * kWave, "slope") : nullptr};
    set_positive(p.S, positive);
    set_mask(p.S, row_ids, col_ids, row_limit, col_limit);
    set_shifts(p.S, row_shift, col_shift);
    set_room(p, p.dx && !p.Y, x_pairs, y_wave, positive_g);
    kernels<P>().gradients(p, parallel_for);
  });
}

void sigmoid(Tensor x_rows, Tensor y_columns, Tensor x_factor, Tensor y_factor, int64_t n, int64_t m, int64_t d,
             double scale, Tensor positive, Tensor row_ids, Tensor col_ids, bool match_is_positive, double bias,
             Tensor row_weight, Tensor wave, Tensor x_pairs, Tensor y_wave, Tensor partial, Tensor row_loss,
             Tensor row_slope, Tensor row_by_dot, Tensor positive_g, Tensor dx, Tensor dy) {
  with_precision(x_rows, [&](auto precision) {
    typedef decltype(precision) P;
    typedef Real<P> T;
    const int64_t width = padded(d, kernels<P>().panel);
    Sigmoid<P> p = {similarity<P>(x_rows, y_columns, x_factor, y_factor, n, m, d, scale),
                    T(bias),
                    match_is_positive,
                    data<T>(row_weight, n, "row_weight"),
                    data<T>(wave, wave_elements(n, m), "wave"),
                    nullptr,
                    nullptr,
                    data<double>(partial, 3 * kWave * n, "partial"),
                    data<double>(row_loss, n, "row_loss"),
                    data<double>(row_slope, n, "row_slope"),
                    data<double>(row_by_dot, n, "row_by_dot"),
                    nullptr,
                    dx.numel() ? data<T>(dx, n * width, "dx") : nullptr,
                    dy.numel() ? data<T>(dy, m * width, "dy") : nullptr};
    set_positive(p.S, positive);
    set_room(p, p.dx, x_pairs, y_wave, positive_g);
    if (row_ids.numel())
      p.S.mask = {data<int64_t>(row_ids, n, "row_ids"), data<int64_t>(col_ids, m, "col_ids"), nullptr, nullptr};
    kernels<P>().sigmoid(p, parallel_for);
  });
}

template <class T>
Finish<T> finish_side(const Tensor& x, const Tensor& dx, const Tensor& factor, double scale, bool normalize,
                      const Tensor& grad, const Tensor& inner) {
  if (!dx.numel()) return {};
  const int64_t n = x.size(0), d = x.size(1);
  return {{x.data_ptr(), element_of(x), n, d, x.stride(0)},
          normalize,
          data<T>(dx, n * padded(d, kernels<T>().panel), "dx"),
          factor.numel() ? data<T>(factor, n, "factor") : nullptr,
          T(scale),
          grad.numel() ? data<char>(grad, n * d, "grad") : nullptr,
          data<double>(inner, n, "inner")};
}

// A side with an empty dx is left out.
void finish(double scale, bool normalize, Tensor x, Tensor dx, Tensor x_factor, Tensor grad_x, Tensor x_inner, Tensor y,
            Tensor dy, Tensor y_factor, Tensor grad_y, Tensor y_inner) {
  with_type(dx, [&](auto zero) {
    typedef decltype(zero) T;
    const auto of_x = finish_side<T>(x, dx, x_factor, scale, normalize, grad_x, x_inner);
    const auto of_y = finish_side<T>(y, dy, y_factor, scale, normalize, grad_y, y_inner);
    kernels<T>().finish(of_x, of_y, for_elements((of_x.x.rows + of_y.x.rows) * x.size(1)));
  });
}

}  // namespace
}  // namespace fastclip

STABLE_TORCH_LIBRARY(fastclip_cpu, m) {
  m.def("isa() -> str");
  m.def("panel(bool is_double) -> int");
  m.def("has_bf16_dot() -> bool");
  m.def("wave_elements(int n, int m) -> int");
  m.def("y_wave_elements(int m, int d, bool is_double) -> int");
  m.def(
      "pack(Tensor x, Tensor y, bool normalize, Tensor(a!) x_length, Tensor(b!) x_factor, Tensor(c!) x_rows,"
      " Tensor(d!) y_length, Tensor(e!) y_factor, Tensor(f!) y_rows, Tensor(g!) y_columns) -> ()");
  m.def(
      "sums(Tensor x_rows, Tensor y_columns, Tensor x_factor, Tensor y_factor, int n, int m, int d, float scale, "
      "Tensor positive, Tensor row_ids,"
      " Tensor col_ids, Tensor row_limit, Tensor col_limit, Tensor row_shift,"
      " Tensor col_shift, Tensor(a!) row_partial, Tensor(b!) col_partial, Tensor(c!) dots, Tensor(d!) row_sum,"
      " Tensor(e!) col_sum, Tensor(f!) pos) -> bool");
  m.def(
      "maxima(Tensor x_rows, Tensor y_columns, Tensor x_factor, Tensor y_factor, int n, int m, int d, float scale, "
      "Tensor positive, Tensor row_ids,"
      " Tensor col_ids, Tensor row_limit, Tensor col_limit,"
      " Tensor(a!) row_partial, Tensor(b!) col_partial, Tensor(c!) row_max, Tensor(d!) col_max) -> ()");
  m.def(
      "pair_scores(Tensor x_rows, Tensor y_columns, Tensor x_factor, Tensor y_factor, int n, int m, int d, float "
      "scale, Tensor rows, Tensor cols,"
      " Tensor(a!) out) -> ()");
  m.def(
      "ranks(Tensor x_rows, Tensor y_columns, Tensor x_factor, Tensor y_factor, int n, int m, int d, float scale, "
      "Tensor row_threshold,"
      " Tensor col_threshold, Tensor(a!) row_partial, Tensor(b!) col_partial, Tensor(c!) row_rank,"
      " Tensor(d!) col_rank) -> ()");
  m.def(
      "gradients(Tensor x_rows, Tensor y_columns, Tensor x_factor, Tensor y_factor, int n, int m, int d, float scale, "
      "Tensor positive, Tensor row_ids,"
      " Tensor col_ids, Tensor row_limit, Tensor col_limit, Tensor row_shift,"
      " Tensor col_shift, Tensor dots, Tensor x_values, Tensor y_values, int width, Tensor grad_row_sum, Tensor "
      "grad_col_sum,"
      " Tensor grad_pos, Tensor(a!) wave, Tensor(b!) x_pairs, Tensor(c!) y_wave, Tensor(d!) positive_g, Tensor(e!) dx,"
      " Tensor(f!) dy, Tensor(g!) slope) -> ()");
  m.def(
      "sigmoid(Tensor x_rows, Tensor y_columns, Tensor x_factor, Tensor y_factor, int n, int m, int d, float scale, "
      "Tensor positive, Tensor row_ids,"
      " Tensor col_ids, bool match_is_positive, float bias, Tensor row_weight, Tensor(a!) wave,"
      " Tensor(b!) x_pairs, Tensor(c!) y_wave, Tensor(d!) partial, Tensor(e!) row_loss, Tensor(f!) row_slope,"
      " Tensor(g!) row_by_dot, Tensor(h!) positive_g, Tensor(i!) dx, Tensor(j!) dy) -> ()");
  m.def(
      "finish(float scale, bool normalize, Tensor x, Tensor(a!) dx, Tensor x_factor, Tensor(b!) grad_x,"
      " Tensor(c!) x_inner, Tensor y, Tensor(d!) dy, Tensor y_factor, Tensor(e!) grad_y, Tensor(f!) y_inner) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastclip_cpu, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&fastclip::isa_name));
  m.impl("has_bf16_dot", TORCH_BOX(&fastclip::has_bf16_dot));
  m.impl("panel", TORCH_BOX(&fastclip::panel));
  m.impl("wave_elements", TORCH_BOX(&fastclip::wave_elements));
  m.impl("y_wave_elements", TORCH_BOX(&fastclip::y_wave_elements));
}

STABLE_TORCH_LIBRARY_IMPL(fastclip_cpu, CPU, m) {
  m.impl("pack", TORCH_BOX(&fastclip::pack));
  m.impl("sums", TORCH_BOX(&fastclip::sums));
  m.impl("maxima", TORCH_BOX(&fastclip::maxima));
  m.impl("pair_scores", TORCH_BOX(&fastclip::pair_scores));
  m.impl("ranks", TORCH_BOX(&fastclip::ranks));
  m.impl("gradients", TORCH_BOX(&fastclip::gradients));
  m.impl("sigmoid", TORCH_BOX(&fastclip::sigmoid));
  m.impl("finish", TORCH_BOX(&fastclip::finish));
}
