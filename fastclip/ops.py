"""Operator schemas, fake kernels and autograd. The quadratic work of every softmax loss is one operator.

Legend: x [N, D], y [M, D] features; scale 0-d; positive [N] int64, the column of each row's positive.
All sums are taken over the negatives only (math.md, eq. 2):

    row_sum_i = sum_{j != positive_i}    exp(S_ij - row_shift_i)      [N]
    col_sum_j = sum_{i: positive_i != j} exp(S_ij - col_shift_j)      [M]
    pos_i     = S_{i, positive_i}                                     [N]

Vectors are float32 (float64 for float64 features), natural log. The shifts are constants: they carry no gradient.
"""

import torch
from torch import Tensor

from fastclip import backends
from fastclip.checks import accumulation_dtype

_lib = torch.library.Library("fastclip", "DEF")
_lib.define(
    "similarity_sums(Tensor x, Tensor y, Tensor scale, Tensor positive, bool normalize, str backend)"
    " -> (Tensor row_sum, Tensor col_sum, Tensor row_shift, Tensor col_shift, Tensor pos)"
)
_lib.define(
    "similarity_sums_backward(Tensor x, Tensor y, Tensor scale, Tensor positive, Tensor row_shift, Tensor col_shift,"
    " Tensor grad_row_sum, Tensor grad_col_sum, Tensor grad_pos, bool normalize, bool[3] needs, str backend)"
    " -> (Tensor grad_x, Tensor grad_y, Tensor grad_scale)"
)
_lib.define(
    "similarity_ranks(Tensor x, Tensor y, Tensor scale, Tensor rows, Tensor cols, bool normalize, str backend)"
    " -> (Tensor row_rank, Tensor col_rank)"
)


def similarity_sums(
    x: Tensor, y: Tensor, scale: Tensor, positive: Tensor, normalize: bool, backend: str | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """row_sum, col_sum, row_shift, col_shift, pos (the legend above), differentiable in x, y and scale."""
    return _SimilaritySums.apply(x, y, scale, positive, normalize, backend or "")


def similarity_ranks(
    x: Tensor, y: Tensor, scale: Tensor, rows: Tensor, cols: Tensor, normalize: bool, backend: str | None
) -> tuple[Tensor, Tensor]:
    """row_rank [N] and col_rank [M], int64: how many entries of a row (column) of S beat its best correct one.

    The correct pairs are (rows[n], cols[n]), int64 [P]. Beats: is not less than or equal, so that a NaN never passes
    for a hit. A row or column without a correct pair is beaten by all its entries. No gradient.
    """
    args = (x.detach(), y.detach(), scale.detach(), rows, cols, normalize, backend or "")
    return torch.ops.fastclip.similarity_ranks(*args)


class _SimilaritySums(torch.autograd.Function):
    """G_ij = exp(S_ij - shift) (a_i + b_j) off the positives, from the two vectors a and b alone (math.md, eq. 6)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, y, scale, positive, normalize, backend):
        return torch.ops.fastclip.similarity_sums(x, y, scale, positive, normalize, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, y, scale, positive, ctx.normalize, ctx.backend = inputs
        _, _, row_shift, col_shift, _ = output
        ctx.save_for_backward(x, y, scale, positive, row_shift, col_shift)
        ctx.mark_non_differentiable(row_shift, col_shift)

    @staticmethod
    def backward(ctx, grad_row_sum, grad_col_sum, _row_shift, _col_shift, grad_pos):
        needs = list(ctx.needs_input_grad[:3])
        grads = _SimilaritySumsBackward.apply(
            *ctx.saved_tensors, grad_row_sum, grad_col_sum, grad_pos, ctx.normalize, needs, ctx.backend
        )
        return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), None, None, None


class _SimilaritySumsBackward(torch.autograd.Function):
    """A node of its own, tied to every input, so that differentiating twice raises on every path."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, y, scale, positive, row_shift, col_shift, a, b, d, normalize, needs, backend):
        return torch.ops.fastclip.similarity_sums_backward(
            x, y, scale, positive, row_shift, col_shift, a, b, d, normalize, needs, backend
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_grads):
        raise RuntimeError("fastclip losses are differentiable once: a gradient of their gradient is not available")


def _sums(x, y, scale, positive, normalize, backend):
    return backends.choose(x, backend).similarity_sums(x, y, scale, positive, normalize)


def _sums_backward(x, y, scale, positive, row_shift, col_shift, a, b, d, normalize, needs, backend):
    run = backends.choose(x, backend).similarity_sums_backward
    return run(x, y, scale, positive, row_shift, col_shift, a, b, d, normalize, needs)


def _ranks(x, y, scale, rows, cols, normalize, backend):
    return backends.choose(x, backend).similarity_ranks(x, y, scale, rows, cols, normalize)


def _fake_sums(x, y, scale, positive, normalize, backend):
    _same_device(x, y, scale, positive)
    rows = x.new_empty(x.shape[0], dtype=accumulation_dtype(x.dtype))
    cols = y.new_empty(y.shape[0], dtype=rows.dtype)
    return rows, cols, torch.empty_like(rows), torch.empty_like(cols), torch.empty_like(rows)


def _fake_sums_backward(x, y, scale, positive, row_shift, col_shift, a, b, d, normalize, needs, backend):
    _same_device(x, y, scale, positive, row_shift, col_shift, a, b, d)
    shapes = (x.shape, y.shape, ())
    dtypes = (x.dtype, y.dtype, scale.dtype)
    return tuple(
        x.new_empty(shape if need else (0,), dtype=dtype)
        for shape, dtype, need in zip(shapes, dtypes, needs, strict=True)
    )


def _fake_ranks(x, y, scale, rows, cols, normalize, backend):
    _same_device(x, y, scale, rows, cols)
    return rows.new_empty(x.shape[0]), cols.new_empty(y.shape[0])


def _vmap_by_loop(op):
    """A batch of problems one after the other: each is large enough to fill the machine."""

    def rule(info, in_dims, *args):
        runs = [
            op(*(arg.select(dim, i) if isinstance(dim, int) else arg for arg, dim in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        outputs = tuple(torch.stack(output) for output in zip(*runs, strict=True))
        return outputs, (0,) * len(outputs)

    return rule


def _same_device(*tensors: Tensor) -> None:
    devices = {str(tensor.device) for tensor in tensors}
    if len(devices) > 1:
        raise ValueError(f"fastclip operators take tensors of one device, got {', '.join(sorted(devices))}")


for _name, _impl, _fake in (
    ("similarity_sums", _sums, _fake_sums),
    ("similarity_sums_backward", _sums_backward, _fake_sums_backward),
    ("similarity_ranks", _ranks, _fake_ranks),
):
    _lib.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastclip::{_name}", _fake, lib=_lib)
    torch.library.register_vmap(f"fastclip::{_name}", _vmap_by_loop(getattr(torch.ops.fastclip, _name)), lib=_lib)
