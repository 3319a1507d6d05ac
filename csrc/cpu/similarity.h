// The one loop over S that every kernel here shares: a panel [block rows, kPanel] of x y^T at a time, in L1/L2.
//
// It never holds more of S than one such panel a thread.
#pragma once
#include "convert.h"
#include "problem.h"
#include "simd.h"

namespace fastclip {
namespace FC_ISA {

static FC_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static FC_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// So much of D at a time: this stretch of y's panel stays in L1 while the block's rows pass by.
template <class P>
constexpr int64_t kDepth = 128 * Precision<P>::kPair;

// out [R][kPanel] (+)= a stretch of R rows of x^ times a stretch of y^'s panel. Each stretch is summed apart, which
// also keeps the rounding error of long products down.
template <class P, int R>
static FC_INLINE void dot_stretch(const Stored<P>* x, int64_t rows, const Stored<P>* y, int64_t depth, bool is_first,
                                  Real<P>* out) {
  typedef Simd<Real<P>> L;
  typename L::V acc[R][kVectorsPerPanel] = {};
  multiply<P, R>(WalkRows{}, x, rows, y, depth, acc);
  FC_UNROLL
  for (int i = 0; i < R; ++i) {
    FC_UNROLL
    for (int v = 0; v < kVectorsPerPanel; ++v) {
      Real<P>* p = out + i * L::kPanel + v * L::kLanes;
      L::store(p, is_first ? acc[i][v] : L::load(p) + acc[i][v]);
    }
  }
}

// What the products of row i and the columns from j have yet to be multiplied by.
template <class P>
static FC_INLINE typename Simd<Real<P>>::V factor_of(const Similarity<P>& S, int64_t i, int64_t j) {
  typedef Simd<Real<P>> L;
  return S.x_factor ? L::load(S.y_factor + j) * S.x_factor[i] : L::fill(Real<P>(1));
}

// panel [rows][kPanel], rows i0.. and columns j0.. of S, times their factors.
template <class P>
static FC_INLINE void apply_factors(const Similarity<P>& S, int64_t i0, int64_t rows, int64_t j0, Real<P>* panel) {
  typedef Simd<Real<P>> L;
  if (!S.x_factor) return;
  for (int64_t r = 0; r < rows; ++r) {
    for (int v = 0; v < kVectorsPerPanel; ++v) {
      Real<P>* p = panel + r * L::kPanel + v * L::kLanes;
      L::store(p, L::load(p) * factor_of(S, i0 + r, j0 + v * L::kLanes));
    }
  }
}

// out [rows][kPanel] = x^ y^T (not yet scaled) for one block of x rows and one panel of y columns.
template <class P>
static void dot_panel(const Similarity<P>& S, int64_t block, int64_t panel, Real<P>* out) {
  constexpr int64_t W = Simd<Real<P>>::kPanel;
  const int64_t i0 = block * kBlock, rows = smaller(kBlock, S.N - i0), depth = whole_pairs<P>(S.D);
  const Stored<P>* x = S.x_rows + i0 * (ceil_div(S.D, W) * W);
  const Stored<P>* y = S.y_columns + panel * W * depth;
  for (int64_t k = 0; k < depth; k += kDepth<P>) {
    for_row_tiles(rows, [&](int64_t r, auto count) {
      constexpr int R = decltype(count)::value;
      dot_stretch<P, R>(x + k * rows + r * W, rows, y + k * W, smaller(kDepth<P>, depth - k), k == 0, out + r * W);
    });
  }
  apply_factors(S, i0, rows, panel * W, out);
}

// Where the kept products of a block and panel begin: [block rows][kPanel] (problem.h, Sums).
template <class P>
static FC_INLINE int64_t panel_index(const Similarity<P>& S, int64_t block, int64_t panel) {
  constexpr int64_t W = Simd<Real<P>>::kPanel;
  const int64_t i0 = block * kBlock, rows = smaller(kBlock, S.N - i0);
  return i0 * ceil_div(S.M, W) * W + panel * rows * W;
}

// Where row i's positive lies in the panel that starts at column j0; outside [0, kPanel) if elsewhere.
template <class P>
static FC_INLINE uint64_t positive_lane(const Similarity<P>& S, int64_t i, int64_t j0) {
  return uint64_t(S.positive[i] - j0);
}

// Zeroes the weights of row i that count for no negative: masked pairs (by_row and by_col apart), the row's positive
// and the columns beyond M. dots [kPanel]: the row's x^ y^T.
template <class P>
static FC_INLINE void drop_non_negatives(const Similarity<P>& S, int64_t i, int64_t j0, const Real<P>* dots,
                                         Real<P>* by_row, Real<P>* by_col) {
  typedef Real<P> T;
  constexpr int W = Simd<Real<P>>::kPanel;
  const int64_t cols = smaller(W, S.M - j0);
  if (S.mask.row_ids) {
    const int64_t id = S.mask.row_ids[i], *ids = S.mask.col_ids + j0;
    const T row_limit = S.mask.row_limit[i], *col_limit = S.mask.col_limit + j0;
    for (int64_t j = 0; j < cols; ++j) {
      const T s = dots[j] * S.scale;
      by_row[j] = ids[j] == id || s > row_limit ? T(0) : by_row[j];
      by_col[j] = ids[j] == id || s > col_limit[j] ? T(0) : by_col[j];
    }
  }
  const uint64_t lane = positive_lane(S, i, j0);
  if (lane < uint64_t(W)) by_row[lane] = by_col[lane] = T(0);
  for (int64_t j = cols; j < W; ++j) by_row[j] = by_col[j] = T(0);
}

// One task = one group of row blocks x one group of column panels, the same for any number of threads.
struct Task {
  int64_t row_group, col_group, first_block, last_block, first_panel, last_panel;
};

template <class P>
static FC_INLINE Task task_of(const Similarity<P>& S, int64_t index, int64_t row_groups, int64_t col_groups) {
  const int64_t blocks = ceil_div(S.N, kBlock), panels = ceil_div(S.M, Simd<Real<P>>::kPanel);
  const int64_t r = index % row_groups, c = index / row_groups;
  return {r,
          c,
          blocks * r / row_groups,
          blocks * (r + 1) / row_groups,
          panels * c / col_groups,
          panels * (c + 1) / col_groups};
}

template <class T>
static FC_INLINE T sum_of_lanes(typename Simd<T>::V v) {
  T total = 0;
  for (int l = 0; l < Simd<T>::kLanes; ++l) total += v[l];
  return total;
}

}  // namespace FC_ISA
}  // namespace fastclip
