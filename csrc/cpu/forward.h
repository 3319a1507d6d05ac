// Reads x^ and y^, writes row_sum, col_sum and pos (math.md, eq. 2): one GEMM pass, one exp per entry shared by rows
// and columns. Never holds S: a panel of it lives in L1 while it is summed.
//
// Deterministic: a task sums its own rows and columns in a fixed order into its own slice of the partial sums, which
// are then added in a fixed order, whatever the number of threads.
#pragma once
#include "similarity.h"

namespace fastclip {
namespace FC_ISA {

// Rows of a panel of exponentials, summed in float over at most this many panels before they go to double.
constexpr int64_t kFlush = 16;
// Rows summed into a column's float before that goes to a second one: short sums keep their rounding small.
constexpr int64_t kRun = 16;

template <class P, bool kOneShift>
static void sum_panel(const Sums<P>& p, int64_t i0, int64_t rows, int64_t j0, const Real<P>* dots,
                      Real<P>* row_lanes, double* col_partial) {
  typedef Real<P> T;
  typedef Simd<T> L;
  typedef typename L::V V;
  constexpr int W = L::kPanel, NV = kVectorsPerPanel;
  const Similarity<P>& S = p.S;
  V col[NV] = {}, col_run[NV] = {}, col_shift[NV];
  T tail_shift[W] = {};  // col_shift, with zeros beyond M
  for (int64_t j = 0; j < smaller(W, S.M - j0); ++j) tail_shift[j] = S.col_shift[j0 + j];
  for (int v = 0; v < NV; ++v) col_shift[v] = L::load(tail_shift + v * L::kLanes);
  const bool drop_always = S.mask.row_ids || j0 + W > S.M;

  for (int64_t r = 0; r < rows; ++r) {
    const T* row = dots + r * W;
    V by_row[NV], by_col[NV];
    for (int v = 0; v < NV; ++v) {
      const V s = rounded(L::load(row + v * L::kLanes) * S.scale);
      by_row[v] = exp_minus(s, L::fill(S.row_shift[i0 + r]));
      by_col[v] = kOneShift ? by_row[v] : exp_minus(s, col_shift[v]);
    }
    const uint64_t lane = positive_lane(S, i0 + r, j0);
    if (lane < uint64_t(W)) p.pos[i0 + r] = row[lane] * S.scale;
    if (drop_always || lane < uint64_t(W)) {
      T first[W], second[W];
      for (int v = 0; v < NV; ++v) {
        L::store(first + v * L::kLanes, by_row[v]);
        L::store(second + v * L::kLanes, by_col[v]);
      }
      drop_non_negatives(S, i0 + r, j0, row, first, second);
      for (int v = 0; v < NV; ++v) {
        by_row[v] = L::load(first + v * L::kLanes);
        by_col[v] = L::load(second + v * L::kLanes);
      }
    }
    V panel_total = by_row[0];
    for (int v = 1; v < NV; ++v) panel_total += by_row[v];
    L::store(row_lanes + r * L::kLanes, L::load(row_lanes + r * L::kLanes) + panel_total);
    for (int v = 0; v < NV; ++v) col_run[v] += by_col[v];
    if ((r + 1) % kRun == 0 || r + 1 == rows) {
      for (int v = 0; v < NV; ++v) {
        col[v] += col_run[v];
        col_run[v] = V{};
      }
    }
  }
  for (int v = 0; v < NV; ++v) {
    for (int l = 0; l < L::kLanes; ++l) {
      const int64_t j = j0 + v * L::kLanes + l;
      if (j < S.M) col_partial[j] += double(col[v][l]);
    }
  }
}

template <class P>
static void sum_task(const Sums<P>& p, const Task& t) {
  typedef Real<P> T;
  typedef Simd<T> L;
  constexpr int W = L::kPanel;
  const Similarity<P>& S = p.S;
  double* row_partial = p.row_partial + t.col_group * S.N;
  double* col_partial = p.col_partial + t.row_group * S.M;
  alignas(kVectorBytes) T scratch[kBlock * W];
  alignas(kVectorBytes) T row_lanes[kBlock * L::kLanes];
  for (int64_t j = t.first_panel * W; j < smaller(t.last_panel * W, S.M); ++j) col_partial[j] = 0.0;

  for (int64_t block = t.first_block; block < t.last_block; ++block) {
    const int64_t i0 = block * kBlock, rows = smaller(kBlock, S.N - i0);
    for (int64_t r = 0; r < rows; ++r) row_partial[i0 + r] = 0.0;
    for (int64_t first = t.first_panel; first < t.last_panel; first += kFlush) {
      for (int64_t i = 0; i < rows * L::kLanes; ++i) row_lanes[i] = T(0);
      for (int64_t panel = first; panel < smaller(first + kFlush, t.last_panel); ++panel) {
        T* dots = block < p.kept_blocks ? p.dots + panel_index(S, block, panel) : scratch;
        dot_panel(S, block, panel, dots);
        const auto sum = S.one_shift ? sum_panel<P, true> : sum_panel<P, false>;
        sum(p, i0, rows, panel * W, dots, row_lanes, col_partial);
      }
      for (int64_t r = 0; r < rows; ++r) {
        row_partial[i0 + r] += double(sum_of_lanes<T>(L::load(row_lanes + r * L::kLanes)));
      }
    }
  }
}

template <class P>
static void sums(const Sums<P>& p, ParallelFor run) {
  parallel(run, p.row_groups * p.col_groups,
           [&p](int64_t i) { sum_task(p, task_of(p.S, i, p.row_groups, p.col_groups)); });
  const Similarity<P>& S = p.S;
  for (int64_t i = 0; i < S.N; ++i) {
    double total = 0.0;
    for (int64_t g = 0; g < p.col_groups; ++g) total += p.row_partial[g * S.N + i];
    p.row_sum[i] = Real<P>(total);
  }
  for (int64_t j = 0; j < S.M; ++j) {
    double total = 0.0;
    for (int64_t g = 0; g < p.row_groups; ++g) total += p.col_partial[g * S.M + j];
    p.col_sum[j] = Real<P>(total);
  }
}

template <class P>
static void maxima_task(const Maxima<P>& p, const Task& t) {
  typedef Real<P> T;
  constexpr int W = Simd<T>::kPanel;
  const Similarity<P>& S = p.S;
  const T lowest = -T(__builtin_inf());
  T* row_partial = p.row_partial + t.col_group * S.N;
  T* col_partial = p.col_partial + t.row_group * S.M;
  alignas(kVectorBytes) T dots[kBlock * W];
  for (int64_t j = t.first_panel * W; j < smaller(t.last_panel * W, S.M); ++j) col_partial[j] = lowest;

  for (int64_t block = t.first_block; block < t.last_block; ++block) {
    const int64_t i0 = block * kBlock, rows = smaller(kBlock, S.N - i0);
    for (int64_t r = 0; r < rows; ++r) row_partial[i0 + r] = lowest;
    for (int64_t panel = t.first_panel; panel < t.last_panel; ++panel) {
      const int64_t j0 = panel * W, cols = smaller(W, S.M - j0);
      dot_panel(S, block, panel, dots);
      for (int64_t r = 0; r < rows; ++r) {
        T by_row[W], by_col[W];  // 1 where the pair is a negative
        for (int64_t j = 0; j < W; ++j) by_row[j] = by_col[j] = T(1);
        drop_non_negatives(S, i0 + r, j0, dots + r * W, by_row, by_col);
        for (int64_t j = 0; j < cols; ++j) {
          const T s = dots[r * W + j] * S.scale;
          if (by_row[j] != T(0) && row_partial[i0 + r] < s) row_partial[i0 + r] = s;
          if (by_col[j] != T(0) && col_partial[j0 + j] < s) col_partial[j0 + j] = s;
        }
      }
    }
  }
}

template <class P>
static void maxima(const Maxima<P>& p, ParallelFor run) {
  typedef Real<P> T;
  parallel(run, p.row_groups * p.col_groups,
           [&p](int64_t i) { maxima_task(p, task_of(p.S, i, p.row_groups, p.col_groups)); });
  const Similarity<P>& S = p.S;
  for (int64_t i = 0; i < S.N; ++i) {
    p.row_max[i] = p.row_partial[i];
    for (int64_t g = 1; g < p.col_groups; ++g) {
      const T s = p.row_partial[g * S.N + i];
      p.row_max[i] = p.row_max[i] < s ? s : p.row_max[i];
    }
  }
  for (int64_t j = 0; j < S.M; ++j) {
    p.col_max[j] = p.col_partial[j];
    for (int64_t g = 1; g < p.row_groups; ++g) {
      const T s = p.col_partial[g * S.M + j];
      p.col_max[j] = p.col_max[j] < s ? s : p.col_max[j];
    }
  }
}

}  // namespace FC_ISA
}  // namespace fastclip
