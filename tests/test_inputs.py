"""Inputs of every kind, good and bad: the right result or an error that says what was expected and what came.

The dense loss of cases.py is the judge of NaN and Inf; the float64 reference is the judge of everything finite.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import assert_close, dense_loss, device_of, features, truth, value_and_grads
from hypothesis import given
from hypothesis import strategies as st

from fastclip import available_backends, clip_loss, info_nce, ops

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("image", "text", "said"),
    [
        (X[:0], X[:0], r"at least one row, got \(0, 4\) and \(0, 4\)"),
        (X, X[:5], r"same number of rows N, got \(8, 4\) and \(5, 4\)"),
        (X, X[:, :3], r"same width D, got \(8, 4\) and \(8, 3\)"),
        (X[:, :0], X[:, :0], r"width D of at least 1, got \(8, 0\)"),
        (X[0], X[0], r"\[N, D\], got \(4,\)"),
        (X[None], X[None], r"\[N, D\], got \(1, 8, 4\)"),
    ],
    ids=["no-rows", "unpaired", "two-widths", "no-width", "1-D", "3-D"],
)
def test_shapes_that_do_not_fit(image, text, said):
    with pytest.raises(ValueError, match=said):
        clip_loss(image, text, 1.0)


@pytest.mark.parametrize(
    ("image", "text", "said"),
    [
        (X.long(), X.long(), "float16, bfloat16, float32 or float64, got torch.int64"),
        (X.bool(), X, "got torch.bool"),
        (X.cfloat(), X.cfloat(), "got torch.complex64"),
        (X, X.half(), "one dtype, got torch.float32 and torch.float16"),
        (X, X.double(), "one dtype, got torch.float32 and torch.float64"),
        (X.tolist(), X, "must be a tensor .*, got list"),
        (X.to_sparse(), X, "dense .strided. tensor, got torch.sparse_coo"),
    ],
    ids=["int", "bool", "complex", "half-and-float", "float-and-double", "list", "sparse"],
)
def test_types_that_do_not_fit(image, text, said):
    with pytest.raises(TypeError, match=said):
        clip_loss(image, text, 1.0)


def test_two_devices():
    with pytest.raises(ValueError, match="one device, got cpu and meta"):
        clip_loss(X, X.to("meta"), 1.0)


@pytest.mark.parametrize(
    "scale", [7.0, 7, torch.tensor(7.0), torch.tensor([7.0]), torch.tensor(7), torch.tensor(7.0).double()], ids=repr
)
def test_forms_of_the_scale(backend, scale):
    image, text = features(9, 5, backend)
    got = clip_loss(image, text, scale, backend=backend)
    torch.testing.assert_close(got, clip_loss(image, text, 7.0, backend=backend), rtol=0, atol=0)


def test_gradient_of_a_scale_of_one_element_has_its_shape(backend):
    image, text = features(9, 5, backend)
    scale = torch.tensor([7.0], device=image.device, requires_grad=True)
    clip_loss(image, text, scale, backend=backend).backward()
    assert scale.grad.shape == (1,)
    torch.testing.assert_close(scale.grad[0].cpu().double(), truth(image, text, 7.0)[3], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("shape", [(8, 1), (8,), (1, 1), (0,)], ids=str)
def test_scales_that_would_broadcast(shape):
    with pytest.raises(ValueError, match=r"one number: a float, a 0-d or a \[1\] tensor"):
        clip_loss(X, X, torch.ones(shape))


@pytest.mark.parametrize("scale", ["7", None, True, 1j, torch.tensor(1j)], ids=repr)
def test_scales_that_are_no_number(scale):
    with pytest.raises(TypeError, match="logit_scale"):
        clip_loss(X, X, scale)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"reduction": "max"}, ValueError, "reduction must be .*, got 'max'"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be .*, got 1.5"),
        ({"label_smoothing": -0.1}, ValueError, "label_smoothing"),
        ({"label_smoothing": math.nan}, ValueError, "label_smoothing"),
        ({"weight": [1.0] * 8}, TypeError, "weight must be a tensor .*, got list"),
        ({"weight": torch.ones(7)}, ValueError, r"weight must be \[N\] = \(8,\), got \(7,\)"),
        ({"weight": torch.ones(8, 1)}, ValueError, "weight"),
        ({"weight": torch.ones(8, device="meta")}, ValueError, "weight must be on the features' device cpu, got meta"),
        ({"backend": "gpu"}, ValueError, "backend must be one of .*, got 'gpu'"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_options_that_do_not_fit(options, error, said):
    with pytest.raises(error, match=said):
        clip_loss(X, X, 1.0, **options)


def test_one_pair_has_nothing_to_learn(backend):
    image, text = features(1, 6, backend)
    for normalize in (True, False):
        value, *grads = value_and_grads(clip_loss, image, text, 50.0, normalize=normalize, backend=backend)
        assert value == 0 and all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)
    loss, stats = clip_loss(image, text, 50.0, return_stats=True, backend=backend)
    assert loss == 0 and stats.image_accuracy == 1 and stats.mean_rank == 0
    assert stats.image_lse.isfinite().all()


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


def strided(x: torch.Tensor, how: str) -> torch.Tensor:
    """x's values in other storage; what surrounds them is NaN."""
    n, d = x.shape
    if how == "transposed":
        return x.T.contiguous().T
    if how == "offset":
        big = torch.full((n + 5, d), torch.nan, dtype=x.dtype, device=x.device)
        big[3 : 3 + n] = x
        return big[3 : 3 + n]
    if how == "columns":
        big = torch.full((n, d + 7), torch.nan, dtype=x.dtype, device=x.device)
        big[:, 2 : 2 + d] = x
        return big[:, 2 : 2 + d]
    if how == "every-other":
        big = torch.full((2 * n, 3 * d), torch.nan, dtype=x.dtype, device=x.device)
        big[::2, ::3] = x
        return big[::2, ::3]
    if how == "misaligned":
        flat = torch.full((n * d + 1,), torch.nan, dtype=x.dtype, device=x.device)
        flat[1:] = x.flatten()
        return flat[1:].view(n, d)
    raise ValueError(how)


