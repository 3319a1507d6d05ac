"""The C++ kernels (csrc/cpu) on CPU tensors: allocates the buffers, calls the passes in order.

Legend: x [N, D], y [M, D]. rows, columns: a matrix in the panels the kernels read (csrc/cpu/simd.h).
Workspace: a packed copy of each side's features, 14 MiB for a wave of G and 1920 rows of y^, partial sums of at most 32
(N + M) float64, and in clip_loss at most 64 MiB of similarities. No result depends on the number of threads.

bfloat16 features are multiplied as they are where the processor has the instruction, and widened to float32 elsewhere.
"""

import functools
import os
import threading
from importlib.machinery import EXTENSION_SUFFIXES, PathFinder
from pathlib import Path

import torch
from torch import Tensor

from fastclip.backends.shift import finite_or_zero, fixed_shift
from fastclip.checks import accumulation_dtype, early_gradient_dtype

# csrc/cpu/problem.h's kBlock, kWave and kMaxGroups, and the columns of a group in ops.cpp
BLOCK, WAVE_BLOCKS, MAX_GROUPS, GROUP_COLUMNS = 192, 10, 32, 64

# Bytes of similarities that clip_loss may keep for its gradients.
WORKSPACE = int(os.environ.get("FASTCLIP_WORKSPACE_MIB", "64")) * 2**20
SMALL_PAIRS = 2**21  # of a batch whose similarities are all kept, whatever its width
KEPT_BYTES = 2**23  # of scratch that a thread holds on to
LARGE_BYTES = 2**22  # from here on a buffer asks for pages of 2 MiB

DEVICE = "cpu"


def why_not(x: Tensor | None) -> str | None:
    if x is not None and x.device.type != "cpu":
        return f"it runs on CPU tensors, got {x.device}"
    return _load_error()


def describe() -> str:
    return f"C++ kernels, instruction set {_ops().isa()}, {torch.get_num_threads()} threads"


def similarity_sums(x: Tensor, y: Tensor, scale: Tensor, positive: Tensor, normalize: bool, mask):
    """The operator's contract: ops.py."""
    S = _Similarity(x, y, scale, normalize)
    S.pack(x, y)
    return S.sums((positive.contiguous(), *_mask_args(mask)))


