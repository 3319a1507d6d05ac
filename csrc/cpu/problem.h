// What the kernels take: plain pointers, so that each instruction set's copy can be compiled without torch.
#pragma once
#include <cstdint>

namespace fastclip {

constexpr int64_t kBlock = 192;     // rows of x and columns of S in a block: a multiple of every tile and panel size
constexpr int64_t kWave = 10;       // blocks along each side of a wave of G: 1920 x 1920, 14 MiB in float32
constexpr int64_t kMaxGroups = 32;  // partial sums: at most this many per row and per column

enum class Element { f32, f64, bf16, f16 };

struct Bfloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// P, what a kernel computes in: float, double, or bfloat16 dot products that are summed in float.
// Real: sums, shifts and everything that is not a matrix product. Stored: the matrices' elements. kPair: so many
// elements along the summed dimension lie side by side, for the instruction that takes them together.
struct Bf16Dot {};
template <class P>
struct Precision {
  typedef P Real, Stored;
  static constexpr int kPair = 1;
};
template <>
struct Precision<Bf16Dot> {
  typedef float Real;
  typedef Bfloat16 Stored;
  static constexpr int kPair = 2;
};
template <class P>
using Real = typename Precision<P>::Real;
template <class P>
using Stored = typename Precision<P>::Stored;

// Runs task(i, context) for i in [0, count) on torch's threads, in any order.
typedef void (*ParallelFor)(int64_t count, void (*task)(int64_t, void*), void* context);

template <class F>
void parallel(ParallelFor run, int64_t count, const F& f) {
  run(count, [](int64_t i, void* context) { (*static_cast<const F*>(context))(i); }, const_cast<F*>(&f));
}

// The tasks of several loops as one parallel loop: none waits for another's last one.
template <class F>
struct Tasks {
  int64_t count;
  F run;
};
template <class F>
Tasks<F> tasks(int64_t count, const F& run) {
  return {count, run};
}

template <class A, class B, class C>
void parallel(ParallelFor run, const Tasks<A>& a, const Tasks<B>& b, const Tasks<C>& c) {
  parallel(run, a.count + b.count + c.count, [&](int64_t i) {
    if (i < a.count) return a.run(i);
    if (i < a.count + b.count) return b.run(i - a.count);
    c.run(i - a.count - b.count);
  });
}

// Rows of a user's [rows, width] matrix, as they came.
struct Features {
  const void* data;
  Element element;
  int64_t rows, width, row_stride;
};

// Pairs that are no negatives (math.md, eq. 10): those with equal ids, and those that score above a limit, which may
// differ between the row's and the column's sum. row_ids null: no mask at all.
template <class T>
struct Mask {
  const int64_t *row_ids, *col_ids;
  const T *row_limit, *col_limit;
};

// S = scale * x y^T, N x M, in the two layouts that the kernels read (panels: simd.h).
//   x_rows    [ceil(N / kBlock)] blocks, each a panelled [block rows, D]
//   y_columns a panelled [D, M], summed along D
// x_factor [N], y_factor [M, padded to a panel]: what the rows of x and y as stored have yet to be multiplied by;
// null: 1. positive [N]: the column of each row's positive. row_shift [N], col_shift [M] (math.md, eq. 2).
template <class P>
struct Similarity {
  int64_t N, M, D;
  const Stored<P>*x_rows, *y_columns;
  const Real<P>*x_factor, *y_factor;
  Real<P> scale;
  const int64_t* positive;
  const Real<P>*row_shift, *col_shift;
  bool one_shift;  // every row and column has the same shift: one exp serves both sums
  Mask<Real<P>> mask;
};

// row_partial [row_groups' columns side: col_groups, N], col_partial [row_groups, M]: scratch, double.
// dots: x^ y^T of the first kept_blocks blocks of rows, each panelled [block rows, M], for the gradients to use again.
template <class P>
struct Sums {
  Similarity<P> S;
  Real<P>* dots;
  int64_t kept_blocks, row_groups, col_groups;
  double *row_partial, *col_partial;
  Real<P>*row_sum, *col_sum, *pos;
};

// The largest negative of each row and column; -inf where there is none.
template <class P>
struct Maxima {
  Similarity<P> S;
  int64_t row_groups, col_groups;
  Real<P>*row_partial, *col_partial;
  Real<P>*row_max, *col_max;
};

// Counts of entries above a threshold per row and per column (NaN counts as above), int64.
template <class P>
struct Ranks {
  Similarity<P> S;
  int64_t row_groups, col_groups;
  const Real<P>*row_threshold, *col_threshold;
  int64_t *row_partial, *col_partial;
  int64_t *row_rank, *col_rank;
};

// dx = G Y and dy = G^T X with G_ij = exp(S_ij - shift) (a_i + b_j), and G_{i, positive_i} = d_i (math.md, eq. 6).
// X [N, width] and Y [M, width] are laid out as x_rows is: x^ and y^ themselves for the loss's gradients. Y null: y^,
// whose rows are taken from y_columns a wave at a time. wave: room for kWave x kWave blocks of G. y_wave: for kWave
// blocks of Y's rows. dx, dy: row-major [., padded width]; null where it is not wanted. dots: what Sums
// kept of x^ y^T; the rest of it is computed again.
//
// With Bf16Dot, X and Y are x^ and y^, x_pairs is room for X's rows side by side, positive_g [N], and row i of
// dx and dy comes without its x_factor or y_factor: G is stored times both factors, which serves both products. slope
// [0], zeroed: sum_ij G_ij <x^_i, y^_j> is added to it; the rest of slope [1 + kWave^2] is scratch.
template <class P>
struct Gradients {
  Similarity<P> S;
  const Real<P>* dots;
  int64_t kept_blocks;
  const Stored<P>*X, *Y;
  int64_t width;
  const Real<P>*a, *b, *d;
  Real<P>* wave;
  Stored<P>*x_pairs, *y_wave;
  Real<P>*positive_g, *dx, *dy;
  double* slope;
};

// sum_ij w_i softplus(-z_ij (S_ij + bias)), z = 1 on positives and -1 elsewhere (math.md, eq. 11). Adds each row's loss
// and its sums of dloss/dS and of dloss/dS <x^, y^> to row_loss, row_slope and row_by_dot [N] (unweighted), w_i
// dloss/dS times y^ and x^ to dx and dy. mask.row_ids: equal ids are positives too, or left out. partial: [kWave, 3, N]
// scratch. The rest: Gradients.
template <class P>
struct Sigmoid {
  Similarity<P> S;
  Real<P> bias;
  bool match_is_positive;
  const Real<P>* row_weight;
  Real<P>* wave;
  Stored<P>*x_pairs, *y_wave;
  double *partial, *row_loss, *row_slope, *row_by_dot;
  Real<P>*positive_g, *dx, *dy;
};

// grad = (scale dx - x^ <x^, scale dx>) / length (math.md, eq. 8) as the features' element type, or as T with wide;
// inner [rows] = <x^, dx>. x: the features as they came; x.rows = 0: nothing to do. factor [rows]: what dx is divided
// by first; null: 1.
template <class T>
struct Finish {
  Features x;
  bool normalize;
  T* dx;
  const T* factor;
  T scale;
  void* grad;  // null: only inner is wanted
  bool wide;
  double* inner;  // null: not wanted
};

// Bf16Dot stores the features as they came, but for a power of two, and their factors apart; others x^ itself.
template <class P>
struct Pack {
  Features x;
  bool normalize;
  Real<P>* length;
  Stored<P>*rows, *columns;  // null where that layout is not wanted
  Real<P>* factor;           // [rows, padded to a panel]; null for factors of 1
};

// One instruction set's kernels, for one precision. Bf16Dot has no ranks: they take the features as float.
template <class P>
struct Kernels {
  int64_t panel;
  void (*pack)(const Pack<P>& x, const Pack<P>& y, ParallelFor);
  void (*sums)(const Sums<P>&, ParallelFor);
  void (*maxima)(const Maxima<P>&, ParallelFor);
  void (*pair_scores)(const Similarity<P>&, const int64_t* rows, const int64_t* cols, int64_t count, Real<P>* out,
                      ParallelFor);
  void (*ranks)(const Ranks<P>&, ParallelFor);
  void (*gradients)(const Gradients<P>&, ParallelFor);
  void (*sigmoid)(const Sigmoid<P>&, ParallelFor);
  void (*finish)(const Finish<Real<P>>& x, const Finish<Real<P>>& y, ParallelFor);
};

struct Isa {
  const char* name;
  Kernels<float> f32;
  Kernels<double> f64;
  Kernels<Bf16Dot> bf16;  // pack null: bfloat16 features are widened to float
};

Isa isa_avx512_bf16();
Isa isa_avx512();
Isa isa_avx2();
Isa isa_baseline();

}  // namespace fastclip
