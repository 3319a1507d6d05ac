"""`fastclip tune`: measure the Triton kernels' tiles on this GPU and keep the fastest in the user's table.

Nothing else in fastclip measures tiles: a training step uses the table it finds. The table is
kernels/configs.py's user_file(), $FASTCLIP_TUNE_FILE or ~/.config/fastclip/tiles.json.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastclip.backends import triton as backend

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOLERANCE = {"bf16": 2e-2, "fp16": 4e-3, "fp32": 4e-3}  # between two tilings of one problem
TIMED_MS = 60  # a candidate's measurement


@dataclass(frozen=True)
class TuneConfig:
    """Measure the Triton kernels' tiles on this GPU and keep the fastest in ~/.config/fastclip/tiles.json."""

    widths: tuple[int, ...] = (512, 768, 1024)
    """Embedding widths D."""
    sizes: tuple[int, ...] = (8192, 32768)
    """Batch sizes N."""
    dtypes: tuple[str, ...] = ("bf16",)
    """Dtypes of the features: bf16, fp16, fp32."""
    kernels: tuple[str, ...] = ("sums", "gradient", "sigmoid", "sigmoid_gradient")
    """Kernels, as configs.KERNELS names them: sums, gradient, sigmoid, sigmoid_gradient, masked, ranks."""

    def __post_init__(self) -> None:
        for field, given, known in (("dtypes", self.dtypes, DTYPES), ("kernels", self.kernels, RUNS)):
            if not given or set(given) - set(known):
                raise ValueError(f"--{field} takes one or more of {', '.join(known)}; got {' '.join(given) or 'none'}")


def tune(config: TuneConfig, tell: Callable[[str], None] = print) -> Path:
    """Measures every kernel of the config; returns the file that holds the fastest tiles.

    Raises RuntimeError, with the reason, where the Triton backend cannot run.
    """
    reason = backend.why_not(None)
    if reason is not None:
        raise RuntimeError(f"fastclip tune measures on a GPU: {reason}")
    from fastclip.kernels import configs

    device = torch.device("cuda", torch.cuda.current_device())
    for dtype in config.dtypes:
        for width in config.widths:
            for rows in config.sizes:
                x, y = _features(rows, width, DTYPES[dtype], device)
                precision = backend.precision(x)
                product = configs.product_of(x.dtype, precision)
                for kernel in config.kernels:
                    tiles, line = _fastest(kernel, x, y, precision, product, TOLERANCE[dtype])
                    key = configs.user_key(kernel, configs.chip_of(device), product, x.shape[1], rows)
                    # At once: whatever ends the run, what has been measured stays.
                    file = configs.save_user_table({key: tiles}, torch.cuda.get_device_name(device))
                    tell(f"{key}: {line}")
    return file


def candidates(product: str, kernel: str) -> list:
    """Tiles worth trying, the smaller ones for IEEE products; squares alone for ranks (kernels/ranks.py)."""
    from fastclip.kernels.configs import Tiles

    depth = {"half": 64, "tf32": 32, "ieee": 16}[product]
    if product == "ieee":
        shapes = [(64, 64, 4), (128, 64, 8), (64, 128, 8), (128, 128, 8)]
    else:
        shapes = [(128, 128, 4), (128, 128, 8), (128, 256, 8), (256, 128, 8), (64, 128, 4), (128, 64, 4), (64, 256, 4)]
    return [
        Tiles(BN=rows, BM=columns, BD=depth, GROUP=group, warps=warps, stages=stages)
        for rows, columns, warps in shapes
        for stages in ((2, 3) if product == "ieee" else (3, 4))
        for group in (8, 16)
        if kernel != "ranks" or rows == columns
    ]


