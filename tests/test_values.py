"""Values of every kind: the right result whatever the scale, the lengths of the rows and their likeness.

The dense loss of cases.py is the judge of NaN and Inf; the float64 reference is the judge of everything finite.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import assert_close, dense_loss, device_of, features, truth, value_and_grads

from fastclip import clip_loss


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "as-is"])
@pytest.mark.parametrize("n", [7, 200], ids=["one-tile", "two-blocks"])
def test_nan_and_inf_come_through_as_in_the_dense_loss(backend, value, normalize, n):
    image, text = features(n, 5, backend)
    image[3, 1] = value
    got = value_and_grads(clip_loss, image, text, 10.0, normalize=normalize, backend=backend)
    want = value_and_grads(dense_loss, image, text, 10.0, normalize=normalize)
    for g, w in zip(got, want, strict=True):
        assert w.isnan().any()
        assert torch.equal(g.isnan(), w.isnan())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_scale_nan_or_inf_gives_nan(backend, value):
    image, text = features(7, 5, backend)
    loss, *grads = value_and_grads(clip_loss, image, text, value, backend=backend)
    assert loss.isnan() and all(grad.isnan().all() for grad in grads)


def test_products_that_overflow_float16(backend):
    image, text = features(33, 64, backend, torch.float16)
    image, text = 200 * image, 200 * text  # their products are around 2.6e6, beyond float16's 65504
    assert not dense_loss(image.cpu(), text.cpu(), 1e-4, normalize=False).isfinite()
    got = value_and_grads(clip_loss, image, text, 1e-4, normalize=False, backend=backend)
    want = truth(image, text, 1e-4, normalize=False)
    assert_close(got[:1], want[:1], torch.float32, ulps=1024)
    assert_close(got[1:], want[1:], torch.float16, ulps=2)


def test_rows_of_zeros(backend):
    zeros = torch.zeros(12, 6, device=device_of(backend))
    value, *grads = value_and_grads(clip_loss, zeros, zeros, 100.0, backend=backend)
    assert value.item() == pytest.approx(math.log(12), rel=1e-6)
    assert all(grad.isfinite().all() for grad in grads)


def test_one_row_of_zeros_divides_by_the_eps_of_normalize(backend):
    image, text = features(12, 6, backend)
    image[4] = 0
    got = value_and_grads(clip_loss, image, text, 10.0, backend=backend)
    want = value_and_grads(dense_loss, image.double(), text.double(), 10.0)
    assert got[1][4].abs().max() > 1e9  # |x| was clamped to 1e-12, so that the gradient is divided by it
    assert_close(got, want, torch.float32)


@pytest.mark.parametrize("length", [1e-12, 1e-18, 1e-30, 1e18], ids=str)
def test_very_short_and_very_long_rows(backend, length):
    image, text = features(12, 6, backend)
    image = F.normalize(image, dim=1) * length
    got = value_and_grads(clip_loss, image, text, 10.0, backend=backend)
    want = value_and_grads(dense_loss, image.double(), text.double(), 10.0)
    if length == 1e-12:  # on the edge of the eps each row may fall to either side by a rounding
        got, want = (got[0], *got[2:]), (want[0], *want[2:])
    assert_close(list(got), list(want), torch.float32)


@pytest.mark.parametrize("scale", [0.0, -20.0, 300.0, 1e4, 1e6, -1e4], ids=str)
@pytest.mark.parametrize("noise", [0.1, 1.0, 10.0], ids=["trained", "half-trained", "untrained"])
def test_any_scale(backend, scale, noise):
    image, text = features(50, 16, backend, noise=noise)
    got = value_and_grads(clip_loss, image, text, scale, backend=backend)
    dense = value_and_grads(dense_loss, image, text, scale)
    # S is known to eps |scale| only, whoever computes it: the dense loss in float32 says how much that matters.
    for g, d, w in zip(got, dense, truth(image, text, scale), strict=True):
        assert g.isfinite().all()
        slack = 1e-6 * (1 + abs(scale)) * w.abs().max()
        assert (g - w).norm() <= 2 * (d - w).norm() + slack


@pytest.mark.parametrize("scale", [1e-6, 1.0, -1.0], ids=str)
def test_long_rows_unnormalized(backend, scale):
    image, text = features(50, 16, backend)
    image, text = (1e4 * F.normalize(t, dim=1) for t in (image, text))  # logits of up to 1e8
    got = value_and_grads(clip_loss, image, text, scale, normalize=False, backend=backend)
    want = truth(image, text, scale, normalize=False)
    assert all(g.isfinite().all() for g in got)
    assert_close(got, want, torch.float32, ulps=256 if scale == 1e-6 else 1e4)


def antipodal(d):
    x = F.normalize(torch.randn(30, d, generator=torch.Generator().manual_seed(5)), dim=1)
    return x, -x


def collapsed(d):
    x = torch.randn(1, d, generator=torch.Generator().manual_seed(6)) + 1e-4 * torch.randn(30, d)
    return x, x.flip(0)


def two_camps(d):
    # Half the negatives of each row are at cosine -1 and its own pair too: every sum but one's own camp underflows.
    x = torch.ones(30, d)
    x[15:] *= -1
    return x, -x


@pytest.mark.parametrize("make", [antipodal, collapsed, two_camps], ids=lambda f: f.__name__)
@pytest.mark.parametrize("scale", [100.0, 1e4])
def test_degenerate_batches_take_the_exact_path(backend, make, scale):
    image, text = (t.to(device_of(backend)) for t in make(8))
    got = value_and_grads(clip_loss, image, text, scale, backend=backend)
    dense = value_and_grads(dense_loss, image, text, scale)
    for g, d, w in zip(got, dense, truth(image, text, scale), strict=True):
        assert (g - w).norm() <= 2 * (d - w).norm() + 1e-6 * (1 + scale) * w.abs().max() + 1e-6
