// The CLIP loss of a batch whose similarities fit in the caches: value and gradients in one call, x^ y^T made once.
//
// The kernels are the operators' own. What PyTorch does between them for a large batch, O(N) of it (math.md, eq. 3, 4
// and 6), is a loop here: the many small steps of a graph would take longer than the kernels.
#pragma once
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

// Scratch of one ClipLoss; the names are those of the problems (problem.h) that it is carved out for.
template <class P>
struct ClipScratch {
  typedef Real<P> T;
  int64_t n, width, row_groups, col_groups;
  T *x_length, *y_length, *x_factor, *y_factor;
  Stored<P>*x_rows, *y_columns, *x_pairs, *y_wave;
  T *dots, *wave, *dx, *dy;
  int64_t* positive;
  T *row_shift, *col_shift, *row_sum, *col_sum, *pos, *a, *b, *d, *positive_g;
  double *row_partial, *col_partial, *x_inner, *y_inner, *slope;

  ClipScratch(Carver& room, int64_t rows, int64_t D, bool normalize) {
    const int64_t W = kernels<P>().panel;
    constexpr int64_t kPair = Precision<P>::kPair;
    const bool apart = kPair > 1;
    n = rows, width = padded(D, W), row_groups = fastclip::row_groups(n), col_groups = fastclip::col_groups(n);
    x_length = room.take<T>(n), y_length = room.take<T>(n);
    x_factor = apart && normalize ? room.take<T>(padded(n, W)) : nullptr;
    y_factor = apart && normalize ? room.take<T>(padded(n, W)) : nullptr;
    x_rows = room.take<Stored<P>>(n * width), y_columns = room.take<Stored<P>>(padded(n, W) * padded(D, kPair));
    x_pairs = apart ? room.take<Stored<P>>(padded(n, 2) * width) : nullptr;
    y_wave = room.take<Stored<P>>(y_wave_elements(n, D, sizeof(T) == 8));
    dots = room.take<T>(n * padded(n, W)), wave = room.take<T>(wave_elements(n, n));
    dx = room.take<T>(n * width), dy = room.take<T>(n * width);
    positive = room.take<int64_t>(n);
    for (T** vector : {&row_shift, &col_shift, &row_sum, &col_sum, &pos, &a, &b, &d}) *vector = room.take<T>(n);
    positive_g = apart ? room.take<T>(n) : nullptr;
    row_partial = room.take<double>(col_groups * n), col_partial = room.take<double>(row_groups * n);
    x_inner = room.take<double>(n), y_inner = room.take<double>(n);
    slope = apart ? room.take<double>(1 + kWave * kWave) : nullptr;
  }
};

// The sums of eq. 2, with a shift of their own for each row and column where one shift would lose something.
template <class P>
void sums_of(Similarity<P>& S, const ClipScratch<P>& room, double largest) {
  typedef Real<P> T;
  Sums<P> p = {S,           room.dots,        room.row_groups, room.col_groups, room.row_partial,
               room.col_partial, room.row_sum, room.col_sum,    room.pos};
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

// Returns the loss; writes the gradients of it that are asked for: grad_x and grad_y as finish's `grad`, null where
// not wanted.
template <class P>
double loss_and_gradients(const ClipLoss<P>& loss, const ClipScratch<P>& room, Finish<Real<P>> x, Finish<Real<P>> y,
                 Real<P>* grad_scale) {
  typedef Real<P> T;
  const int64_t n = room.n, D = loss.x.width;
  const Pack<P> of_x = {loss.x, loss.normalize, room.x_length, room.x_rows, nullptr, room.x_factor};
  const Pack<P> of_y = {loss.y, loss.normalize, room.y_length, nullptr, room.y_columns, room.y_factor};
  kernels<P>().pack(of_x, of_y, for_elements(2 * n * D));
  for (int64_t i = 0; i < n; ++i) room.positive[i] = i;

  Similarity<P> S = {n, n, D, room.x_rows, room.y_columns, room.x_factor, room.y_factor, T(loss.scale), room.positive,
                     nullptr, nullptr, true, {}};
  const auto largest = [&](const T* length) {
    T found = length[0];
    for (int64_t i = 1; i < n; ++i) found = length[i] <= found ? found : length[i];  // NaN stays
    return double(found);
  };
  sums_of(S, room, loss.normalize ? 1.0 : largest(room.x_length) * largest(room.y_length));
  const double value = weigh_pairs(loss, room);

  const bool wants_dx = x.grad || grad_scale, wants_dy = y.grad;
  if (!wants_dx && !wants_dy) return value;
  if (room.slope) room.slope[0] = 0.0;
  const Gradients<P> gradients = {S,
                                  room.dots,
                                  room.x_rows,
                                  nullptr,
                                  D,
                                  room.a,
                                  room.b,
                                  room.d,
                                  room.wave,
                                  room.x_pairs,
                                  room.y_wave,
                                  room.positive_g,
                                  wants_dx ? x.dx : nullptr,
                                  wants_dy ? y.dx : nullptr,
                                  room.slope};
  kernels<P>().gradients(gradients, parallel_for);
  if (!grad_scale || room.slope) x.inner = nullptr;
  y.inner = nullptr;
  if (!wants_dx) x = {};
  if (!wants_dy) y = {};
  kernels<P>().finish(x, y, for_elements((x.x.rows + y.x.rows) * D));
  if (grad_scale) {
    double slope = room.slope ? room.slope[0] : 0.0;
    for (int64_t i = 0; !room.slope && i < n; ++i) slope += x.inner[i];
    *grad_scale = T(slope);
  }
  return value;
}

}  // namespace
}  // namespace fastclip
