// The CLIP loss, value and gradients in one call: what a bounded workspace holds of x^ y^T is made once, the rest
// twice.
//
// The kernels are the operators' own. What PyTorch does between them otherwise, O(N) of it (math.md, eq. 3, 4 and 6),
// is a loop here: for a small batch the many small steps of a graph would take longer than the kernels.
#pragma once
#include <numeric>

#include "arguments.h"
#include "shift.h"

namespace fastclip {
namespace {

// Hands out parts of one buffer, each on a cache line of its own; without a buffer it only counts their bytes.
class Carver {
 public:
  explicit Carver(void* buffer = nullptr) : buffer_(static_cast<char*>(buffer)) {}
  template <class T>
  T* take(int64_t count) {
    T* part = buffer_ ? reinterpret_cast<T*>(buffer_ + bytes_) : nullptr;
    bytes_ += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    return part;
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* buffer_;
  int64_t bytes_ = 0;
};

// x, y: the features, equally many rows. weight [N]: of each pair; null: 1. mean: divide by the weights' sum.
template <class P>
struct ClipLoss {
  Features x, y;
  bool normalize;
  double scale;
  const Real<P>* weight;
  bool mean;
};

// Which gradients are wanted, of x also for the scale's, and which of them are not summed where they will lie.
// kept_rows: of x^ y^T, whole blocks of them.
struct ClipWants {
  bool dx, dy, scratch_dx, scratch_dy;
  int64_t kept_rows;
};

// Scratch of one ClipLoss; the names are those of the problems (problem.h) that it is carved out for.
template <class P>
struct ClipScratch {
  typedef Real<P> T;
  int64_t n, width, kept_blocks, row_groups, col_groups;
  T *x_length, *y_length, *x_factor, *y_factor;
  Stored<P>*x_rows, *y_columns, *x_pairs, *y_wave;
  T *dots, *wave, *dx, *dy;
  int64_t* positive;
  T *row_shift, *col_shift, *row_sum, *col_sum, *pos, *a, *b, *d, *positive_g;
  double *row_partial, *col_partial, *inner, *slope;

