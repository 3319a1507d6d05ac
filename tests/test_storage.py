"""Tensors of every kind of storage, precision and wish for gradients: the same numbers come out."""

import pytest
import torch
from cases import assert_close, dense_loss, device_of, features, truth, value_and_grads
from hypothesis import given
from hypothesis import strategies as st

from fastclip import available_backends, clip_loss


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

    def spy_on(name, needs):
        original = getattr(module, name)
        spy = lambda *args: (asked.append(tuple(args[needs])), original(*args))[1]  # noqa: E731
        monkeypatch.setattr(module, name, spy)

    spy_on("similarity_sums_backward", 10)
    if hasattr(module, "clip_loss"):
        spy_on("clip_loss", 6)
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