def _fastest(kernel: str, x: Tensor, y: Tensor, precision: str, product: str, tolerance: float):
    """The fastest tiles whose result agrees with the built-in ones', and a line about them."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError
    from triton.testing import do_bench

    from fastclip.kernels import configs

    run = RUNS[kernel](x, y, precision)
    default = configs.built_in(kernel, configs.chip_of(x.device), product)
    with configs.forced(kernel, default):
        expected, default_ms = run().double(), do_bench(run, rep=TIMED_MS, return_mode="median")
    best, best_ms = default, default_ms
    for tiles in candidates(product, kernel):
        try:
            with configs.forced(kernel, tiles):
                error = (run().double() - expected).norm() / expected.norm()
                took_ms = do_bench(run, rep=TIMED_MS, return_mode="median")
        except (OutOfResources, PTXASError, CompilationError):
            continue
        if error <= tolerance and took_ms < best_ms:
            best, best_ms = tiles, took_ms
    return best, f"{best} {best_ms:.3f} ms, built in {default_ms:.3f} ms"


def _features(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Operands x~, y~ [N, DP] of related pairs."""
    from fastclip.kernels.operands import operand

    draw = torch.Generator(device).manual_seed(0)
    x = torch.randn(rows, width, generator=draw, device=device)
    y = x + 2 * torch.randn(rows, width, generator=draw, device=device)
    return operand(x.to(dtype), True).rows, operand(y.to(dtype), True).rows


def _sums(x: Tensor, y: Tensor, precision: str):
    from fastclip.kernels import configs, forward
    from fastclip.kernels.operands import operand

    x_op, y_op, scale, positive = operand(x, False), operand(y, False), _scalar(x, 50.0), _diagonal(x)
    return lambda: forward.similarity_sums(x_op, y_op, scale, positive, precision, configs.workspace())[1]


def _gradient(x: Tensor, y: Tensor, precision: str):
    from fastclip.kernels.gradient import Gradient

    zero, ones = torch.zeros(len(x), device=x.device), torch.ones(len(x), device=x.device)
    return _block(x, lambda: Gradient(x, y, _scalar(x, 1.0), _diagonal(x), zero, zero, ones, ones, precision))


def _masked(x: Tensor, y: Tensor, precision: str):
    from fastclip.kernels.masked import Mask, MaskedGradient

    zero, ones = torch.zeros(len(x), device=x.device), torch.ones(len(x), device=x.device)
    code = torch.arange(len(x), device=x.device, dtype=torch.int32)
    mask = Mask(code, code, ones, ones)
    args = (x, y, _scalar(x, 1.0), _diagonal(x), zero, zero, ones, ones)
    return _block(x, lambda: MaskedGradient(*args, mask, precision))


def _sigmoid(x: Tensor, y: Tensor, precision: str):
    def run() -> Tensor:
        one = _sigmoid_pass(x, y, precision, None)
        one.value(slice(0, min(len(x), 8192)))
        return one.loss[:8192]

    return run


def _sigmoid_gradient(x: Tensor, y: Tensor, precision: str):
    return _block(x, lambda: _sigmoid_pass(x, y, precision, torch.ones(len(x), device=x.device)))


def _ranks(x: Tensor, y: Tensor, precision: str):
    from fastclip.kernels import ranks

    index = _diagonal(x)
    return lambda: ranks.similarity_ranks(x, y, _scalar(x, 1.0), index, index, precision)[0]


def _sigmoid_pass(x: Tensor, y: Tensor, precision: str, weight: Tensor | None):
    from fastclip.kernels.operands import operand
    from fastclip.kernels.sigmoid import SigmoidPass

    args = (operand(x, False), operand(y, False), _scalar(x, 10.0), _scalar(x, -10.0), _diagonal(x))
    return SigmoidPass(*args, precision, weight, None, False)


def _block(x: Tensor, make):
    """Runs one block of G, of the size that a backward pass would use."""
    from fastclip.kernels import configs

    rows, columns = configs.wave(len(x), len(x), x.shape[1], x.element_size(), configs.workspace())
    g = x.new_zeros(rows, columns)

    def run() -> Tensor:
        make().fill(g, slice(0, min(rows, len(x))), slice(0, min(columns, len(x))))
        return g[: min(256, len(x))]

    return run


def _scalar(x: Tensor, value: float) -> Tensor:
    return torch.full((), value, device=x.device)


def _diagonal(x: Tensor) -> Tensor:
    return torch.arange(len(x), device=x.device)


# Kernel -> builds a function that runs it and returns something to compare.
RUNS = {
    "sums": _sums,
    "gradient": _gradient,
    "masked": _masked,
    "sigmoid": _sigmoid,
    "sigmoid_gradient": _sigmoid_gradient,
    "ranks": _ranks,
}
