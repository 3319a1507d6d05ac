// Reads x^, y^ and the two vectors a and b, adds G Y to dx and G^T X to dy (math.md, eq. 6).
//
// G is made in waves of kWave x kWave blocks that stay in the last-level cache: recompute S, one exp, then two plain
// matrix products. Each entry of dx and dy is added to by one task a wave, in a fixed order: no locks, no per-thread
// copies, the same bits for any number of threads.
#pragma once
#include "similarity.h"

namespace fastclip {
namespace FC_ISA {

constexpr int64_t kPanelsPerTask = 4;  // panels of D a task of the two products takes

// Turns a panel of x^ y^T into G = exp(S - shift) (a + b), d at the positives, 0 beyond M.
template <class T, bool kOneShift>
static void weigh_panel(const Gradients<T>& p, int64_t i0, int64_t rows, int64_t j0, T* panel) {
  typedef Simd<T> L;
  typedef typename L::V V;
  constexpr int W = L::kPanel, NV = kVectorsPerPanel;
  const Similarity<T>& S = p.S;
  T tail_b[W] = {}, tail_shift[W] = {};
  for (int64_t j = 0; j < smaller(W, S.M - j0); ++j) {
    tail_b[j] = p.b[j0 + j];
    tail_shift[j] = S.col_shift[j0 + j];
  }
  for (int64_t r = 0; r < rows; ++r) {
    T* row = panel + r * W;
    T by_row[W], by_col[W];  // a and b of the pairs that are negatives
    if (S.mask.row_ids) {
      for (int j = 0; j < W; ++j) {
        by_row[j] = p.a[i0 + r];
        by_col[j] = tail_b[j];
      }
      drop_non_negatives(S, i0 + r, j0, row, by_row, by_col);
    }
    for (int v = 0; v < NV; ++v) {
      const V s = rounded(L::load(row + v * L::kLanes) * S.scale);
      V a = L::fill(p.a[i0 + r]), b = L::load(tail_b + v * L::kLanes);
      if (S.mask.row_ids) {
        a = L::load(by_row + v * L::kLanes);
        b = L::load(by_col + v * L::kLanes);
      }
      const V e = exp_minus(s, L::fill(S.row_shift[i0 + r]));
      const V shift = L::load(tail_shift + v * L::kLanes);
      V g = kOneShift ? e * (a + b) : e * a + exp_minus(s, shift) * b;
      if (S.mask.row_ids) {
        // The exponential of a pair left out may overflow, and 0 inf is NaN.
        const V e_col = kOneShift ? e : exp_minus(s, shift);
        g = (a != T(0) ? e * a : V{}) + (b != T(0) ? e_col * b : V{});
      }
      L::store(row + v * L::kLanes, g);
    }
    const uint64_t lane = positive_lane(S, i0 + r, j0);
    if (lane < uint64_t(W)) row[lane] = p.d[i0 + r];
    for (int64_t j = S.M - j0; j < W; ++j) row[j] = T(0);
  }
}

// The same from the entries that the forward pass kept; one shift serves all.
template <class T>
static void weigh_entries(const Gradients<T>& p, const T* entries, int64_t i0, int64_t rows, int64_t j0, T* panel) {
  typedef Simd<T> L;
  constexpr int W = L::kPanel, NV = kVectorsPerPanel;
  T tail_b[W] = {};
  for (int64_t j = 0; j < smaller(W, p.S.M - j0); ++j) tail_b[j] = p.b[j0 + j];
  for (int64_t r = 0; r < rows; ++r) {
    T* row = panel + r * W;
    for (int v = 0; v < NV; ++v) {
      const auto weight = L::fill(p.a[i0 + r]) + L::load(tail_b + v * L::kLanes);
      L::store(row + v * L::kLanes, L::load(entries + r * W + v * L::kLanes) * weight);
    }
    const uint64_t lane = positive_lane(p.S, i0 + r, j0);
    if (lane < uint64_t(W)) row[lane] = p.d[i0 + r];
    for (int64_t j = p.S.M - j0; j < W; ++j) row[j] = T(0);
  }
}

// out [R rows of stride `stride`, kPanel] += acc
template <class T, int R>
static FC_INLINE void add_tile(typename Simd<T>::V (&acc)[R][kVectorsPerPanel], T* out, int64_t stride) {
  typedef Simd<T> L;
  FC_UNROLL
  for (int r = 0; r < R; ++r) {
    FC_UNROLL
    for (int v = 0; v < kVectorsPerPanel; ++v) {
      T* p = out + r * stride + v * L::kLanes;
      L::store(p, L::load(p) + acc[r][v]);
    }
  }
}

// The blocks [i_first, i_last) x [j_first, j_last) of one wave; block (i, j) of G is a panelled [block rows, block columns].
template <class T>
struct Wave {
  int64_t i_first, i_last, j_first, j_last;
  T* data;
  T* block(int64_t i, int64_t j) const { return data + ((i - i_first) * kWave + (j - j_first)) * kBlock * kBlock; }
};

template <class T>
static void weigh_wave(const Gradients<T>& p, const Wave<T>& wave, ParallelFor run) {
  constexpr int64_t W = Simd<T>::kPanel, kPanels = kBlock / W;
  const int64_t columns = wave.j_last - wave.j_first;
  parallel(run, (wave.i_last - wave.i_first) * columns, [&](int64_t task) {
    const int64_t i = wave.i_first + task / columns, j = wave.j_first + task % columns;
    const int64_t rows = smaller(kBlock, p.S.N - i * kBlock);
    for (int64_t panel = j * kPanels; panel < smaller((j + 1) * kPanels, ceil_div(p.S.M, W)); ++panel) {
      T* out = wave.block(i, j) + (panel - j * kPanels) * rows * W;
      if (p.entries) {
        weigh_entries(p, p.entries + entries_index(p.S, i, panel), i * kBlock, rows, panel * W, out);
        continue;
      }
      dot_panel(p.S, i, panel, out);
      const auto weigh = p.S.one_shift ? weigh_panel<T, true> : weigh_panel<T, false>;
      weigh(p, i * kBlock, rows, panel * W, out);
    }
  });
}

// The rows of y^ that the wave meets, out of y_columns: a panel [kPanel columns of y^, kPanel of D] at a time, turned.
template <class T>
static void turn_columns(const Gradients<T>& p, const Wave<T>& wave, ParallelFor run) {
  constexpr int64_t W = Simd<T>::kPanel;
  const int64_t D = p.S.D, padded = ceil_div(D, W) * W;
  parallel(run, wave.j_last - wave.j_first, [&](int64_t task) {
    const int64_t j0 = (wave.j_first + task) * kBlock, rows = smaller(kBlock, p.S.M - j0);
    for (int64_t k0 = 0; k0 < padded; k0 += W) {
      T* out = p.y_wave + task * kBlock * padded + k0 * rows;
      const int64_t count = smaller(W, D - k0);
      for (int64_t r0 = 0; r0 < rows; r0 += W) {
        const T* in = p.S.y_columns + (j0 + r0) * D + k0 * W;
        for (int64_t r = 0; r < smaller(W, rows - r0); ++r) {
          for (int64_t k = 0; k < count; ++k) out[(r0 + r) * W + k] = in[k * W + r];
          for (int64_t k = count; k < W; ++k) out[(r0 + r) * W + k] = T(0);
        }
      }
    }
  });
}

// dx of the wave's rows += G Y
template <class T>
static void add_dx(const Gradients<T>& p, const Wave<T>& wave, ParallelFor run) {
  constexpr int64_t W = Simd<T>::kPanel;
  const int64_t panels = ceil_div(p.width, W), groups = ceil_div(panels, kPanelsPerTask), padded = panels * W;
  parallel(run, (wave.i_last - wave.i_first) * groups, [&](int64_t task) {
    const int64_t i = wave.i_first + task / groups, first = task % groups * kPanelsPerTask;
    const int64_t i0 = i * kBlock, rows = smaller(kBlock, p.S.N - i0);
    for (int64_t j = wave.j_first; j < wave.j_last; ++j) {
      const int64_t j0 = j * kBlock, depth = smaller(kBlock, p.S.M - j0);
      const T* g = wave.block(i, j);
      for (int64_t panel = first; panel < smaller(first + kPanelsPerTask, panels); ++panel) {
        const T* block = p.Y ? p.Y + j0 * padded : p.y_wave + (j - wave.j_first) * kBlock * padded;
        const T* y = block + panel * depth * W;
        for_row_tiles(rows, [&](int64_t r, auto count) {
          constexpr int R = decltype(count)::value;
          typename Simd<T>::V acc[R][kVectorsPerPanel] = {};
          multiply<T, R>(WalkRows{}, g + r * W, rows, y, depth, acc);
          add_tile<T, R>(acc, p.dx + (i0 + r) * padded + panel * W, padded);
        });
      }
    }
  });
}

// dy of the wave's columns += G^T X
template <class T>
static void add_dy(const Gradients<T>& p, const Wave<T>& wave, ParallelFor run) {
  constexpr int64_t W = Simd<T>::kPanel;
  const int64_t panels = ceil_div(p.width, W), groups = ceil_div(panels, kPanelsPerTask), padded = panels * W;
  parallel(run, (wave.j_last - wave.j_first) * groups, [&](int64_t task) {
    const int64_t j = wave.j_first + task / groups, first = task % groups * kPanelsPerTask;
    const int64_t j0 = j * kBlock, columns = smaller(kBlock, p.S.M - j0);
    for (int64_t i = wave.i_first; i < wave.i_last; ++i) {
      const int64_t i0 = i * kBlock, depth = smaller(kBlock, p.S.N - i0);
      for (int64_t panel = first; panel < smaller(first + kPanelsPerTask, panels); ++panel) {
        const T* x = p.X + i0 * padded + panel * depth * W;
        for (int64_t c = 0; c < columns; c += W) {
          const T* g = wave.block(i, j) + c * depth;
          for_row_tiles(smaller(W, columns - c), [&](int64_t r, auto count) {
            constexpr int R = decltype(count)::value;
            typename Simd<T>::V acc[R][kVectorsPerPanel] = {};
            multiply<T, R>(WalkColumns{}, g + r, depth, x, depth, acc);
            add_tile<T, R>(acc, p.dy + (j0 + c + r) * padded + panel * W, padded);
          });
        }
      }
    }
  });
}

// Calls f(wave) on every wave, those that share Y's rows one after the other.
template <class T, class F>
static FC_INLINE void for_waves(const Gradients<T>& p, ParallelFor run, const F& f) {
  const int64_t row_blocks = ceil_div(p.S.N, kBlock), col_blocks = ceil_div(p.S.M, kBlock);
  for (int64_t j = 0; j < col_blocks; j += kWave) {
    for (int64_t i = 0; i < row_blocks; i += kWave) {
      const Wave<T> wave = {i, smaller(i + kWave, row_blocks), j, smaller(j + kWave, col_blocks), p.wave};
      if (p.dx && !p.Y && i == 0) turn_columns(p, wave, run);
      f(wave);
    }
  }
}

template <class T>
static void gradients(const Gradients<T>& p, ParallelFor run) {
  for_waves(p, run, [&](const Wave<T>& wave) {
    weigh_wave(p, wave, run);
    if (p.dx) add_dx(p, wave, run);
    if (p.dy) add_dy(p, wave, run);
  });
}

}  // namespace FC_ISA
}  // namespace fastclip