def similarity_sums_backward(
    x, y, scale, positive, row_shift, col_shift, a, b, d, normalize, needs, mask
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, y and scale; an empty tensor where `needs` says no."""
    S = _Similarity(x, y, scale, normalize)
    S.pack(x, y)
    if S.in_pairs:
        S.slope = torch.zeros(1 + WAVE_BLOCKS**2, dtype=torch.float64)
    dx, dy = S.accumulators(needs)
    shifts, weights = (row_shift.contiguous(), col_shift.contiguous()), (v.contiguous() for v in (a, b, d))
    rest = (S.x, S.nothing, S.d, *weights, *S.room(dx, dy), dx, dy, S.slope)
    _ops().gradients(*S.args(), positive.contiguous(), *_mask_args(mask), *shifts, *rest)
    return S.gradients(x, y, scale, dx, dy, needs, x.dtype)


def similarity_products(
    x, y, scale, positive, row_shift, col_shift, a, b, d, normalize, x_values, y_values
) -> tuple[Tensor, Tensor]:
    """The operator's contract: ops.py."""
    # The values and the features are other matrices: G of one precision multiplies both.
    S, V = (_Similarity(*sides, scale, n, widen=True) for *sides, n in ((x, y, normalize), (x_values, y_values, False)))
    S.pack(x, y)
    y_rows = V.pack_rows(x_values, y_values)
    by_row, by_col = V.accumulators([True, True])
    shifts, weights = (row_shift.contiguous(), col_shift.contiguous()), (v.contiguous() for v in (a, b, d))
    room = S.room(S.nothing, S.nothing)
    rest = (V.x, y_rows, V.d, *weights, *room, by_row, by_col, S.slope)
    _ops().gradients(*S.args(), positive.contiguous(), *_mask_args((None,) * 4), *shifts, *rest)
    return by_row.view(V.n, V.width)[:, : V.d].contiguous(), by_col.view(V.m, V.width)[:, : V.d].contiguous()


def sigmoid_loss(x, y, scale, bias, positive, row_weight, normalize, needs, mask, match_is_positive):
    """The operator's contract: ops.py."""
    S = _Similarity(x, y, scale, normalize)
    S.pack(x, y)
    dx, dy = S.accumulators(needs)
    partial = torch.empty(3 * WAVE_BLOCKS * S.n, dtype=torch.float64)
    wave, x_pairs, y_wave, positive_g = S.room(dx, dy)
    loss, slope, by_dot = torch.zeros(3, S.n, dtype=torch.float64)
    ids = _mask_args(mask)[:2]
    _ops().sigmoid(
        *S.args(), positive.contiguous(), *ids, match_is_positive, float(bias), row_weight.contiguous(),
        wave, x_pairs, y_wave, partial, loss, slope, by_dot, positive_g, dx, dy,
    )  # fmt: skip
    S.slope = (row_weight * by_dot).sum(0, keepdim=True)
    grad_bias = (row_weight * slope).sum().to(bias.dtype) if needs[3] else bias.new_empty(0)
    return loss.to(S.dtype), *S.gradients(x, y, scale, dx, dy, needs, early_gradient_dtype(x.dtype)), grad_bias


def kept_rows(x: Tensor) -> int:
    """How many rows of the N x N similarities clip_loss holds for its gradients.

    All of a small batch, else as much as the features in float32 take twice over; at most FASTCLIP_WORKSPACE_MIB (64 if
    it is not set when fastclip is imported).
    """
    n, d = x.shape
    most = WORKSPACE // accumulation_dtype(x.dtype).itemsize
    return min(n, min(most, max(SMALL_PAIRS, 4 * n * d)) // n)


def gives_gradients(x: Tensor) -> bool:
    """Whether clip_loss, for which similarities are kept, is worth its room: it keeps a sixteenth of them or more."""
    return 16 * kept_rows(x) >= len(x)


def clip_loss(x, y, scale, weight, mean, normalize, needs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator's contract: plain.py."""
    loss = scale.new_empty(())
    dtype = early_gradient_dtype(x.dtype)
    grads = [_new(of.shape if need else (0,), dtype) for of, need in ((x, needs[0]), (y, needs[1]))]
    grads.append(scale.new_empty(() if needs[2] else (0,)))
    x, y = _rows_contiguous(x), _rows_contiguous(y)
    kept = kept_rows(x)
    scratch = _scratch.of(_ops().clip_loss_bytes(x, normalize, kept, *grads))
    weight = scale.new_empty(0) if weight is None else weight.contiguous()
    _ops().clip_loss(x, y, float(scale), weight, mean, normalize, kept, scratch, loss, *grads)
    return loss, *grads


def similarity_ranks(x: Tensor, y: Tensor, scale: Tensor, rows: Tensor, cols: Tensor, normalize: bool):
    """The operator's contract: ops.py."""
    S = _Similarity(x, y, scale, normalize, widen=True)
    S.pack(x, y)
    scores = S.x.new_empty(len(rows))
    _ops().pair_scores(*S.args(), rows.contiguous(), cols.contiguous(), scores)
    thresholds = [
        scores.new_full((n,), -torch.inf).scatter_reduce_(0, index, scores, "amax")
        for n, index in ((len(x), rows), (len(y), cols))
    ]
    partials = S.partials(torch.int64)
    ranks = rows.new_empty(len(x)), rows.new_empty(len(y))
    _ops().ranks(*S.args(), *thresholds, *partials, *ranks)
    return ranks


class _Scratch(threading.local):
    """A thread's working memory, kept from call to call: fresh pages would take as long as a small batch's loss."""

    buffer: Tensor | None = None

    def of(self, count: int) -> Tensor:
        """At least `count` bytes."""
        if count > KEPT_BYTES:
            return _new(count, torch.uint8)
        if self.buffer is None or len(self.buffer) < count:
            self.buffer = _new(count, torch.uint8)
        return self.buffer


_scratch = _Scratch()


class _Similarity:
    """Packed x^ and y^ of one call, and what the passes over them share."""

    def __init__(self, x: Tensor, y: Tensor, scale: Tensor, normalize: bool, widen: bool = False) -> None:
        self.dtype, self.panel = accumulation_dtype(x.dtype), _panel(x)
        self.stored = _stored_dtype(x, y, widen)
        self.in_pairs = self.stored != self.dtype
        self.n, self.m, self.d = len(x), len(y), x.shape[1]
        self.width = _padded(self.d, self.panel)
        self.scale, self.normalize = float(scale), normalize
        self.nothing = self.x_factor = self.y_factor = self._empty(0)
        self.slope = torch.empty(0, dtype=torch.float64)
        self.x_length, self.y_length = self._empty(self.n), self._empty(self.m)

    def pack(self, x: Tensor, y: Tensor) -> None:
        """Normalise and lay out."""
        columns = _padded(self.m, self.panel)
        if self.in_pairs and self.normalize:
            self.x_factor, self.y_factor = self._empty(_padded(self.n, self.panel)), self._empty(columns)
        self.x = self._empty(self.n * self.width, self.stored)
        self.y_columns = self._empty(columns * (_padded(self.d, 2) if self.in_pairs else self.d), self.stored)
        self._pack(x, y, self.nothing, self.y_columns)

    def pack_rows(self, x: Tensor, y: Tensor) -> Tensor:
        """Both sides laid out in rows; returns y's."""
        self.x, y_rows = self._empty(self.n * self.width), self._empty(self.m * self.width)
        self._pack(x, y, y_rows, self.nothing)
        return y_rows

    def _pack(self, x: Tensor, y: Tensor, y_rows: Tensor, y_columns: Tensor) -> None:
        sides = (self.x_length, self.x_factor, self.x, self.y_length, self.y_factor, y_rows, y_columns)
        _ops().pack(_rows_contiguous(x), _rows_contiguous(y), self.normalize, *sides)

    def args(self) -> tuple:
        return self.x, self.y_columns, self.x_factor, self.y_factor, self.n, self.m, self.d, self.scale

    def _empty(self, count: int, dtype: torch.dtype | None = None) -> Tensor:
        return _new(count, dtype or self.dtype)

    def sums(self, negatives: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """row_sum, col_sum, row_shift, col_shift, pos; negatives: the positives' columns and the mask."""
        largest = 1.0 if self.normalize else float(self.x_length.max()) * float(self.y_length.max())
        shift = fixed_shift(self.scale * largest, self.n, self.m)
        row_shift, col_shift = (torch.full((rows,), shift, dtype=self.dtype) for rows in (self.n, self.m))
        in_range, row_sum, col_sum, pos = self._sums(negatives, row_shift, col_shift)
        if not in_range:
            row_shift, col_shift = torch.empty_like(row_shift), torch.empty_like(col_shift)
            _ops().maxima(*self.args(), *negatives, *self.partials(self.dtype), row_shift, col_shift)
            row_shift, col_shift = finite_or_zero(row_shift), finite_or_zero(col_shift)
            _, row_sum, col_sum, pos = self._sums(negatives, row_shift, col_shift)
        return row_sum, col_sum, row_shift, col_shift, pos

    def _sums(self, negatives: tuple[Tensor, ...], row_shift: Tensor, col_shift: Tensor) -> tuple:
        """Whether the shifts lost nothing, row_sum, col_sum, pos."""
        out = torch.empty_like(row_shift), torch.empty_like(col_shift), torch.empty_like(row_shift)
        partials = self.partials(torch.float64)
        in_range = _ops().sums(*self.args(), *negatives, row_shift, col_shift, *partials, *out)
        return in_range, *out

    def partials(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Scratch for [column groups, N] and [row groups, M] partial results."""
        row_groups = min(MAX_GROUPS, -(-self.n // BLOCK))
        col_groups = min(MAX_GROUPS, -(-self.m // GROUP_COLUMNS))
        return torch.empty(col_groups * self.n, dtype=dtype), torch.empty(row_groups * self.m, dtype=dtype)

    def room(self, dx: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        """Room for one wave of G, x^'s rows side by side, the rows of y^ that a wave meets, and the positives' G."""
        turned = _ops().y_wave_elements(self.m, self.d, self.dtype == torch.float64) if dx.numel() else 0
        return (
            self._empty(_ops().wave_elements(self.n, self.m)),
            self._empty((self.n + self.n % 2) * self.width if self.in_pairs and dy.numel() else 0, self.stored),
            self._empty(turned, self.stored),
            self._empty(self.n if self.in_pairs else 0),
        )

    def accumulators(self, needs: list[bool]) -> tuple[Tensor, Tensor]:
        """Room for G y^ and G^T x^; empty where neither the gradient nor the scale's needs it."""
        rows = self.n if needs[0] or needs[2] else 0, self.m if needs[1] else 0
        return tuple(self._empty(count * self.width) for count in rows)

    def gradients(self, x, y, scale, dx, dy, needs, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of x and y in `dtype`, and of scale, from the accumulated products."""
        x_side, y_side = self._side(dx, x, needs[0], dtype), self._side(dy, y, needs[1], dtype)
        sides = (_rows_contiguous(x), dx, self.x_factor, *x_side, _rows_contiguous(y), dy, self.y_factor, *y_side)
        _ops().finish(self.scale, self.normalize, *sides)
        (grad_x, inner), (grad_y, _) = x_side, y_side
        slope = self.slope[0] if self.slope.numel() else inner.sum()
        return grad_x, grad_y, slope.to(scale.dtype) if needs[2] else scale.new_empty(0)

    def _side(self, dx: Tensor, x: Tensor, want: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Room for the gradient (in dx's own memory where it fits), and for <x^, dx> [rows], float64."""
        in_place, shape = dx.dtype == dtype and self.width == self.d, (len(x), self.d) if want else (0,)
        grad = dx.view(shape) if want and in_place else _new(shape, dtype)
        return grad, torch.empty(len(x) if dx.numel() else 0, dtype=torch.float64)


def _new(shape, dtype: torch.dtype) -> Tensor:
    """torch.empty; where it is large, on large pages if the system has them."""
    buffer = torch.empty(shape, dtype=dtype)
    if buffer.nbytes >= LARGE_BYTES:
        _ops().expect_large_pages(buffer)
    return buffer


def _stored_dtype(x: Tensor, y: Tensor, widen: bool) -> torch.dtype:
    """Of the packed features: bfloat16 where the processor multiplies it, otherwise what is computed in."""
    is_bf16 = x.dtype == y.dtype == torch.bfloat16
    return torch.bfloat16 if is_bf16 and not widen and _ops().has_bf16_dot() else accumulation_dtype(x.dtype)


def _padded(count: int, panel: int) -> int:
    return -(-count // panel) * panel


def _panel(x: Tensor) -> int:
    """Columns of a panel for x's computing type, on this processor."""
    return _ops().panel(x.dtype == torch.float64)


def _mask_args(mask) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ids and limits, empty without a mask."""
    empty = torch.empty(0, dtype=torch.int64)
    return tuple(empty if part is None else part.contiguous() for part in mask)


def _rows_contiguous(x: Tensor) -> Tensor:
    x = x.detach()
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _ops():
    return torch.ops.fastclip_cpu


@functools.cache
def _load_error() -> str | None:
    """Loads the extension once; the reason where that fails."""
    spec = PathFinder.find_spec("_C", [str(Path(__file__).parents[1])])
    if spec is None or not str(spec.origin).endswith(tuple(EXTENSION_SUFFIXES)):
        note = Path(__file__).parents[1] / "_C_missing.txt"  # left by setup.py
        reason = note.read_text() if note.exists() else "torch and a C++ compiler are needed at install time"
        return f"the extension fastclip._C was not built ({reason})"
    try:
        torch.ops.load_library(spec.origin)
    except OSError as error:
        return f"the extension fastclip._C does not load: {error}"
    return None
