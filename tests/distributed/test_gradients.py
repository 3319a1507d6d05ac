"""Under DistributedDataParallel, value and averaged gradients are those of the whole batch in one process.

The measure is tests/test_accuracy.py's: the error against the float64 reference, relative to what a quantity is made
of, is at most twice the dense loss's own in the same dtype, plus a few units in the last place. The encoders are linear
and start as the identity: their weight's gradient is dx^T x, made of size(dx)^T |x|.
"""

import pytest
import torch
import torch.nn.functional as F
from cases import dense_loss
from rank_cases import Pair, ddp_steps, fsdp_step
from test_accuracy import ULPS, antipodal, collapsed, half_trained, natural_sizes, random_batch, trained
from torch import Tensor

from fastclip import reference

# Rows of each rank: one rank, even, uneven, ranks with a single row (no negatives of their own), sizes past the CPU
# kernels' tiles of 6 rows and panels of 16 and 64 columns.
SIZES = [(6,), (4, 4), (5, 3), (70, 67), (4, 4, 4), (1, 7, 4), (1, 1, 1), (3, 3, 3, 3), (2, 6, 3, 5)]
EVERY_KIND = SIZES[2::3]
WIDTH = 9
# What the features are like, the scale, and whether rows are normalised.
KINDS = {
    "random": (random_batch, 10.0, True),
    "half-trained": (half_trained, 60.0, True),
    "trained": (trained, 100.0, True),
    "collapsed": (collapsed, 30.0, True),
    "antipodal": (antipodal, 30.0, True),
    "scale 0": (random_batch, 0.0, True),
    "scale -20": (random_batch, -20.0, True),
    "scale 300": (half_trained, 300.0, True),
    "scale 1e4": (half_trained, 1e4, True),
    "scale 1e4, untrained": (random_batch, 1e4, True),
    "rows as they are": (random_batch, 0.3, False),
    "long rows as they are": (half_trained, 30.0, False),
}
DTYPES = (torch.float32, torch.float64)


def make_cases(sizes: tuple[int, ...], dtypes=DTYPES) -> list[tuple]:
    """(sizes, x, y, scale, normalize) of every dtype and kind, or of each third kind."""
    made = []
    for index, (make, scale, normalize) in list(enumerate(KINDS.values()))[:: 1 if sizes in EVERY_KIND else 3]:
        generator = torch.Generator().manual_seed(index)
        x, y = make(generator, sum(sizes), WIDTH, torch.float64)
        made.extend((sizes, x.to(dtype), y.to(dtype), scale, normalize) for dtype in dtypes)
    return made


def dense_sigmoid(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, *, normalize: bool) -> Tensor:
    if normalize:
        x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
    z = 2.0 * torch.eye(len(x), dtype=x.dtype) - 1.0
    return -F.logsigmoid(z * (scale * x @ y.T + bias)).sum() / len(x)


def reference_sigmoid(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, *, normalize: bool) -> Tensor:
    return reference.siglip_loss(x, y, scale, bias, normalize=normalize).mean()


def in_one_process(loss, sigmoid: bool, dtype: torch.dtype, x: Tensor, y: Tensor, scale: float, normalize: bool):
    """Value and gradients of the whole batch, computed in `dtype`; the parameters are rounded as x's dtype has them."""
    model = Pair(x.shape[1], scale, -5.0, x.dtype).to(dtype)
    *features, multiplier, bias = model(x.to(dtype), y.to(dtype))
    value = loss(*features, multiplier, *([bias] if sigmoid else []), normalize=normalize)
    (value + 0.0 * bias).backward()
    return {"loss": value.detach()} | {name: p.grad for name, p in model.named_parameters()}


def sizes_of(sigmoid: bool, x: Tensor, y: Tensor, scale: float, normalize: bool, loss: Tensor) -> dict[str, Tensor]:
    """What each quantity is made of before anything cancels."""
    of_loss, of_x, of_y, of_scale = natural_sizes(x, y, scale, normalize)
    of_bias = torch.tensor(1.0)
    if sigmoid:
        of_loss, of_x, of_y, of_scale, of_bias = sigmoid_sizes(x.double(), y.double(), scale, normalize)
    return {
        "loss": torch.maximum(of_loss, loss),
        "scale": of_scale * (scale if scale > 0 else 1.0),
        "bias": of_bias,
        "image.weight": of_x.T @ x.double().abs(),
        "image.bias": of_x.sum(0),
        "text.weight": of_y.T @ y.double().abs(),
        "text.bias": of_y.sum(0),
    }


