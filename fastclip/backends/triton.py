"""The Triton backend: kernels/ on an NVIDIA GPU, cuBLAS for the two plain GEMMs of backward. Contracts: ops.py.

float16 and bfloat16 run on the tensor cores; float32 follows torch.backends.cuda.matmul (IEEE products unless TF32 is
allowed); float64 is left to the eager backend. Nothing waits for the host, so a CUDA graph can capture every call.
"""

import functools
import importlib.util
import os

import torch
from torch import Tensor

from fastclip.checks import early_gradient_dtype

OLDEST = (3, 6)  # Triton
MAX_COLUMNS = 2**31 - 2**14  # rows and columns are counted in int32; every offset is int64

DEVICE = "cuda"


def why_not(x: Tensor | None) -> str | None:
    return _why_not_here() or (None if x is None else _why_not_tensor(x))


@functools.cache
def _why_not_here() -> str | None:
    """What this machine lacks; asked once, since every call of an operator asks why_not."""
    if not torch.cuda.is_available() and not interpreted():
        return "no CUDA device"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton; CUDA wheels of torch bring it)"
    import triton

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST:
        return f"it needs Triton {OLDEST[0]}.{OLDEST[1]} or newer, got {triton.__version__}"
    return None


def _why_not_tensor(x: Tensor) -> str | None:
    if interpreted():
        if x.is_cuda:
            return "TRITON_INTERPRET is set, which runs the kernels on the CPU"
        if x.dtype == torch.bfloat16:
            return "Triton's interpreter multiplies bfloat16 wrongly"
    elif not x.is_cuda:
        return f"it runs on CUDA tensors, got one on {x.device}"
    elif torch.version.hip is None and torch.cuda.get_device_capability(x.device) < (8, 0):
        return "it needs compute capability 8.0 or newer"
    if x.dtype == torch.float64:
        return "it computes in float32; float64 features are left to the eager backend"
    if x.shape[0] > MAX_COLUMNS:
        return f"it takes at most {MAX_COLUMNS:,} rows, got {x.shape[0]:,}"
    return None


def describe() -> str:
    import triton

    where = "interpreter" if interpreted() else torch.cuda.get_device_name()
    return f"Triton {triton.__version__} on {where}"


def interpreted() -> bool:
    """Whether TRITON_INTERPRET=1: the kernels then run on the CPU, slowly, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def precision(x: Tensor) -> str:
    """How float32 products are formed: "tf32" where torch allows it, else "ieee". Ignored by the 16-bit types."""
    if x.dtype != torch.float32:
        return "tf32"
    chosen = torch.backends.cuda.matmul.fp32_precision
    chosen = torch.backends.fp32_precision if chosen == "none" else chosen
    return "tf32" if chosen == "tf32" else "ieee"


def similarity_sums(x: Tensor, y: Tensor, scale: Tensor, positive: Tensor, normalize: bool, mask):
    """The operator's contract: ops.py."""
    from fastclip.kernels import configs, forward, masked

    with torch.cuda.device_of(x):
        S = _Problem(x, y, normalize, mask)
        args = (scale, positive.contiguous())
        if S.mask is None:
            return forward.similarity_sums(S.x, S.y, *args, precision(x), configs.workspace())
        return masked.masked_sums(S.x, S.y, *args, S.mask, precision(x), configs.workspace())


def similarity_sums_backward(x, y, scale, positive, row_shift, col_shift, a, b, d, normalize, needs, mask):
    """Gradients of x, y and scale; an empty tensor where `needs` says no."""
    from fastclip.kernels import backward, configs

    with torch.cuda.device_of(x):
        S = _Problem(x, y, normalize, mask)
        positive, row_shift, col_shift, a, b, d = (t.contiguous() for t in (positive, row_shift, col_shift, a, b, d))
        grads = backward.similarity_sums_backward(
            x, y, S.x, S.y, scale, positive, row_shift, col_shift, a, b, d, S.mask, needs, precision(x),
            configs.workspace(),
        )  # fmt: skip
        return _or_empty(grads, (x.dtype, y.dtype, scale.dtype), x)


def similarity_products(x, y, scale, positive, row_shift, col_shift, a, b, d, normalize, x_values, y_values):
    """The operator's contract: ops.py."""
    from fastclip.kernels import backward, configs

    with torch.cuda.device_of(x):
        S = _Problem(x, y, normalize, None)
        vectors = (t.contiguous() for t in (positive, row_shift, col_shift, a, b, d))
        return backward.similarity_products(
            S.x, S.y, scale, *vectors, x_values.contiguous(), y_values.contiguous(), precision(x), configs.workspace()
        )


def sigmoid_loss(x, y, scale, bias, positive, row_weight, normalize, needs, mask, match_is_positive):
    """The operator's contract: sigmoid.py."""
    from fastclip.kernels import configs, masked, sigmoid

    with torch.cuda.device_of(x):
        S = _Problem(x, y, normalize, None)
        codes = None if mask.row_ids is None else masked.codes(mask.row_ids, mask.col_ids)
        dtype = early_gradient_dtype(x.dtype)
        row_loss, *grads = sigmoid.sigmoid_loss(
            x, y, S.x, S.y, scale, bias, positive.contiguous(), row_weight.contiguous(), codes, match_is_positive,
            needs, precision(x), configs.workspace(), dtype,
        )  # fmt: skip
        return row_loss, *_or_empty(grads, (dtype, dtype, scale.dtype, bias.dtype), x)


def similarity_ranks(x: Tensor, y: Tensor, scale: Tensor, rows: Tensor, cols: Tensor, normalize: bool):
    """The operator's contract: ops.py."""
    from fastclip.kernels import ranks

    with torch.cuda.device_of(x):
        S = _Problem(x, y, normalize, None)
        return ranks.similarity_ranks(S.x.rows, S.y.rows, scale, rows, cols, precision(x))


class _Problem:
    """Both operands of a call, and its mask as the kernels take it."""

    def __init__(self, x: Tensor, y: Tensor, normalize: bool, mask):
        from fastclip.kernels import masked
        from fastclip.kernels.operands import operand

        self.x, self.y = operand(x, normalize), operand(y, normalize)
        self.mask = None
        if mask is not None and mask.row_ids is not None:
            limits = (limit.float().contiguous() for limit in (mask.row_limit, mask.col_limit))
            self.mask = masked.Mask(*masked.codes(mask.row_ids, mask.col_ids), *limits)


def _or_empty(grads, dtypes: tuple[torch.dtype, ...], like: Tensor) -> tuple[Tensor, ...]:
    """The gradients in these dtypes; an empty tensor for None."""
    return tuple(
        like.new_empty(0, dtype=dtype) if grad is None else grad.to(dtype)
        for grad, dtype in zip(grads, dtypes, strict=True)
    )