  ClipScratch(Carver& room, int64_t rows, int64_t D, bool normalize, const ClipWants& wants) {
    const int64_t W = kernels<P>().panel;
    constexpr int64_t kPair = Precision<P>::kPair;
    const bool apart = kPair > 1, gradients = wants.dx || wants.dy;
    n = rows, width = padded(D, W), row_groups = fastclip::row_groups(n), col_groups = fastclip::col_groups(n);
    x_length = room.take<T>(n), y_length = room.take<T>(n);
    x_factor = apart && normalize ? room.take<T>(padded(n, W)) : nullptr;
    y_factor = apart && normalize ? room.take<T>(padded(n, W)) : nullptr;
    x_rows = room.take<Stored<P>>(n * width), y_columns = room.take<Stored<P>>(padded(n, W) * padded(D, kPair));
    x_pairs = apart && wants.dy ? room.take<Stored<P>>(padded(n, 2) * width) : nullptr;
    y_wave = wants.dx ? room.take<Stored<P>>(y_wave_elements(n, D, sizeof(T) == 8)) : nullptr;
    wave = gradients ? room.take<T>(wave_elements(n, n)) : nullptr;
    dx = wants.scratch_dx ? room.take<T>(n * width) : nullptr;
    dy = wants.scratch_dy ? room.take<T>(n * width) : nullptr;
    kept_blocks = gradients ? (wants.kept_rows < n ? wants.kept_rows : n + kBlock - 1) / kBlock : 0;
    dots = room.take<T>(std::min(n, kept_blocks * kBlock) * padded(n, W));
    positive = room.take<int64_t>(n);
    for (T** vector : {&row_shift, &col_shift, &row_sum, &col_sum, &pos, &a, &b, &d}) *vector = room.take<T>(n);
    positive_g = apart && gradients ? room.take<T>(n) : nullptr;
    row_partial = room.take<double>(col_groups * n), col_partial = room.take<double>(row_groups * n);
    inner = apart ? nullptr : room.take<double>(n);
    slope = apart ? room.take<double>(1 + kWave * kWave) : nullptr;
  }
};

// The sums of eq. 2, with a shift of their own for each row and column where one shift would lose something.
template <class P>
void sums_of(Similarity<P>& S, const ClipScratch<P>& room, double largest) {
  typedef Real<P> T;
  Sums<P> p = {S,
               room.dots,
               room.kept_blocks,
               room.row_groups,
               room.col_groups,
               room.row_partial,
               room.col_partial,
               room.row_sum,
               room.col_sum,
               room.pos};
  const auto run = [&](bool one_shift) {
    S.one_shift = one_shift;
    p.S = S;
    kernels<P>().sums(p, parallel_for);
  };
  S.row_shift = room.row_shift, S.col_shift = room.col_shift;
  const T shift = T(fixed_shift(double(S.scale) * largest, S.N));
  for (T* shifts : {room.row_shift, room.col_shift}) std::fill(shifts, shifts + S.N, shift);
  run(true);
  if (in_range(room.row_sum, S.N) && in_range(room.col_sum, S.M)) return;

  // The partial maxima take the place of the partial sums.
  const Maxima<P> maxima = {S,
                            room.row_groups,
                            room.col_groups,
                            reinterpret_cast<T*>(room.row_partial),
                            reinterpret_cast<T*>(room.col_partial),
                            room.row_shift,
                            room.col_shift};
  kernels<P>().maxima(maxima, parallel_for);
  for (T* shifts : {room.row_shift, room.col_shift}) {
    std::transform(shifts, shifts + S.N, shifts, [](T maximum) { return T(shift_of(double(maximum))); });
  }
  run(false);
}

// softplus(gap) and its derivative, both accurate relative to themselves (math.md, eq. 4).
struct Softplus {
  double value, slope;
  explicit Softplus(double gap) {
    const double e = std::exp(-std::abs(gap));
    value = std::max(gap, 0.0) + std::log1p(e);
    slope = gap > 0.0 ? 1.0 / (1.0 + e) : e / (1.0 + e);
    if (std::isnan(gap)) value = slope = gap;
  }
};

// The loss, and what its gradient asks of the quadratic part: a, b and d of eq. 6.
template <class P>
double weigh_pairs(const ClipLoss<P>& loss, const ClipScratch<P>& room) {
  typedef Real<P> T;
  const auto weight = [&](int64_t i) { return loss.weight ? double(loss.weight[i]) : 1.0; };
  double total = 0.0, divisor = 0.0;
  for (int64_t i = 0; i < room.n; ++i) divisor += weight(i);
  if (!loss.mean) divisor = 1.0;
  for (int64_t i = 0; i < room.n; ++i) {
    const double pos = room.pos[i], half = 0.5 * weight(i) / divisor;
    const Softplus row(std::log(double(room.row_sum[i])) + (double(room.row_shift[i]) - pos));
    const Softplus col(std::log(double(room.col_sum[i])) + (double(room.col_shift[i]) - pos));
    total += half * (row.value + col.value);
    room.a[i] = room.row_sum[i] == T(0) ? T(0) : T(half * row.slope / double(room.row_sum[i]));
    room.b[i] = room.col_sum[i] == T(0) ? T(0) : T(half * col.slope / double(room.col_sum[i]));
    room.d[i] = T(-half * (row.slope + col.slope));
  }
  return total;
}

// The largest length; NaN where there is one.
template <class T>
double largest(const T* length, int64_t count) {
  T found = length[0];
  for (int64_t i = 1; i < count; ++i) found = length[i] <= found || std::isnan(found) ? found : length[i];
  return double(found);
}

// Returns the loss and writes its gradients through `x` and `y`, what the kernels shall finish: those whose dx is null
// are not wanted. grad_scale null: not wanted.
template <class P>
double loss_and_gradients(const ClipLoss<P>& loss, const ClipScratch<P>& room, Finish<Real<P>> x, Finish<Real<P>> y,
                          Real<P>* grad_scale) {
  typedef Real<P> T;
  const int64_t n = room.n, D = loss.x.width;
  const Pack<P> of_x = {loss.x, loss.normalize, room.x_length, room.x_rows, nullptr, room.x_factor};
  const Pack<P> of_y = {loss.y, loss.normalize, room.y_length, nullptr, room.y_columns, room.y_factor};
  kernels<P>().pack(of_x, of_y, for_elements(2 * n * D));
  std::iota(room.positive, room.positive + n, 0);
  Similarity<P> S = {
      n,       n,       D,    room.x_rows, room.y_columns, room.x_factor, room.y_factor, T(loss.scale), room.positive,
      nullptr, nullptr, true, {}};
  sums_of(S, room, loss.normalize ? 1.0 : largest(room.x_length, n) * largest(room.y_length, n));
  const double value = weigh_pairs(loss, room);
  if (!x.dx && !y.dx) return value;

  if (room.slope) room.slope[0] = 0.0;
  const Gradients<P> gradients = {
      S,      room.dots, room.kept_blocks, room.x_rows, nullptr,         D,    room.a, room.b,
      room.d, room.wave, room.x_pairs,     room.y_wave, room.positive_g, x.dx, y.dx,   room.slope};
  kernels<P>().gradients(gradients, parallel_for);
  kernels<P>().finish(x, y, for_elements((x.x.rows + y.x.rows) * D));
  if (grad_scale) *grad_scale = T(room.slope ? room.slope[0] : std::accumulate(x.inner, x.inner + n, 0.0));
  return value;
}

}  // namespace
}  // namespace fastclip
