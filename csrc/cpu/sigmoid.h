// The pairwise sigmoid loss (math.md, eq. 11): value and weights G of its gradient from one pass over S, which is never
// held beyond a wave. Shares the two matrix products of backward.h.
#pragma once
#include "backward.h"

namespace fastclip {
namespace FC_ISA {

// What a row's entries add up to, a lane each. The losses are softplus(s) = max(s, 0) + log(1 + e), e = exp(-|s|): the
// logarithms are taken of the product of all 1 + e at once, which is kept as that product minus 1, so that small e are
// not rounded away. A block's 192 factors of at most 2 fit in a float where they share its lanes, in a double together.
template <class T>
struct RowTotal {
  typename Simd<T>::V above = {}, product_minus_1 = {}, slope = {}, by_dot = {};
};

// Adds the losses of `s` to the row's total; returns their derivatives sigmoid(s).
template <class T>
static FC_INLINE typename Simd<T>::V add_losses(typename Simd<T>::V s, RowTotal<T>& total) {
  typedef typename Simd<T>::V V;
  const V size = s < T(0) ? -s : s;
  const V e = exp_minus(-size, V{});  // at most 1
  total.above += s < T(0) ? V{} : s;
  total.product_minus_1 += e * (total.product_minus_1 + T(1));
  return (s < T(0) ? e : Simd<T>::fill(T(1))) / (e + T(1));
}

template <class T>
static double loss_of(const RowTotal<T>& total) {
  double above = 0.0, product_minus_1 = 0.0;
  for (int l = 0; l < Simd<T>::kLanes; ++l) {
    above += double(total.above[l]);
    const double factor_minus_1 = double(total.product_minus_1[l]);
    product_minus_1 += factor_minus_1 * (product_minus_1 + 1.0);
  }
  return above + __builtin_log1p(product_minus_1);
}

// A row's panel where every pair is a negative: dots -> sigmoid(S + bias) * weight.
template <class P>
static FC_INLINE void sigmoid_plain(const Sigmoid<P>& p, Real<P> weight, Real<P>* row, RowTotal<Real<P>>& total) {
  typedef Real<P> T;
  typedef Simd<T> L;
  for (int v = 0; v < kVectorsPerPanel; ++v) {
    const auto dots = L::load(row + v * L::kLanes);
    const auto g = add_losses<T>(dots * p.S.scale + p.bias, total);
    total.slope += g;
    total.by_dot += g * dots;
    L::store(row + v * L::kLanes, g * weight);
  }
}

// The same where some pairs are positives (the loss is softplus(-s), its derivative -sigmoid(-s)) or left out.
template <class P>
static void sigmoid_mixed(const Sigmoid<P>& p, int64_t i, int64_t j0, Real<P>* row, RowTotal<Real<P>>& total) {
  typedef Real<P> T;
  typedef Simd<T> L;
  typedef typename L::V V;
  constexpr int W = L::kPanel;
  const Similarity<P>& S = p.S;
  const int64_t cols = smaller(W, S.M - j0);
  T sign[W], used[W];  // -z_ij, and 0 for pairs left out
  for (int j = 0; j < W; ++j) {
    sign[j] = T(1);
    used[j] = j < cols ? T(1) : T(0);
  }
  if (S.mask.row_ids) {
    for (int64_t j = 0; j < cols; ++j) {
      if (S.mask.row_ids[i] != S.mask.col_ids[j0 + j]) continue;
      (p.match_is_positive ? sign : used)[j] = p.match_is_positive ? T(-1) : T(0);
    }
  }
  const uint64_t lane = positive_lane(S, i, j0);
  if (lane < uint64_t(W)) {
    sign[lane] = T(-1);
    used[lane] = T(1);
  }
  for (int v = 0; v < kVectorsPerPanel; ++v) {
    const V z = L::load(sign + v * L::kLanes), counts = L::load(used + v * L::kLanes);
    const V dots = L::load(row + v * L::kLanes);
    V s = z * (dots * S.scale + p.bias);
    s = counts != T(0) ? s : L::fill(-T(__builtin_inf()));
    const V g = add_losses<T>(s, total) * z * counts;
    total.slope += g;
    total.by_dot += g * dots;
    L::store(row + v * L::kLanes, g * p.row_weight[i]);
  }
}

// Turns a block of x^ y^T, panels [first, last), into G_ij = w_i dloss_ij/dS_ij; writes each row's loss and the
// sums of G / w and of G / w times x^ y^T.
template <class P>
static void sigmoid_block(const Sigmoid<P>& p, int64_t i0, int64_t rows, int64_t first, int64_t last, Real<P>* block,
                          double* loss, double* slope, double* by_dot) {
  typedef Real<P> T;
  constexpr int W = Simd<T>::kPanel;
  for (int64_t r = 0; r < rows; ++r) {
    RowTotal<T> total;
    const T weight = p.row_weight[i0 + r];
    for (int64_t panel = first; panel < last; ++panel) {
      T* row = block + (panel - first) * rows * W + r * W;
      const int64_t j0 = panel * W;
      const bool plain = !p.S.mask.row_ids && j0 + W <= p.S.M && positive_lane(p.S, i0 + r, j0) >= uint64_t(W);
      if (plain) {
        sigmoid_plain(p, weight, row, total);
      } else {
        sigmoid_mixed(p, i0 + r, j0, row, total);
      }
    }
    loss[i0 + r] = loss_of(total);
    slope[i0 + r] = double(sum_of_lanes<T>(total.slope));
    by_dot[i0 + r] = double(sum_of_lanes<T>(total.by_dot));
  }
}

// One block row of a wave is one task: its rows' sums grow in a fixed order.
template <class P>
static auto sigmoid_wave(const Sigmoid<P>& p, const Gradients<P>& products, const Wave<P>& wave) {
  constexpr int64_t W = Simd<Real<P>>::kPanel, kPanels = kBlock / W;
  const int64_t blocks = wave.i_last - wave.i_first;
  return tasks(blocks * (wave.j_last - wave.j_first), [&p, &products, &wave, blocks](int64_t task) {
    alignas(kVectorBytes) Real<P> scratch[Precision<P>::kPair == 1 ? 1 : kBlock * kBlock];
    const int64_t i = wave.i_first + task % blocks, j = wave.j_first + task / blocks;
    const int64_t rows = smaller(kBlock, p.S.N - i * kBlock);
    // Each block of a wave has its own partial sums; they are added in order afterwards.
    double* loss = p.partial + 3 * (j - wave.j_first) * p.S.N;
    const int64_t first = j * kPanels, last = smaller((j + 1) * kPanels, ceil_div(p.S.M, W));
    Real<P>* block = panel_of(wave, i, j, 0, scratch);
    for (int64_t panel = first; panel < last; ++panel) dot_panel(p.S, i, panel, block + (panel - first) * rows * W);
    sigmoid_block(p, i * kBlock, rows, first, last, block, loss, loss + p.S.N, loss + 2 * p.S.N);
    for (int64_t panel = first; panel < last; ++panel) {
      store_panel(products, wave, i, j, panel, block + (panel - first) * rows * W);
    }
  });
}

template <class P>
static void sum_rows(const Sigmoid<P>& p, const Wave<P>& wave) {
  for (int64_t j = 0; j < wave.j_last - wave.j_first; ++j) {
    const double* loss = p.partial + 3 * j * p.S.N;
    for (int64_t i = wave.i_first * kBlock; i < smaller(wave.i_last * kBlock, p.S.N); ++i) {
      p.row_loss[i] += loss[i];
      p.row_slope[i] += loss[p.S.N + i];
      p.row_by_dot[i] += loss[2 * p.S.N + i];
    }
  }
}

template <class P>
static void sigmoid(const Sigmoid<P>& p, ParallelFor run) {
  const Gradients<P> products = {p.S,     nullptr, 0,         p.S.x_rows, nullptr,      p.S.D, nullptr, nullptr,
                                 nullptr, p.wave,  p.x_pairs, p.y_wave,   p.positive_g, p.dx,  p.dy,    nullptr};
  for_waves(
      products, run, [&](const Wave<P>& wave) { return sigmoid_wave(p, products, wave); },
      [&](const Wave<P>& wave) { sum_rows(p, wave); });
}

}  // namespace FC_ISA
}  // namespace fastclip
