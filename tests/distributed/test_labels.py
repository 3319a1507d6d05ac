"""info_nce with labels over 2 and 3 ranks: as accurate as the dense loss over all keys in one process.

The measure is tests/test_accuracy.py's: the error against the float64 reference, relative to what a quantity is made
of, is at most twice the dense loss's own in the same dtype, plus a few units in the last place.

Legend: query [N, D], key [M, D] of all ranks; labels [N] columns of all keys.
"""

import pytest
import torch
import torch.nn.functional as F
from rank_cases import pairs_steps
from test_accuracy import ULPS, antipodal, collapsed, half_trained, random_batch
from test_options import joined
from torch import Tensor

from fastclip import reference

WIDTH = 9
# Queries and keys of each rank, and labels: what users do.
LAYOUTS = {
    "a positive and a hard negative each": ((4, 4), (8, 8), 2 * torch.arange(8)),
    "three ranks, uneven, the keys elsewhere": ((1, 7, 4), (2, 9, 5), torch.arange(12).roll(5) + 3),
    "fewer keys than queries": ((6, 3), (1, 3), torch.tensor([3, 0, 3, 3, 2, 1, 1, 0, 3])),
    "all for one key": ((3, 3, 3), (2, 2, 2), torch.full((9,), 4)),
    "past the kernels' tiles": ((70, 67), (67, 80), (torch.arange(137) * 5) % 147),
}
# What the features are like, the scale, and whether rows are normalised.
KINDS = {
    "random": (random_batch, 10.0, True),
    "half-trained": (half_trained, 60.0, True),
    "collapsed": (collapsed, 30.0, True),
    "antipodal": (antipodal, 30.0, True),
    "scale 0": (random_batch, 0.0, True),
    "scale -20": (random_batch, -20.0, True),
    "scale 300": (half_trained, 300.0, True),
    "scale 1e4, untrained": (random_batch, 1e4, True),
    "rows as they are": (random_batch, 0.3, False),
}


def dense(query: Tensor, key: Tensor, scale: Tensor, labels: Tensor, symmetric: bool, normalize: bool) -> Tensor:
    """What users would write in one process."""
    if normalize:
        query, key = F.normalize(query, dim=1), F.normalize(key, dim=1)
    S = scale * (query @ key.T)
    loss = F.cross_entropy(S, labels)
    return (loss + F.cross_entropy(S[:, labels].T, torch.arange(len(S)))) / 2 if symmetric else loss


def truth(query: Tensor, key: Tensor, scale: Tensor, labels: Tensor, symmetric: bool, normalize: bool) -> Tensor:
    return reference.info_nce(query, key, scale, labels=labels, symmetric=symmetric, normalize=normalize).mean()


def in_one_process(loss, dtype: torch.dtype, query: Tensor, key: Tensor, scale: float, *options) -> dict[str, Tensor]:
    """Value and gradients of the whole batch, computed in dtype from the same rounded inputs."""
    x, y = (t.detach().to(dtype).requires_grad_() for t in (query, key))
    multiplier = torch.tensor(scale, dtype=query.dtype).to(dtype).requires_grad_()
    value = loss(x, y, multiplier, *options)
    value.backward()
    return {"value": value.detach(), "x": x.grad, "y": y.grad, "scale": multiplier.grad}


def natural_sizes(query: Tensor, key: Tensor, scale: float, labels: Tensor, symmetric: bool, normalize: bool) -> dict:
    """What each quantity is made of before anything cancels: test_accuracy.py's, with a column for each label."""
    x, y = query.double(), key.double()
    x_length, y_length = (t.norm(dim=1, keepdim=True) if normalize else torch.ones(1) for t in (x, y))
    x, y = x / x_length, y / y_length
    S, own = scale * x @ y.T, F.one_hot(labels, len(key)).double()
    bound = abs(scale) * x.norm(dim=1).max() * y.norm(dim=1).max()
    rows, cols = S.softmax(1), S.softmax(0)
    W = rows + bound * rows * (1 - rows) + own
    if symmetric:
        W = 0.5 * (W + (cols + bound * cols * (1 - cols)) * own.sum(0) + own)
    W = W / len(x)
    by_x, by_y = abs(scale) * (W @ y.abs()) / x_length, abs(scale) * (W.T @ x.abs()) / y_length
    return {"value": bound, "x": by_x, "y": by_y, "scale": (W * (x.abs() @ y.abs().T)).sum()}


def error(got: Tensor, want: Tensor, size: Tensor) -> float:
    distance = (got.double() - want).norm().item()
    return distance / size.norm().item() if size.norm() else distance


def batches(queries: int, keys: int, dtype: torch.dtype):
    """(name, query, key, scale, normalize) of every kind."""
    for index, (name, (make, scale, normalize)) in enumerate(KINDS.items()):
        x, y = make(torch.Generator().manual_seed(index), max(queries, keys), WIDTH, torch.float64)
        yield name, x[:queries].to(dtype), y[:keys].to(dtype), scale, normalize


@pytest.mark.parametrize("mode", ["gather", "ring"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("symmetric", [False, True], ids=["one way", "symmetric"])
@pytest.mark.parametrize(("x_sizes", "y_sizes", "labels"), LAYOUTS.values(), ids=LAYOUTS)
def test_as_accurate_as_the_dense_loss_over_all_keys(pool, x_sizes, y_sizes, labels, symmetric, dtype, mode):
    made = list(batches(sum(x_sizes), sum(y_sizes), dtype))
    cases = [
        ("info_nce", mode, (x_sizes, y_sizes), query, key, {"scale": scale}, options)
        for _, query, key, scale, normalize in made
        for options in [{"labels": labels, "symmetric": symmetric, "normalize": normalize}]
    ]
    ranks = pool.run(pairs_steps, cases, world=len(x_sizes))
    slack = ULPS * torch.finfo(dtype).eps
    for (name, *inputs, normalize), shares in zip(made, zip(*ranks, strict=True), strict=True):
        got, arguments = joined([share for share, _ in shares]), (*inputs, labels, symmetric, normalize)
        want, theirs = in_one_process(truth, torch.float64, *arguments), in_one_process(dense, dtype, *arguments)
        size = natural_sizes(*arguments)
        size["value"] = torch.maximum(size["value"], want["value"])
        for quantity in want:
            ours, their = (error(one[quantity], want[quantity], size[quantity]) for one in (got, theirs))
            assert ours <= 2 * their + slack, f"{name}, {quantity}: {ours:.1e}, dense {their:.1e}"


def test_no_labels_are_the_numbers_of_each_ranks_first_keys(pool):
    """Labels that say what no labels mean give the same, up to the order of summation."""
    x_sizes, y_sizes = (3, 2, 4), (5, 2, 6)
    _, query, key, scale, _ = next(batches(9, 13, torch.float32))
    labels = torch.tensor([0, 1, 2, 5, 6, 7, 8, 9, 10])
    for mode in ("gather", "ring"):
        cases = [
            ("info_nce", mode, (x_sizes, y_sizes), query, key, {"scale": scale}, options)
            for options in ({"symmetric": True}, {"symmetric": True, "labels": labels})
        ]
        for steps in pool.run(pairs_steps, cases, world=3):
            (without, _), (with_labels, _) = steps
            for name in without:
                torch.testing.assert_close(with_labels[name], without[name], rtol=1e-6, atol=1e-7)