STORAGE = ["transposed", "offset", "columns", "every-other", "misaligned"]


@pytest.mark.parametrize("how", STORAGE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_storage_does_not_matter(backend, how, dtype):
    image, text = features(23, 19, backend, dtype)
    results = []
    for a, b in ((image, text), (strided(image, how), strided(text, how))):
        assert torch.equal(a, image) and torch.equal(b, text)
        a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
        loss = clip_loss(a, b, 10.0, backend=backend)
        results.append([t.detach().double() for t in (loss, *torch.autograd.grad(loss, (a, b)))])
    # Not bit for bit: BLAS may take another path for other strides.
    assert_close(results[1][:1], results[0][:1], torch.float32, ulps=8)
    assert_close(results[1][1:], results[0][1:], dtype, ulps=32)


def test_rows_that_share_their_memory(backend):
    row = torch.randn(1, 6, device=device_of(backend), requires_grad=True)
    text = torch.randn(9, 6, device=row.device)
    loss = clip_loss(row.expand(9, 6), text, 10.0, backend=backend)
    (grad,) = torch.autograd.grad(loss, row)
    copied = row.detach().repeat(9, 1).requires_grad_()
    (grad_copied,) = torch.autograd.grad(clip_loss(copied, text, 10.0, backend=backend), copied)
    torch.testing.assert_close(grad[0], grad_copied.sum(0), rtol=1e-5, atol=1e-7)


def test_columns_that_share_their_memory(backend):
    column = torch.randn(9, 1, device=device_of(backend))
    text = torch.randn(9, 6, device=column.device)
    got = clip_loss(column.expand(9, 6), text, 10.0, normalize=False, backend=backend)
    assert torch.equal(got, clip_loss(column.repeat(1, 6), text, 10.0, normalize=False, backend=backend))


def test_one_tensor_on_both_sides_gets_both_gradients(backend):
    x, _ = features(40, 8, backend)
    x.requires_grad_()
    (both,) = torch.autograd.grad(clip_loss(x, x, 10.0, backend=backend), x)
    left, right = x.detach().requires_grad_(), x.detach().clone().requires_grad_()
    apart = torch.autograd.grad(clip_loss(left, right, 10.0, backend=backend), (left, right))
    torch.testing.assert_close(both, sum(apart), rtol=0, atol=0)
    assert both.abs().max() > 0


@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1)], ids=["image", "text", "scale", "two"])
def test_only_the_gradients_that_are_wanted_are_computed(backend, wanted, monkeypatch):
    asked = []
    module = __import__(f"fastclip.backends.{backend}", fromlist=["_"])
    original = module.similarity_sums_backward

    def spy(*args):
        asked.append(tuple(args[10]))
        return original(*args)

    monkeypatch.setattr(module, "similarity_sums_backward", spy)
    image, text = features(20, 8, backend)
    inputs = [image, text, torch.tensor(10.0, device=image.device)]
    for tensor, want in zip(inputs, wanted, strict=True):
        tensor.requires_grad_(bool(want))
    clip_loss(*inputs, backend=backend).backward()
    assert asked == [wanted]
    for tensor, want, grad in zip(inputs, wanted, truth(image, text, 10.0)[1:], strict=True):
        assert (tensor.grad is not None) == bool(want)
        if want:
            torch.testing.assert_close(tensor.grad.cpu().double(), grad, rtol=1e-4, atol=1e-6)


