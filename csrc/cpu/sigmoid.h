// The pairwise sigmoid loss (math.md, eq. 11): value and weights G of its gradient from one pass over S, which is never
// held beyond a wave. Shares the two matrix products of backward.h.
#pragma once
#include "backward.h"

namespace fastclip {
namespace FC_ISA {

// log(1 + z) for z in [0, 1], relative error below 3e-7: twice the area tangent of z / (2 + z), as a series.
static FC_INLINE Simd<float>::V log1p(Simd<float>::V z) {
  const Simd<float>::V w = z / (z + 2.0f), q = w * w;
  Simd<float>::V s = q * (2.0f / 15) + 2.0f / 13;
  s = s * q + 2.0f / 11;
  s = s * q + 2.0f / 9;
  s = s * q + 2.0f / 7;
  s = s * q + 2.0f / 5;
  s = s * q + 2.0f / 3;
  return w * (s * q + 2.0f);
}
static FC_INLINE Simd<double>::V log1p(Simd<double>::V z) {
  FC_UNROLL
  for (int i = 0; i < Simd<double>::kLanes; ++i) z[i] = __builtin_log1p(z[i]);
  return z;
}

// Turns a panel of x^ y^T into G_ij = w_i dloss_ij/dS_ij and adds each row's loss, and its G, to `loss` and `slope`.
template <class T>
static void sigmoid_panel(const Sigmoid<T>& p, int64_t i0, int64_t rows, int64_t j0, T* panel, double* loss,
                          double* slope) {
  typedef Simd<T> L;
  typedef typename L::V V;
  constexpr int W = L::kPanel, NV = kVectorsPerPanel;
  const Similarity<T>& S = p.S;
  const int64_t cols = smaller(W, S.M - j0);
  for (int64_t r = 0; r < rows; ++r) {
    T* row = panel + r * W;
    T sign[W], used[W];  // z_ij, and 0 for pairs left out
    for (int j = 0; j < W; ++j) {
      sign[j] = T(-1);
      used[j] = j < cols ? T(1) : T(0);
    }
    if (S.mask.row_ids) {
      for (int64_t j = 0; j < cols; ++j) {
        if (S.mask.row_ids[i0 + r] != S.mask.col_ids[j0 + j]) continue;
        (p.match_is_positive ? sign : used)[j] = p.match_is_positive ? T(1) : T(0);
      }
    }
    const uint64_t lane = positive_lane(S, i0 + r, j0);
    if (lane < uint64_t(W)) sign[lane] = used[lane] = T(1);

    V row_loss = {}, row_slope = {};
    for (int v = 0; v < NV; ++v) {
      const V z = L::load(sign + v * L::kLanes), weight = L::load(used + v * L::kLanes);
      const V t = z * (L::load(row + v * L::kLanes) * S.scale + p.bias);
      const V size = t < T(0) ? -t : t;
      const V e = exp_minus(-size, V{});  // at most 1
      const V below = t < T(0) ? L::fill(T(1)) : e;
      row_loss += weight != T(0) ? (t < T(0) ? -t : V{}) + log1p(e) : V{};
      const V g = weight != T(0) ? -z * below / (e + T(1)) : V{};  // -z sigmoid(-t)
      row_slope += g;
      L::store(row + v * L::kLanes, g * p.row_weight[i0 + r]);
    }
    loss[i0 + r] += double(sum_of_lanes<T>(row_loss));
    slope[i0 + r] += double(sum_of_lanes<T>(row_slope));
  }
}

// One block row of a wave is one task: its rows' sums grow in a fixed order.
template <class T>
static void sigmoid_wave(const Sigmoid<T>& p, const Wave<T>& wave, ParallelFor run) {
  constexpr int64_t W = Simd<T>::kPanel, kPanels = kBlock / W;
  const int64_t blocks = wave.i_last - wave.i_first;
  parallel(run, blocks * (wave.j_last - wave.j_first), [&](int64_t task) {
    const int64_t i = wave.i_first + task % blocks, j = wave.j_first + task / blocks;
    const int64_t rows = smaller(kBlock, p.S.N - i * kBlock);
    // Each block of a wave has its own partial sums; they are added in order afterwards.
    double* loss = p.partial + 2 * (j - wave.j_first) * p.S.N;
    for (int64_t r = i * kBlock; r < i * kBlock + rows; ++r) loss[r] = loss[p.S.N + r] = 0.0;
    for (int64_t panel = j * kPanels; panel < smaller((j + 1) * kPanels, ceil_div(p.S.M, W)); ++panel) {
      T* out = wave.block(i, j) + (panel - j * kPanels) * rows * W;
      dot_panel(p.S, i, panel, out);
      sigmoid_panel(p, i * kBlock, rows, panel * W, out, loss, loss + p.S.N);
    }
  });
  for (int64_t j = 0; j < wave.j_last - wave.j_first; ++j) {
    const double* loss = p.partial + 2 * j * p.S.N;
    for (int64_t i = wave.i_first * kBlock; i < smaller(wave.i_last * kBlock, p.S.N); ++i) {
      p.row_loss[i] += loss[i];
      p.row_slope[i] += loss[p.S.N + i];
    }
  }
}

template <class T>
static void sigmoid(const Sigmoid<T>& p, ParallelFor run) {
  const Gradients<T> products = {p.S, nullptr, p.S.x_rows, p.y_rows, p.S.D, nullptr, nullptr, nullptr, p.wave, p.dx, p.dy};
  for_waves(products, [&](const Wave<T>& wave) {
    sigmoid_wave(p, wave, run);
    if (p.dx) add_dx(products, wave, run);
    if (p.dy) add_dy(products, wave, run);
  });
}

}  // namespace FC_ISA
}  // namespace fastclip