def sigmoid_sizes(x: Tensor, y: Tensor, scale: float, normalize: bool) -> tuple[Tensor, ...]:
    """natural_sizes for the pairwise sigmoid: a logit t is known to eps (B + |bias|), whoever computes it."""
    x_length, y_length = (t.norm(dim=1, keepdim=True) if normalize else torch.ones(1) for t in (x, y))
    x, y = x / x_length, y / y_length
    t = scale * x @ y.T - 5.0
    bound = abs(scale) * x.norm(dim=1).max() * y.norm(dim=1).max() + 5.0
    slope = torch.sigmoid(torch.where(torch.eye(len(x)).bool(), -t, t))
    W = (slope + bound * slope * (1 - slope)) / len(x)
    by_x, by_y = abs(scale) * (W @ y.abs()) / x_length, abs(scale) * (W.T @ x.abs()) / y_length
    return bound * slope.sum() / len(x), by_x, by_y, (W * (x.abs() @ y.abs().T)).sum(), W.sum()


def error(got: Tensor, want: Tensor, size: Tensor) -> float:
    distance = (got.double() - want).norm().item()
    return distance / size.norm().item() if size.norm() else distance


def assert_as_good_as_dense(loss: str, case: tuple, runs: list[list[dict[str, Tensor]]]) -> None:
    """runs: in each mode each rank's value and averaged gradients."""
    _, x, y, scale, normalize = case
    sigmoid = loss == "siglip_loss"
    of_dense, of_truth = (dense_sigmoid, reference_sigmoid) if sigmoid else (dense_loss, reference.clip_loss)
    want = in_one_process(of_truth, sigmoid, torch.float64, x, y, scale, normalize)
    dense = in_one_process(of_dense, sigmoid, x.dtype, x, y, scale, normalize)
    size = sizes_of(sigmoid, x, y, scale, normalize, want["loss"])
    slack = ULPS * torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
    theirs = {name: error(dense[name], want[name], size[name]) for name in want}
    for steps in runs:
        got = steps[0]
        assert all(torch.equal(step[name], got[name]) for step in steps for name in got), "the ranks differ"
        for name in want:
            ours = error(got[name], want[name], size[name])
            message = f"{case[0]} scale {scale} {x.dtype} {name}: {ours:.1e}, dense {theirs[name]:.1e}"
            assert ours <= 2 * theirs[name] + slack, message


def check(pool, loss: str, made: list[tuple], world: int | str) -> None:
    """Every case in both modes."""
    both = [pool.run(ddp_steps, [(loss, mode, *case) for case in made], world=world) for mode in ("gather", "ring")]
    by_case = [list(zip(*ranks, strict=True)) for ranks in both]
    for case, *runs in zip(made, *by_case, strict=True):
        assert_as_good_as_dense(loss, case, runs)


losses = pytest.mark.parametrize("loss", ["clip_loss", "siglip_loss"])


@losses
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_averaged_gradients_are_the_whole_batches(pool, sizes, loss):
    check(pool, loss, make_cases(sizes), len(sizes))


@losses
def test_bfloat16(pool, loss):
    check(pool, loss, make_cases((2, 6, 3, 5), (torch.bfloat16,)), 4)


@losses
def test_a_subgroup_whose_ranks_have_other_numbers_in_the_whole(pool, loss):
    check(pool, loss, make_cases((4, 4)), "odd")


@pytest.mark.parametrize("mode", ["gather", "ring"])
@pytest.mark.parametrize("sizes", [(4, 4), (5, 3)], ids=str)
def test_fsdp2(pool, sizes, mode):
    """FSDP2 averages as DDP does; the logit scale, one number, is a parameter [1]."""
    for kind in ("random", "half-trained", "scale 1e4"):
        make, scale, _ = KINDS[kind]
        x, y = make(torch.Generator().manual_seed(0), sum(sizes), WIDTH, torch.float64)
        steps = pool.run(fsdp_step, mode, sizes, x, y, scale, world=len(sizes))
        for step in steps:
            step.update({name: step[name].reshape(()) for name in ("scale", "bias")})
        assert_as_good_as_dense("clip_loss", (sizes, x, y, scale, True), [steps])
