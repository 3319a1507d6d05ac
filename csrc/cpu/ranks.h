// Reads x^ and y^, writes how many entries of each row and column of S are not below a threshold's own score.
// Never holds S. The scores of chosen pairs come from the same instructions in the same order as S itself, so that a
// pair's own entry, and an exact duplicate of it, ties with its threshold to the bit.
#pragma once
#include "similarity.h"

namespace fastclip {
namespace FC_ISA {

// out[n] = S at (rows[n], cols[n])
template <class T>
static void pair_scores(const Similarity<T>& S, const int64_t* rows, const int64_t* cols, int64_t count, T* out,
                        ParallelFor run) {
  constexpr int64_t kPairs = 64;  // pairs a task
  constexpr int W = Simd<T>::kPanel;
  parallel(run, ceil_div(count, kPairs), [&](int64_t task) {
    for (int64_t n = task * kPairs; n < smaller((task + 1) * kPairs, count); ++n) {
      const int64_t i0 = rows[n] / kBlock * kBlock, block_rows = smaller(kBlock, S.N - i0);
      const T* x = S.x_rows + i0 * (ceil_div(S.D, W) * W) + (rows[n] - i0) * W;
      const T* y = S.y_columns + cols[n] / W * W * S.D;
      alignas(kVectorBytes) T dots[W];
      for (int64_t k = 0; k < S.D; k += kDepth<T>) {
        dot_stretch<T, 1>(x + k * block_rows, block_rows, y + k * W, smaller(kDepth<T>, S.D - k), k == 0, dots);
      }
      out[n] = dots[cols[n] % W] * S.scale;
    }
  });
}

template <class T>
static void rank_task(const Ranks<T>& p, const Task& t) {
  typedef Simd<T> L;
  typedef decltype(typename L::V{} <= typename L::V{}) Flags;  // integers, -1 where true
  constexpr int W = L::kPanel, NV = kVectorsPerPanel;
  const Similarity<T>& S = p.S;
  int64_t* row_partial = p.row_partial + t.col_group * S.N;
  int64_t* col_partial = p.col_partial + t.row_group * S.M;
  alignas(kVectorBytes) T dots[kBlock * W];
  for (int64_t j = t.first_panel * W; j < smaller(t.last_panel * W, S.M); ++j) col_partial[j] = 0;

  for (int64_t block = t.first_block; block < t.last_block; ++block) {
    const int64_t i0 = block * kBlock, rows = smaller(kBlock, S.N - i0);
    for (int64_t r = 0; r < rows; ++r) row_partial[i0 + r] = 0;
    for (int64_t panel = t.first_panel; panel < t.last_panel; ++panel) {
      const int64_t j0 = panel * W, cols = smaller(W, S.M - j0);
      dot_panel(S, block, panel, dots);
      Flags valid[NV] = {};
      for (int j = 0; j < W; ++j) valid[j / L::kLanes][j % L::kLanes] = j < cols ? -1 : 0;
      T col_threshold[W] = {};
      for (int64_t j = 0; j < cols; ++j) col_threshold[j] = p.col_threshold[j0 + j];
      Flags below[NV] = {};  // counts of entries at or below the columns' thresholds, negated
      for (int64_t r = 0; r < rows; ++r) {
        Flags row_below = {};
        for (int v = 0; v < NV; ++v) {
          const typename L::V s = L::load(dots + r * W + v * L::kLanes) * S.scale;
          row_below += (s <= p.row_threshold[i0 + r]) & valid[v];
          below[v] += s <= L::load(col_threshold + v * L::kLanes);
        }
        row_partial[i0 + r] += cols;
        for (int l = 0; l < L::kLanes; ++l) row_partial[i0 + r] += row_below[l];
      }
      for (int64_t j = 0; j < cols; ++j) col_partial[j0 + j] += rows + below[j / L::kLanes][j % L::kLanes];
    }
  }
}

template <class T>
static void ranks(const Ranks<T>& p, ParallelFor run) {
  parallel(run, p.row_groups * p.col_groups,
           [&p](int64_t i) { rank_task(p, task_of(p.S, i, p.row_groups, p.col_groups)); });
  for (int64_t i = 0; i < p.S.N; ++i) {
    p.row_rank[i] = 0;
    for (int64_t g = 0; g < p.col_groups; ++g) p.row_rank[i] += p.row_partial[g * p.S.N + i];
  }
  for (int64_t j = 0; j < p.S.M; ++j) {
    p.col_rank[j] = 0;
    for (int64_t g = 0; g < p.row_groups; ++g) p.col_rank[j] += p.col_partial[g * p.S.M + j];
  }
}

}  // namespace FC_ISA
}  // namespace fastclip
