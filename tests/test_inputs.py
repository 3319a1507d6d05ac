"""What the losses refuse, with an error that says what was expected and what came, and the forms that they accept."""

import math

import pytest
import torch
from cases import device_of, features, truth, value_and_grads

from fastclip import clip_loss, info_nce, ops

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
