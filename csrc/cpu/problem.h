// What the kernels take: plain pointers, so that each instruction set's copy can be compiled without torch.
#pragma once
#include <cstdint>

namespace fastclip {

constexpr int64_t kBlock = 192;       // rows of x and columns of S in a block: a multiple of every tile and panel size
constexpr int64_t kWave = 10;         // blocks along each side of a wave of G: 1920 x 1920, 14 MiB in float32
constexpr int64_t kMaxGroups = 32;    // partial sums: at most this many per row and per column

enum class Element { f32, f64, bf16, f16 };

// Runs task(i, context) for i in [0, count) on torch's threads, in any order.
typedef void (*ParallelFor)(int64_t count, void (*task)(int64_t, void*), void* context);

template <class F>
void parallel(ParallelFor run, int64_t count, const F& f) {
  run(count, [](int64_t i, void* context) { (*static_cast<const F*>(context))(i); }, const_cast<F*>(&f));
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
//   y_columns a panelled [D, M]
// positive [N]: the column of each row's positive. row_shift [N], col_shift [M] (math.md, eq. 2).
template <class T>
struct Similarity {
  int64_t N, M, D;
  const T *x_rows, *y_columns;
  T scale;
  const int64_t* positive;
  const T *row_shift, *col_shift;
  bool one_shift;  // every row and column has the same shift: one exp serves both sums
  Mask<T> mask;
};

// row_partial [row_groups' columns side: col_groups, N], col_partial [row_groups, M]: scratch, double.
// entries: exp(S - row_shift), 0 where the pair is no negative, for the backward pass of a small problem: blocks of rows,
// each panelled [block rows, M]; null: not kept.
template <class T>
struct Sums {
  Similarity<T> S;
  T* entries;
  int64_t row_groups, col_groups;
  double *row_partial, *col_partial;
  T *row_sum, *col_sum, *pos;
};

// The largest negative of each row and column; -inf where there is none.
template <class T>
struct Maxima {
  Similarity<T> S;
  int64_t row_groups, col_groups;
  T *row_partial, *col_partial;
  T *row_max, *col_max;
};

// Counts of entries above a threshold per row and per column (NaN counts as above), int64.
template <class T>
struct Ranks {
  Similarity<T> S;
  int64_t row_groups, col_groups;
  const T *row_threshold, *col_threshold;
  int64_t *row_partial, *col_partial;
  int64_t *row_rank, *col_rank;
};

// dx += G Y and dy += G^T X with G_ij = exp(S_ij - shift) (a_i + b_j), and G_{i, positive_i} = d_i (math.md, eq. 6).
// X [N, width] and Y [M, width] are laid out as x_rows is: x^ and y^ themselves for the loss's gradients. Y null: y^, whose
// rows are taken from y_columns a wave at a time. wave: room for kWave x kWave blocks of G. y_wave: for kWave blocks of
// Y's rows. dx, dy: row-major [., padded width], zeroed; null where it is not wanted. entries: what Sums
// kept, or null: S is recomputed.
template <class T>
struct Gradients {
  Similarity<T> S;
  const T* entries;
  const T *X, *Y;
  int64_t width;
  const T *a, *b, *d;
  T *wave, *y_wave, *dx, *dy;
};

// sum_ij w_i softplus(-z_ij (S_ij + bias)), z = 1 on positives and -1 elsewhere (math.md, eq. 11). Adds each row's loss and
// each row's sum of dloss/dS to row_loss and row_slope [N] (unweighted), w_i dloss/dS times y^ and x^ to dx and dy.
// mask.row_ids: equal ids are positives too, or left out. partial: [kWave, 2, N] scratch.
template <class T>
struct Sigmoid {
  Similarity<T> S;
  T bias;
  bool match_is_positive;
  const T* row_weight;
  T *wave, *y_wave;
  double *partial, *row_loss, *row_slope;
  T *dx, *dy;
};

// grad = (scale dx - x^ <x^, scale dx>) / length (math.md, eq. 8) as the features' element type; inner [rows] = <x^, dx>.
// x: the features as they came; x.rows = 0: nothing to do.
template <class T>
struct Finish {
  Features x;
  bool normalize;
  const T* dx;
  T scale;
  void* grad;  // null: only inner is wanted
  double* inner;
};

template <class T>
struct Pack {
  Features x;
  bool normalize;
  T *length, *rows, *columns;  // rows, columns: null where that layout is not wanted
};

// One instruction set's kernels, for one computing type.
template <class T>
struct Kernels {
  int64_t panel;
  void (*pack)(const Pack<T>& x, const Pack<T>& y, ParallelFor);
  void (*sums)(const Sums<T>&, ParallelFor);
  void (*maxima)(const Maxima<T>&, ParallelFor);
  void (*pair_scores)(const Similarity<T>&, const int64_t* rows, const int64_t* cols, int64_t count, T* out, ParallelFor);
  void (*ranks)(const Ranks<T>&, ParallelFor);
  void (*gradients)(const Gradients<T>&, ParallelFor);
  void (*sigmoid)(const Sigmoid<T>&, ParallelFor);
  void (*finish)(const Finish<T>& x, const Finish<T>& y, ParallelFor);
};

struct Isa {
  const char* name;
  Kernels<float> f32;
  Kernels<double> f64;
};

Isa isa_avx512();
Isa isa_avx2();
Isa isa_baseline();

}  // namespace fastclip