def test_no_gradient_wanted_keeps_nothing(backend):
    image, text = features(20, 8, backend)
    assert not clip_loss(image, text, 10.0, backend=backend).requires_grad
    with torch.no_grad():
        assert clip_loss(image.requires_grad_(), text, 10.0, backend=backend).grad_fn is None
    with torch.inference_mode():
        assert clip_loss(image, text, 10.0, backend=backend).isfinite()


def test_autocast_casts_as_a_matrix_product_would(backend):
    image, text = features(20, 8, backend)
    device = image.device.type
    left, right = image.clone().requires_grad_(), text.to(torch.bfloat16).requires_grad_()
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = clip_loss(left, right, 10.0, backend=backend)
    loss.backward()
    want = clip_loss(image.to(torch.bfloat16), text.to(torch.bfloat16), 10.0, backend=backend)
    assert loss.dtype == torch.float32 and torch.equal(loss, want)
    assert (left.grad.dtype, right.grad.dtype) == (torch.float32, torch.bfloat16)
    with torch.autocast(device, enabled=False), pytest.raises(TypeError, match="one dtype"):
        clip_loss(left, right, 10.0, backend=backend)


def test_autocast_leaves_the_arithmetic_in_float32(backend):
    # Backward may run inside the autocast region too: no product of the backends may be cast down on the way.
    image, text = features(64, 32, backend, torch.bfloat16)
    plain = value_and_grads(clip_loss, image, text, 50.0, label_smoothing=0.1, backend=backend)
    with torch.autocast(image.device.type, dtype=torch.bfloat16):
        cast = value_and_grads(clip_loss, image, text, 50.0, label_smoothing=0.1, backend=backend)
    for got, want in zip(cast, plain, strict=True):
        assert torch.equal(got, want)


def test_autocast_leaves_float64_alone(backend):
    image, text = features(20, 8, backend, torch.float64)
    with torch.autocast(image.device.type, dtype=torch.bfloat16):
        loss = clip_loss(image, text, 10.0, backend=backend)
    assert torch.equal(loss, clip_loss(image, text, 10.0, backend=backend))


@pytest.mark.parametrize("bad", [-1, 8, 2**40, -(2**62)], ids=["below", "just-above", "far", "wild"])
def test_the_operator_refuses_positives_out_of_range(backend, bad):
    x = X.to(device_of(backend))
    if x.is_cuda:
        pytest.skip("indices on a device are checked where the user passes them (info_nce), not by the operator")
    positive = torch.arange(8, device=x.device)
    positive[5] = bad
    with pytest.raises((RuntimeError, IndexError, ValueError)):
        ops.similarity_sums(x, x, torch.tensor(1.0), positive, True, backend)
    with pytest.raises((RuntimeError, IndexError, ValueError)):
        ops.similarity_ranks(x, x, torch.tensor(1.0), torch.arange(8), positive, True, backend)


@pytest.mark.parametrize("bad", [-1, 8, 2**40], ids=["below", "just-above", "far"])
def test_labels_out_of_range(bad):
    labels = torch.arange(8)
    labels[5] = bad
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 8\), got"):
        info_nce(X, X, 1.0, labels=labels)


@given(
    n=st.integers(1, 80),
    d=st.integers(1, 70),
    scale=st.floats(-100, 100),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    how=st.tuples(st.sampled_from(STORAGE), st.sampled_from(STORAGE)),
    normalize=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_shape_stride_scale_and_dtype(n, d, scale, dtype, how, normalize, seed):
    for backend in available_backends(torch.empty(1, 1, dtype=dtype)):
        image, text = features(n, d, backend, dtype, seed=seed)
        if not normalize:
            image, text = image / d**0.5, text / d**0.5
        scale = float(torch.tensor(scale, dtype=torch.float32))
        want = truth(image, text, scale, normalize=normalize)
        got = value_and_grads(
            clip_loss, strided(image, how[0]), strided(text, how[1]), scale, normalize=normalize, backend=backend
        )
        dense = value_and_grads(dense_loss, image, text, scale, normalize=normalize)
        longest = 1.0 if normalize else max(t.double().norm(dim=1).max().item() for t in (image, text))
        largest = abs(scale) * longest**2
        slack = 32 * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps * (1 + largest)
        for g, w, plain in zip(got, want, dense, strict=True):
            error, dense_error = (g - w).norm(), (plain - w).norm()
            size = max(w.norm().item(), abs(scale) if w.ndim else 1 + largest)
            assert error <= 2 * torch.nan_to_num(dense_error, nan=0.0, posinf=0.0) + slack * size
