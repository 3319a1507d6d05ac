"""clip_loss against the float64 reference, torch's cross_entropy and examples worked by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import assert_close, device_of, features, require, sizes, truth, value_and_grads

from fastclip import clip_loss, reference


def from_logits(logits: list[list[float]], backend: str, **options):
    """clip_loss of given logits: with text = identity and no normalisation, S is the image features themselves."""
    S = torch.tensor(logits, dtype=torch.float32, device=device_of(backend))
    return clip_loss(S, torch.eye(len(S), device=S.device), 1.0, normalize=False, backend=backend, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("n", **sizes())
def test_equals_the_reference(backend, n, dtype):
    image, text = features(n, 37, backend, dtype)
    got = value_and_grads(clip_loss, image, text, 20.0, backend=backend)
    assert_close(got, truth(image, text, 20.0), dtype)


@pytest.mark.parametrize("d", **sizes("one", "tile", "panel-1", "panel", "wide-panel+1", "block+1"))
def test_any_width(backend, d):
    image, text = features(40, d, backend, torch.float32)
    got = value_and_grads(clip_loss, image, text, 2.0, normalize=False, backend=backend)
    assert_close(got, truth(image, text, 2.0, normalize=False), torch.float32, ulps=2048)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision_loses_nothing_but_the_rounding_of_its_gradients(backend, dtype):
    image, text = features(101, 48, backend, dtype)
    value, *grads = value_and_grads(clip_loss, image, text, 20.0, backend=backend)
    want, *want_grads = truth(image, text, 20.0)
    assert_close([value], [want], torch.float32)
    assert_close(grads[:2], want_grads[:2], dtype, ulps=1)
    assert_close(grads[2:], want_grads[2:], torch.float32)


def test_dtypes_of_results(backend):
    for dtype, loss_dtype in (
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        image = torch.randn(4, 8, device=device_of(backend)).to(dtype)
        if dtype == torch.float64 and backend not in ("cpu", "eager"):
            continue  # backends that compute in float32 refuse it: test_setup.py
        image.requires_grad_()
        scale = torch.ones((), dtype=torch.float16, device=image.device, requires_grad=True)
        loss = clip_loss(image, image.detach(), scale, backend=backend)
        loss.backward()
        assert (loss.dtype, image.grad.dtype, scale.grad.dtype) == (loss_dtype, dtype, torch.float16)
        assert loss.shape == scale.grad.shape == ()


LOGITS = [[10.0, 2.0, 3.0], [2.0, 10.0, 4.0], [3.0, 5.0, 10.0]]


def test_worked_example_three_by_three(backend):
    S, labels = torch.tensor(LOGITS), torch.arange(3)
    rows, columns = F.cross_entropy(S, labels, reduction="none"), F.cross_entropy(S.T, labels, reduction="none")
    by_hand = [math.log(math.exp(10) + math.exp(row[0]) + math.exp(row[1])) - 10 for row in ((2, 3), (2, 4), (3, 5))]
    torch.testing.assert_close(rows, torch.tensor(by_hand), rtol=1e-3, atol=0)

    loss, stats = from_logits(LOGITS, backend, return_stats=True)
    torch.testing.assert_close(loss.cpu(), (rows.mean() + columns.mean()) / 2, rtol=1e-4, atol=0)
    torch.testing.assert_close((stats.image_lse - 10).cpu(), rows, rtol=0, atol=2e-6)
    torch.testing.assert_close((stats.text_lse - 10).cpu(), columns, rtol=0, atol=2e-6)
    per_pair = from_logits(LOGITS, backend, reduction="none")
    torch.testing.assert_close(per_pair.cpu(), (rows + columns) / 2, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        # Softmax 0.7 / 0.3 in both rows and both columns: the loss is -log 0.7.
        ([[math.log(7), math.log(3)], [math.log(3), math.log(7)]], 0.3567),
        # 0.9 / 0.05 / 0.05, symmetric: -log 0.9.
        ([[math.log(18), 0, 0], [0, math.log(18), 0], [0, 0, math.log(18)]], 0.1054),
    ],
    ids=["two-class", "three-class"],
)
def test_worked_example_probabilities(backend, logits, expected):
    assert from_logits(logits, backend).item() == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_reduction_weight_and_smoothing_equal_cross_entropys(backend, smoothing, reduction, weighted):
    image, text = features(23, 16, backend, torch.float32)
    weight = torch.linspace(0.0, 2.0, 23) if weighted else None  # the first pair has weight 0
    device_weight = None if weight is None else weight.to(image.device)

    def by_cross_entropy(image, text, scale):
        S, labels = reference.logits(image, text, scale), torch.arange(len(image))
        losses = sum(F.cross_entropy(L, labels, label_smoothing=smoothing, reduction="none") for L in (S, S.T)) / 2
        losses = losses if weight is None else losses * weight.double()
        divisor = 1 if reduction != "mean" else len(S) if weight is None else weight.sum()
        return losses if reduction == "none" else losses.sum() / divisor

    def upstream(loss):
        # "none" returns a vector: its gradients are tested under an upstream gradient that differs from pair to pair.
        def total(*args, **options):
            value = loss(*args, **options)
            return (value * torch.linspace(1, 2, 23).to(value)).sum() if reduction == "none" else value

        return total

    options = {"weight": device_weight, "label_smoothing": smoothing, "reduction": reduction, "backend": backend}
    got = value_and_grads(upstream(clip_loss), image, text, 9.0, **options)
    want = value_and_grads(upstream(by_cross_entropy), image.cpu().double(), text.cpu().double(), 9.0)
    assert_close(got, want, torch.float32)
    assert clip_loss(image, text, 9.0, **options).shape == ((23,) if reduction == "none" else ())


def test_gradient_of_the_weights(backend):
    image, text = features(9, 8, backend, torch.float32)
    weight = torch.rand(9, device=image.device).requires_grad_()
    clip_loss(image, text, 5.0, weight=weight, reduction="sum", backend=backend).backward()
    per_pair = clip_loss(image, text, 5.0, reduction="none", backend=backend)
    torch.testing.assert_close(weight.grad, per_pair)


def test_stats_equal_the_dense_matrix(backend):
    image, text = features(101, 8, backend, torch.float32, noise=1.5)
    loss, stats = clip_loss(image, text, 10.0, return_stats=True, backend=backend)
    S = reference.logits(image.cpu().double(), text.cpu().double(), 10.0)
    beaten_rows, beaten_columns = S.diagonal()[:, None] < S, S.diagonal() < S
    expected = {
        "image_lse": S.logsumexp(1),
        "text_lse": S.logsumexp(0),
        "image_accuracy": (beaten_rows.sum(1) == 0).double().mean(),
        "text_accuracy": (beaten_columns.sum(0) == 0).double().mean(),
        "losses": (2 * S.diagonal() - S.logsumexp(1) - S.logsumexp(0)) / -2,
        "mean_rank": (beaten_rows.double().sum(1).mean() + beaten_columns.double().sum(0).mean()) / 2,
    }
    assert 0.05 < expected["image_accuracy"] < 0.95  # the batch tells a hit from a miss
    for name, want in expected.items():
        got = getattr(stats, name)
        assert got.dtype == torch.float32 and not got.requires_grad
        torch.testing.assert_close(got.cpu().double(), want, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert torch.equal(loss, clip_loss(image, text, 10.0, backend=backend))


def test_stats_leave_the_gradient_alone(backend):
    image, text = features(11, 8, backend, torch.float32)

    def with_stats(*args, **options):
        return clip_loss(*args, return_stats=True, **options)[0]

    plain = value_and_grads(clip_loss, image, text, 10.0, backend=backend)
    for got, want in zip(value_and_grads(with_stats, image, text, 10.0, backend=backend), plain, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("n", **sizes("two", "tile+1", "ragged", "block+1"))
def test_exact_duplicates_tie_and_a_tie_is_no_miss(backend, n):
    image, _ = features(n, 24, backend, torch.float32)
    image = image[torch.arange(n) // 2 * 2]  # every pair comes twice
    _, stats = clip_loss(image, image, 30.0, return_stats=True, backend=backend)
    assert (stats.image_accuracy, stats.text_accuracy, stats.mean_rank) == (1.0, 1.0, 0.0)


def test_a_nan_never_counts_as_a_hit(backend):
    image, text = features(10, 8, backend, torch.float32, noise=0.0)
    image[3, 2] = torch.nan
    _, stats = clip_loss(image, text, 10.0, return_stats=True, backend=backend)
    assert stats.image_lse[3].isnan()
    # Row 3 is lost, and every column holds a NaN that may be its best candidate.
    assert stats.image_accuracy.item() == pytest.approx(0.9)
    assert stats.text_accuracy.item() == 0.0


def test_float32_scale_of_a_float64_loss_keeps_its_dtype(backend):
    image, text = features(5, 4, backend, torch.float64)
    require(backend, image)
    scale = torch.tensor(3.0, dtype=torch.float32, device=image.device, requires_grad=True)
    loss = clip_loss(image, text, scale, backend=backend)
    loss.backward()
    assert loss.dtype == torch.float64 and scale.grad.dtype == torch.float32


def test_a_group_that_is_none_is_refused():
    x = torch.randn(2, 3)
    with pytest.raises(TypeError, match="ProcessGroup or None, got object"):
        clip_loss(x, x, 1.0, group=object())
