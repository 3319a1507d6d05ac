// Reads x^, y^ and the two vectors a and b, adds G Y to dx and G^T X to dy (math.md, eq. 6).
//
// G is made in waves of kWave x kWave blocks that stay in the last-level cache: recompute S, one exp, then two plain
// matrix products. Each entry of dx and dy is added to by one task a wave, in a fixed order: no locks, no per-thread
// copies, the same bits for any number of threads.
//
// Bf16Dot rounds G to bfloat16, all but the positives: the largest entries are added in float at the end. The scale's
// gradient, a small difference of large sums, is taken from G as it was.
#pragma once
#include "similarity.h"

namespace fastclip {
namespace FC_ISA {

constexpr int64_t kPanelsPerTask = 4;  // panels of D a task of the two products takes

// out = G = exp(S - shift) (a + b), d at the positives and 0 beyond M, from a panel of x^ y^T, which may lie there too.
// With Bf16Dot, returns the sum of G_ij <x^_i, y^_j>.
template <class P, bool kOneShift>
static double weigh_panel(const Gradients<P>& p, int64_t i0, int64_t rows, int64_t j0, const Real<P>* panel,
                          Real<P>* out) {
  typedef Real<P> T;
  typedef Simd<T> L;
  typedef typename L::V V;
  constexpr int W = L::kPanel, NV = kVectorsPerPanel;
  const Similarity<P>& S = p.S;
  T tail_b[W] = {}, tail_shift[W] = {};
  for (int64_t j = 0; j < smaller(W, S.M - j0); ++j) {
    tail_b[j] = p.b[j0 + j];
    tail_shift[j] = S.col_shift[j0 + j];
  }
  const bool is_last = j0 + W > S.M;
  V slope = {};
  for (int64_t r = 0; r < rows; ++r) {
    const T* from = panel + r * W;
    T* row = out + r * W;
    V dots[NV], G[NV];
    T by_row[W], by_col[W];  // a and b of the pairs that are negatives
    if (S.mask.row_ids) {
      for (int j = 0; j < W; ++j) {
        by_row[j] = p.a[i0 + r];
        by_col[j] = tail_b[j];
      }
      drop_non_negatives(S, i0 + r, j0, from, by_row, by_col);
    }
    for (int v = 0; v < NV; ++v) {
      dots[v] = L::load(from + v * L::kLanes);
      const V s = rounded(dots[v] * S.scale);
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
      G[v] = g;
    }
    const uint64_t lane = positive_lane(S, i0 + r, j0);
    if (lane < uint64_t(W) || is_last) {
      if (lane < uint64_t(W)) row[lane] = p.d[i0 + r];
      for (int64_t j = S.M - j0; j < W; ++j) row[j] = T(0);
      for (int v = 0; v < NV; ++v) G[v] = L::load(row + v * L::kLanes);
    }
    if constexpr (Precision<P>::kPair > 1) {
      V row_slope = {};
      for (int v = 0; v < NV; ++v) row_slope += G[v] * dots[v];
      slope += row_slope;
    }
  }
  return double(sum_of_lanes<T>(slope));
}

// out [R rows of stride `stride`, kPanel] += acc; with is_first, = acc
template <class T, int R>
static FC_INLINE void add_tile(typename Simd<T>::V (&acc)[R][kVectorsPerPanel], T* out, int64_t stride, bool is_first) {
  typedef Simd<T> L;
  FC_UNROLL
  for (int r = 0; r < R; ++r) {
    FC_UNROLL
    for (int v = 0; v < kVectorsPerPanel; ++v) {
      T* p = out + r * stride + v * L::kLanes;
      L::store(p, is_first ? acc[r][v] : L::load(p) + acc[r][v]);
    }
  }
}

// The blocks [i_first, i_last) x [j_first, j_last) of one wave; block (i, j) of G is a panelled [block rows, block
// columns].
template <class P>
struct Wave {
  int64_t i_first, i_last, j_first, j_last;
  Real<P>* data;
  Real<P>* block(int64_t i, int64_t j) const {
    return data + ((i - i_first) * (j_last - j_first) + (j - j_first)) * kBlock * kBlock;
  }
  // G as add_dx reads it, and as add_dy does: the same numbers twice where they lie in pairs.
  Stored<P>* rows(int64_t i, int64_t j) const { return reinterpret_cast<Stored<P>*>(block(i, j)); }
  Stored<P>* pairs(int64_t i, int64_t j) const { return rows(i, j) + (Precision<P>::kPair - 1) * kBlock * kBlock; }
};

// A panel of G on its way into a wave: computed in place, or beside it where it is stored as another type.
template <class P>
static FC_INLINE Real<P>* panel_of(const Wave<P>& wave, int64_t i, int64_t j, int64_t offset, Real<P>* scratch) {
  return Precision<P>::kPair == 1 ? wave.block(i, j) + offset : scratch;
}

// Rows of kDeep elements each, into a panel that is multiplied along them: one below the other, or side by side.
template <class P, int R>
static FC_INLINE void store_rows(typename Simd<Real<P>>::V (&rows)[R], int64_t count, Stored<P>* out) {
  constexpr int64_t W = Simd<Real<P>>::kPanel;
  if constexpr (Precision<P>::kPair == 1) {
    for (int64_t r = 0; r < count; ++r) Simd<Real<P>>::store(out + r * W, rows[r]);
  } else {
    for (int64_t r = 0; r < count; r += 2) Operands<P>::interleave(out + r * W, rows[r], rows[r + 1]);
  }
}

// Stores panel `panel` of G's block (i, j), if it is not there yet, and sets its positives aside.
template <class P>
static void store_panel(const Gradients<P>& p, const Wave<P>& wave, int64_t i, int64_t j, int64_t panel, Real<P>* g) {
  if constexpr (Precision<P>::kPair > 1) {
    typedef Simd<Real<P>> L;
    typedef Operands<P> O;
    constexpr int64_t W = L::kPanel;
    const Similarity<P>& S = p.S;
    const int64_t i0 = i * kBlock, rows = smaller(kBlock, S.N - i0), j0 = panel * W, offset = j0 - j * kBlock;
    Stored<P>*by_row = wave.rows(i, j) + offset * rows, *by_pair = wave.pairs(i, j) + offset * whole_pairs<P>(rows);
    for (int64_t r = 0; r < rows; ++r) {
      const uint64_t lane = positive_lane(S, i0 + r, j0);
      if (lane >= uint64_t(W)) continue;
      p.positive_g[i0 + r] = g[r * W + lane];
      g[r * W + lane] = Real<P>(0);
    }
    for (int64_t r = 0; r < rows; r += 2) {
      for (int v = 0; v < kVectorsPerPanel; ++v) {
        const int64_t at = r * W + v * L::kLanes;
        const auto factored = [&](int64_t row) {
          return L::load(g + row * W + v * L::kLanes) * factor_of(S, i0 + row, j0 + v * L::kLanes);
        };
        const auto first = O::narrow(factored(r));
        const auto second = O::narrow(r + 1 < rows ? factored(r + 1) : typename L::V{});
        O::store(by_row + at, first);
        if (r + 1 < rows) O::store(by_row + at + W, second);
        O::store_pairs(by_pair + pair_index<P>(r, v * L::kLanes), first, second);
      }
    }
  }
}

// Below, each function returns the tasks of one step of a wave.

template <class P>
static auto weigh_wave(const Gradients<P>& p, const Wave<P>& wave) {
  constexpr int64_t W = Simd<Real<P>>::kPanel, kPanels = kBlock / W;
  const int64_t columns = wave.j_last - wave.j_first;
  return tasks((wave.i_last - wave.i_first) * columns, [&p, &wave, columns](int64_t task) {
    alignas(kVectorBytes) Real<P> scratch[Precision<P>::kPair == 1 ? 1 : kBlock * W];
    const int64_t i = wave.i_first + task / columns, j = wave.j_first + task % columns;
    const int64_t rows = smaller(kBlock, p.S.N - i * kBlock);
    double slope = 0.0;
    for (int64_t panel = j * kPanels; panel < smaller((j + 1) * kPanels, ceil_div(p.S.M, W)); ++panel) {
      Real<P>* out = panel_of(wave, i, j, (panel - j * kPanels) * rows * W, scratch);
      const Real<P>* dots = i < p.kept_blocks ? p.dots + panel_index(p.S, i, panel) : out;
      if (dots == out) dot_panel(p.S, i, panel, out);
      const auto weigh = p.S.one_shift ? weigh_panel<P, true> : weigh_panel<P, false>;
      slope += weigh(p, i * kBlock, rows, panel * W, dots, out);
      store_panel(p, wave, i, j, panel, out);
    }
    if (p.slope) p.slope[1 + task] = slope;
  });
}

// The rows of y^ that the wave meets, out of y_columns: a square of lanes at a time, turned.
template <class P>
static auto turn_columns(const Gradients<P>& p, const Wave<P>& wave) {
  typedef Simd<Real<P>> L;
  constexpr int64_t W = L::kPanel, kLanes = L::kLanes, kPair = Precision<P>::kPair, kDeep = kLanes * kPair;
  const int64_t D = p.S.D, depth = whole_pairs<P>(D), padded = ceil_div(D, W) * W;
  const bool is_wanted = p.dx && !p.Y && wave.i_first == 0;
  return tasks(is_wanted ? wave.j_last - wave.j_first : 0, [&p, &wave, D, depth, padded](int64_t task) {
    const int64_t j0 = (wave.j_first + task) * kBlock, rows = smaller(kBlock, p.S.M - j0);
    for (int64_t k0 = 0; k0 < padded; k0 += kDeep) {
      Stored<P>* out = p.y_wave + task * kBlock * padded + k0 / W * W * whole_pairs<P>(rows);
      const int64_t lanes = smaller(kLanes, (depth - k0) / kPair);
      for (int64_t r = 0; r < rows; r += kLanes) {
        const Stored<P>* in = p.S.y_columns + (j0 + r / W * W) * depth + k0 * W + r % W * kPair;
        typename L::V turned[kLanes] = {};
        for (int64_t k = 0; k < lanes; ++k) __builtin_memcpy(&turned[k], in + k * W * kPair, kVectorBytes);
        transpose<Real<P>>(turned);
        store_rows<P>(turned, smaller(kLanes, rows - r), out + pair_index<P>(r, k0 % W));
      }
    }
  });
}

// x_pairs: the rows of x^, side by side; once, with the first wave.
template <class P>
static auto pair_rows(const Gradients<P>& p, const Wave<P>& wave) {
  typedef Simd<Real<P>> L;
  constexpr int64_t W = L::kPanel, kDeep = L::kLanes * Precision<P>::kPair;
  const int64_t padded = ceil_div(p.S.D, W) * W;
  const bool is_wanted = Precision<P>::kPair > 1 && p.dy && wave.i_first == 0 && wave.j_first == 0;
  return tasks(is_wanted ? ceil_div(p.S.N, kBlock) : 0, [&p, padded](int64_t block) {
    const int64_t i0 = block * kBlock, rows = smaller(kBlock, p.S.N - i0), whole = whole_pairs<P>(rows);
    for (int64_t k0 = 0; k0 < padded; k0 += W) {
      const Stored<P>* in = p.S.x_rows + i0 * padded + k0 * rows;
      Stored<P>* out = p.x_pairs + i0 * padded + k0 * whole;
      for (int64_t r = 0; r < rows; r += 2) {
        for (int64_t k = 0; k < W; k += kDeep) {
          typename L::V pair[2] = {};
          __builtin_memcpy(&pair[0], in + r * W + k, kVectorBytes);
          if (r + 1 < rows) __builtin_memcpy(&pair[1], in + (r + 1) * W + k, kVectorBytes);
          store_rows<P>(pair, 2, out + pair_index<P>(r, k));
        }
      }
    }
  });
}

// What row i's positive, which store_panel set aside, adds to dx_i and to dy's row, both without the factor that they
// still lack.
template <class P>
static FC_INLINE Real<P> positive_weight(const Gradients<P>& p, int64_t i) {
  const Similarity<P>& S = p.S;
  return S.x_factor ? p.positive_g[i] * (S.x_factor[i] * S.y_factor[S.positive[i]]) : p.positive_g[i];
}

// dx_i += g_i y_p, p = positive_i, for the positives in the wave: rows i0.. and panels [first, last) of D.
template <class P>
static void add_positives_to_dx(const Gradients<P>& p, const Wave<P>& wave, int64_t i0, int64_t rows, int64_t first,
                                int64_t last) {
  constexpr int64_t W = Simd<Real<P>>::kPanel;
  const int64_t padded = ceil_div(p.width, W) * W;
  for (int64_t i = i0; i < i0 + rows; ++i) {
    const int64_t positive = p.S.positive[i], j = positive / kBlock;
    if (j < wave.j_first || j >= wave.j_last) continue;
    const int64_t depth = whole_pairs<P>(smaller(kBlock, p.S.M - j * kBlock));
    const Stored<P>* y = p.y_wave + (j - wave.j_first) * kBlock * padded + pair_index<P>(positive % kBlock, 0);
    const Real<P> g = positive_weight(p, i);
    for (int64_t panel = first; panel < last; ++panel) {
      Real<P>* dx = p.dx + i * padded + panel * W;
      for (int64_t k = 0; k < W; ++k) dx[k] += g * widen(y[panel * depth * W + pair_index<P>(0, k)]);
    }
  }
}

// dy_p += g_i x_i for the positives in the wave: columns j0.. and panels [first, last) of D; i in order.
template <class P>
static void add_positives_to_dy(const Gradients<P>& p, const Wave<P>& wave, int64_t j0, int64_t columns, int64_t first,
                                int64_t last) {
  constexpr int64_t W = Simd<Real<P>>::kPanel;
  const int64_t padded = ceil_div(p.width, W) * W;
  for (int64_t i = wave.i_first * kBlock; i < smaller(wave.i_last * kBlock, p.S.N); ++i) {
    const int64_t positive = p.S.positive[i];
    if (positive < j0 || positive >= j0 + columns) continue;
    const int64_t i0 = i / kBlock * kBlock, rows = smaller(kBlock, p.S.N - i0);
    const Real<P> g = positive_weight(p, i);
    for (int64_t panel = first; panel < last; ++panel) {
      const Stored<P>* x = p.S.x_rows + i0 * padded + panel * W * rows + (i - i0) * W;
      Real<P>* dy = p.dy + positive * padded + panel * W;
      for (int64_t k = 0; k < W; ++k) dy[k] += g * widen(x[k]);
    }
  }
}

// dx of the wave's rows += G Y; the first block of a row overwrites what is there
template <class P>
static auto add_dx(const Gradients<P>& p, const Wave<P>& wave) {
  constexpr int64_t W = Simd<Real<P>>::kPanel;
  const int64_t panels = ceil_div(p.width, W), groups = ceil_div(panels, kPanelsPerTask), padded = panels * W;
  return tasks(p.dx ? (wave.i_last - wave.i_first) * groups : 0, [&p, &wave, panels, groups, padded](int64_t task) {
    const int64_t i = wave.i_first + task / groups, i0 = i * kBlock, rows = smaller(kBlock, p.S.N - i0);
    const int64_t first = task % groups * kPanelsPerTask, last = smaller(first + kPanelsPerTask, panels);
    for (int64_t j = wave.j_first; j < wave.j_last; ++j) {
      const int64_t j0 = j * kBlock, depth = whole_pairs<P>(smaller(kBlock, p.S.M - j0));
      const Stored<P>* g = wave.rows(i, j);
      for (int64_t panel = first; panel < last; ++panel) {
        const Stored<P>* block = p.Y ? p.Y + j0 * padded : p.y_wave + (j - wave.j_first) * kBlock * padded;
        const Stored<P>* y = block + panel * depth * W;
        for_row_tiles(rows, [&](int64_t r, auto count) {
          constexpr int R = decltype(count)::value;
          typename Simd<Real<P>>::V acc[R][kVectorsPerPanel] = {};
          multiply<P, R>(WalkRows{}, g + r * W, rows, y, depth, acc);
          add_tile<Real<P>, R>(acc, p.dx + (i0 + r) * padded + panel * W, padded, j == 0);
        });
      }
    }
    if constexpr (Precision<P>::kPair > 1) add_positives_to_dx(p, wave, i0, rows, first, last);
  });
}

// dy of the wave's columns += G^T X, likewise
template <class P>
static auto add_dy(const Gradients<P>& p, const Wave<P>& wave) {
  constexpr int64_t W = Simd<Real<P>>::kPanel, kPair = Precision<P>::kPair;
  const int64_t panels = ceil_div(p.width, W), groups = ceil_div(panels, kPanelsPerTask), padded = panels * W;
  const Stored<P>* X = kPair == 1 ? p.X : p.x_pairs;
  return tasks(p.dy ? (wave.j_last - wave.j_first) * groups : 0, [&p, &wave, panels, groups, padded, X](int64_t task) {
    const int64_t j = wave.j_first + task / groups, j0 = j * kBlock, columns = smaller(kBlock, p.S.M - j0);
    const int64_t first = task % groups * kPanelsPerTask, last = smaller(first + kPanelsPerTask, panels);
    for (int64_t i = wave.i_first; i < wave.i_last; ++i) {
      const int64_t i0 = i * kBlock, depth = whole_pairs<P>(smaller(kBlock, p.S.N - i0));
      for (int64_t panel = first; panel < last; ++panel) {
        const Stored<P>* x = X + i0 * padded + panel * depth * W;
        for (int64_t c = 0; c < columns; c += W) {
          const Stored<P>* g = wave.pairs(i, j) + c * depth;
          for_row_tiles(smaller(W, columns - c), [&](int64_t r, auto count) {
            constexpr int R = decltype(count)::value;
            typename Simd<Real<P>>::V acc[R][kVectorsPerPanel] = {};
            multiply<P, R>(WalkColumns{}, g + r * kPair, depth, x, depth, acc);
            add_tile<Real<P>, R>(acc, p.dy + (j0 + c + r) * padded + panel * W, padded, i == 0);
          });
        }
      }
    }
    if constexpr (kPair > 1) add_positives_to_dy(p, wave, j0, columns, first, last);
  });
}

// Fills a wave with G by make(wave)'s tasks, calls made(wave) and adds its products, wave after wave: those that share
// Y's rows follow each other.
template <class P, class Make, class Made>
static FC_INLINE void for_waves(const Gradients<P>& p, ParallelFor run, const Make& make, const Made& made) {
  const int64_t row_blocks = ceil_div(p.S.N, kBlock), col_blocks = ceil_div(p.S.M, kBlock);
  for (int64_t j = 0; j < col_blocks; j += kWave) {
    for (int64_t i = 0; i < row_blocks; i += kWave) {
      const Wave<P> wave = {i, smaller(i + kWave, row_blocks), j, smaller(j + kWave, col_blocks), p.wave};
      parallel(run, make(wave), turn_columns(p, wave), pair_rows(p, wave));
      made(wave);
      parallel(run, add_dx(p, wave), add_dy(p, wave), tasks(0, [](int64_t) {}));
    }
  }
}

template <class P>
static void gradients(const Gradients<P>& p, ParallelFor run) {
  // Slopes in order, whichever thread came first.
  const auto sum_slopes = [&](const Wave<P>& wave) {
    const int64_t blocks = (wave.i_last - wave.i_first) * (wave.j_last - wave.j_first);
    for (int64_t block = 0; p.slope && block < blocks; ++block) p.slope[0] += p.slope[1 + block];
  };
  for_waves(p, run, [&](const Wave<P>& wave) { return weigh_wave(p, wave); }, sum_slopes);
}

}  // namespace FC_ISA
}  // namespace fastclip
