// The CPU kernels as PyTorch operators (namespace fastclip_cpu), for fastclip/backends/cpu.py to call.
//
// LibTorch's stable ABI: one binary serves torch 2.10 and newer. Every buffer is allocated in Python; an operator
// checks it, fills in its problem (arguments.h) and runs the kernels.
#if defined(__linux__)
#include <sys/mman.h>
#endif
#include <torch/csrc/stable/library.h>

#include "arguments.h"
#include "clip_loss.h"
#include "shift.h"

namespace fastclip {
namespace {

// Asks for pages of 2 MiB under a buffer that was not touched yet: making them takes a fifth of the time.
void expect_large_pages(Tensor buffer) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t first = reinterpret_cast<uintptr_t>(buffer.data_ptr());
  const uintptr_t begin = (first + kPage - 1) / kPage * kPage;
  const uintptr_t end = (first + buffer.numel() * buffer.element_size()) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

void pack(Tensor x, Tensor y, bool normalize, Tensor x_length, Tensor x_factor, Tensor x_rows, Tensor y_length,
          Tensor y_factor, Tensor y_rows, Tensor y_columns) {
  STD_TORCH_CHECK(y.scalar_type() == x.scalar_type(), "x and y must have the same dtype");
  with_precision(x_rows, [&](auto precision) {
    typedef decltype(precision) P;
    const Pack<P> of_x = pack_rows<P>(x, normalize, x_length, x_factor, x_rows);
    Pack<P> of_y = pack_rows<P>(y, normalize, y_length, y_factor, y_rows);
    const int64_t columns = padded(y.size(0), kernels<P>().panel) * padded(y.size(1), Precision<P>::kPair);
    if (y_columns.numel()) of_y.columns = data<Stored<P>>(y_columns, columns, "y_columns");
    kernels<P>().pack(of_x, of_y, for_elements(x.numel() + y.numel()));
  });
}

// True if every sum is in the range where a fixed shift loses nothing.
bool sums(Tensor x_rows, Tensor y_columns, Tensor x_factor, Tensor y_factor, int64_t n, int64_t m, int64_t d,
          double scale, Tensor positive, Tensor row_ids, Tensor col_ids, Tensor row_limit, Tensor col_limit,
          Tensor row_shift, Tensor col_shift, Tensor row_partial, Tensor col_partial, Tensor row_sum, Tensor col_sum,
          Tensor pos) {
  bool lost_nothing = false;
  with_precision(x_rows, [&](auto precision) {
    typedef decltype(precision) P;
    typedef Real<P> T;
    Sums<P> p = {similarity<P>(x_rows, y_columns, x_factor, y_factor, n, m, d, scale),
                 nullptr,
                 0,
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

void gradients(Tensor x_rows, Tensor y_columns, Tensor x_factor, Tensor y_factor, int64_t n, int64_t m, int64_t d,
               double scale, Tensor positive, Tensor row_ids, Tensor col_ids, Tensor row_limit, Tensor col_limit,
               Tensor row_shift, Tensor col_shift, Tensor x_values, Tensor y_values, int64_t width, Tensor grad_row_sum,
               Tensor grad_col_sum, Tensor grad_pos, Tensor wave, Tensor x_pairs, Tensor y_wave, Tensor positive_g,
               Tensor dx, Tensor dy, Tensor slope) {
  with_precision(x_rows, [&](auto precision) {
    typedef decltype(precision) P;
    typedef Real<P> T;
    const int64_t W = kernels<P>().panel, stride = padded(width, W);
    Gradients<P> p = {similarity<P>(x_rows, y_columns, x_factor, y_factor, n, m, d, scale),
                      nullptr,
                      0,
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

// An empty gradient is not wanted. One in the type that sums are made in, and without padding, is summed in place.
template <class P>
ClipWants wants(int64_t d, int64_t kept_rows, const Tensor& grad_x, const Tensor& grad_y, const Tensor& grad_scale) {
  const auto in_place = [d](const Tensor& grad) {
    const Element element = element_of(grad);
    return grad.numel() && element != Element::bf16 && element != Element::f16 && d % kernels<P>().panel == 0;
  };
  const bool dx = grad_x.numel() || grad_scale.numel(), dy = grad_y.numel();
  return {dx, dy, dx && !in_place(grad_x), dy && !in_place(grad_y), kept_rows};
}

int64_t clip_loss_bytes(Tensor x, bool normalize, int64_t kept_rows, Tensor grad_x, Tensor grad_y, Tensor grad_scale) {
  Carver room;
  with_precision_of(x, [&](auto precision) {
    typedef decltype(precision) P;
    const ClipWants want = wants<P>(x.size(1), kept_rows, grad_x, grad_y, grad_scale);
    ClipScratch<P>(room, x.size(0), x.size(1), normalize, want);
  });
  return room.bytes();
}

// One side of the loss for its gradient: grad, or with an empty one only <x^, dx>.
template <class P>
Finish<Real<P>> clip_side(const Tensor& x, const Tensor& grad, Real<P>* scratch, const Real<P>* factor, double scale,
                          bool normalize, double* inner) {
  typedef Real<P> T;
  T* out = grad.numel() ? static_cast<T*>(grad.data_ptr()) : nullptr;
  STD_TORCH_CHECK(!out || (grad.numel() == x.numel() && grad.is_contiguous()), "a gradient must have the shape of x");
  const bool is_wide = out && grad.scalar_type() != x.scalar_type();
  return {features(x), normalize, scratch ? scratch : out, factor, T(scale), out, is_wide, inner};
}

// An empty weight is 1 for every pair.
void clip_loss(Tensor x, Tensor y, double scale, Tensor weight, bool mean, bool normalize, int64_t kept_rows,
               Tensor scratch, Tensor loss, Tensor grad_x, Tensor grad_y, Tensor grad_scale) {
  const int64_t n = x.size(0), d = x.size(1);
  STD_TORCH_CHECK(y.size(0) == n && y.size(1) == d && y.scalar_type() == x.scalar_type(),
                  "x and y must have the same shape and dtype");
  const int64_t bytes = clip_loss_bytes(x, normalize, kept_rows, grad_x, grad_y, grad_scale);
  Carver room(data<uint8_t>(scratch, bytes, "scratch"));
  with_precision_of(x, [&](auto precision) {
    typedef decltype(precision) P;
    typedef Real<P> T;
    const ClipWants want = wants<P>(d, kept_rows, grad_x, grad_y, grad_scale);
    const ClipScratch<P> s(room, n, d, normalize, want);
    const ClipLoss<P> p = {
        features(x), features(y), normalize, scale, weight.numel() ? data<T>(weight, n, "weight") : nullptr, mean};
    T* slope = grad_scale.numel() ? data<T>(grad_scale, 1, "grad_scale") : nullptr;
    Finish<T> of_x = {}, of_y = {};
    if (want.dx) of_x = clip_side<P>(x, grad_x, s.dx, s.x_factor, scale, normalize, slope ? s.inner : nullptr);
    if (want.dy) of_y = clip_side<P>(y, grad_y, s.dy, s.y_factor, scale, normalize, nullptr);
    *data<T>(loss, 1, "loss") = T(loss_and_gradients(p, s, of_x, of_y, slope));
  });
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
  m.def("expect_large_pages(Tensor(a!) buffer) -> ()");
  m.def(
      "clip_loss_bytes(Tensor x, bool normalize, int kept_rows, Tensor grad_x, Tensor grad_y, Tensor grad_scale) -> "
      "int");
  m.def(
      "clip_loss(Tensor x, Tensor y, float scale, Tensor weight, bool mean, bool normalize, int kept_rows,"
      " Tensor(a!) scratch, Tensor(b!) loss, Tensor(c!) grad_x, Tensor(d!) grad_y, Tensor(e!) grad_scale) -> ()");
  m.def("wave_elements(int n, int m) -> int");
  m.def("y_wave_elements(int m, int d, bool is_double) -> int");
  m.def(
      "pack(Tensor x, Tensor y, bool normalize, Tensor(a!) x_length, Tensor(b!) x_factor, Tensor(c!) x_rows,"
      " Tensor(d!) y_length, Tensor(e!) y_factor, Tensor(f!) y_rows, Tensor(g!) y_columns) -> ()");
  m.def(
      "sums(Tensor x_rows, Tensor y_columns, Tensor x_factor, Tensor y_factor, int n, int m, int d, float scale, "
      "Tensor positive, Tensor row_ids,"
      " Tensor col_ids, Tensor row_limit, Tensor col_limit, Tensor row_shift,"
      " Tensor col_shift, Tensor(a!) row_partial, Tensor(b!) col_partial, Tensor(c!) row_sum,"
      " Tensor(d!) col_sum, Tensor(e!) pos) -> bool");
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
      " Tensor col_shift, Tensor x_values, Tensor y_values, int width, Tensor grad_row_sum, Tensor "
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
  m.impl("expect_large_pages", TORCH_BOX(&fastclip::expect_large_pages));
  m.impl("clip_loss_bytes", TORCH_BOX(&fastclip::clip_loss_bytes));
  m.impl("clip_loss", TORCH_BOX(&fastclip::clip_loss));
  m.impl("pack", TORCH_BOX(&fastclip::pack));
  m.impl("sums", TORCH_BOX(&fastclip::sums));
  m.impl("maxima", TORCH_BOX(&fastclip::maxima));
  m.impl("pair_scores", TORCH_BOX(&fastclip::pair_scores));
  m.impl("ranks", TORCH_BOX(&fastclip::ranks));
  m.impl("gradients", TORCH_BOX(&fastclip::gradients));
  m.impl("sigmoid", TORCH_BOX(&fastclip::sigmoid));
  m.impl("finish", TORCH_BOX(&fastclip::finish));
}
