"""Every variant of the losses against the dense float64 definition (fastclip/reference.py), on every backend."""

from functools import partial

import pytest
import torch
from variants import VARIANTS, case, value_and_gradients

import fastclip
from fastclip import reference

BACKENDS = fastclip.available_backends(torch.empty(1, 1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_against_the_dense_definition(variant, backend):
    for seed in range(100):
        loss = case(variant, seed)
        got = value_and_gradients(partial(loss.fast, backend=backend), loss.inputs, torch.float64)
        want = value_and_gradients(loss.dense, loss.inputs, torch.float64)
        for g, w in zip(got, want, strict=True):
            # A gradient that is exactly 0 (N = 1) is measured against 1e-3, the size that rounding of S alone gives it.
            assert (g - w).abs().max() <= 1e-8 * w.abs().max().clamp_min(1e-3), (variant, seed)


def test_matryoshka_is_the_weighted_sum_over_leading_widths():
    x, y = torch.randn(30, 17), torch.randn(30, 17)
    loss = fastclip.MatryoshkaLoss(fastclip.clip_loss, [4, 8, 17], [0.5, 1.0, 2.0])
    parts = [fastclip.clip_loss(x[:, :w].contiguous(), y[:, :w].contiguous(), 10.0) for w in (4, 8, 17)]
    torch.testing.assert_close(loss(x, y, 10.0), 0.5 * parts[0] + parts[1] + 2.0 * parts[2])
    with pytest.raises(ValueError, match="at most D = 17"):
        fastclip.MatryoshkaLoss(fastclip.clip_loss, [18])(x, y, 10.0)


def test_value_only_without_gradients(monkeypatch):
    """Under no_grad the sigmoid asks its backend for no gradient at all."""
    seen = []
    run = fastclip.backends.eager.sigmoid_loss
    monkeypatch.setattr(
        fastclip.backends.eager, "sigmoid_loss", lambda *args: (seen.append(list(args[7])), run(*args))[1]
    )
    x, y = torch.randn(9, 4, requires_grad=True), torch.randn(9, 4)
    with torch.no_grad():
        fastclip.siglip_loss(x, y, 10.0, -5.0, backend="eager")
    fastclip.siglip_loss(x, y, 10.0, -5.0, backend="eager")
    assert seen == [[False] * 4, [True, False, False, False]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_ranks_recall_and_topk_with_several_captions_an_image(backend):
    image, text = torch.randn(40, 16), torch.randn(200, 16)
    owner = torch.arange(200) % 40
    S = reference.logits(image.double(), text.double(), 1.0)
    by_image, by_text = fastclip.retrieval_ranks(image, text, image_of_text=owner, backend=backend)
    true_image, true_text = reference.ranks(S, owner, torch.arange(200))
    assert torch.equal(by_image, true_image) and torch.equal(by_text, true_text)
    assert fastclip.recall_at_k(by_text, 5) == (true_text < 5).double().mean().item()
    scores, indices = fastclip.topk(image, text, 7)
    assert torch.equal(indices, S.topk(7, dim=1).indices)
    torch.testing.assert_close(scores.double(), S.topk(7, dim=1).values, rtol=0, atol=1e-6)


def test_topk_in_chunks_is_topk_at_once(monkeypatch):
    query, gallery = torch.randn(50, 8), torch.randn(70, 8)
    whole = fastclip.topk(query, gallery, 3)
    monkeypatch.setattr(fastclip.metrics, "CHUNK_ELEMENTS", 200)
    torch.testing.assert_close(fastclip.topk(query, gallery, 3), whole)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, y: fastclip.info_nce(x, y[:3], 1.0), ValueError, "at least N = 5 rows, got 3"),
        (lambda x, y: fastclip.info_nce(x, y, 1.0, labels=torch.tensor([0, 1, 2, 3, 5])), ValueError, r"\[0, 5\)"),
        (lambda x, y: fastclip.info_nce(x, y, 1.0, labels=torch.tensor([0, 1, 2, 3, -1])), ValueError, "got -1 to 3"),
        (lambda x, y: fastclip.info_nce(x, y, 1.0, labels=torch.rand(5)), TypeError, "integer tensor"),
        (lambda x, y: fastclip.info_nce(x, y, 1.0, ids=torch.arange(5)), ValueError, "both be given"),
        (lambda x, y: fastclip.clip_loss(x, y, 1.0, ids=torch.arange(4)), ValueError, r"ids must be \[5\]"),
        (lambda x, y: fastclip.clip_loss(x, y, 1.0, ids=torch.arange(5), ids_mode="no"), ValueError, "ids_mode"),
        (
            lambda x, y: fastclip.clip_loss(x, y, 1.0, false_negative_margin=0.1, label_smoothing=0.1),
            ValueError,
            "label_smoothing",
        ),
        (lambda x, y: fastclip.siglip_loss(x, y, 1.0, torch.zeros(5)), ValueError, "logit_bias must be one number"),
        (lambda x, y: fastclip.distill_loss(x, y, 1.0, x[:3], y[:3], 1.0), ValueError, "same N pairs, got 5 and 3"),
        (lambda x, y: fastclip.topk(x, y, 6), ValueError, "between 1 and the gallery's 5 rows, got 6"),
        (lambda x, y: fastclip.recall_at_k(torch.arange(5), 0), ValueError, "k must be at least 1"),
        (lambda x, y: fastclip.retrieval_ranks(x, y, image_of_text=torch.full((5,), 5)), ValueError, "image_of_text"),
        (lambda x, y: fastclip.clip_loss(x, y, 1.0, group=object()), TypeError, "ProcessGroup"),
    ],
)
def test_bad_input_says_expected_and_got(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(5, 3), torch.randn(5, 3))


@pytest.mark.parametrize(
    "loss",
    [
        lambda x, y: fastclip.clip_loss(x, y, 10.0, ids=torch.arange(len(x)) // 2),
        lambda x, y: fastclip.clip_loss(x, y, 10.0, false_negative_margin=0.1),
        lambda x, y: fastclip.siglip_loss(x, y, 10.0, -5.0),
        lambda x, y: fastclip.siglip_loss(x, y, 10.0, -5.0, reduction="none").sum(),
        lambda x, y: fastclip.info_nce(x, y, 10.0, symmetric=True, query_negatives=True, key_negatives=True),
        lambda x, y: fastclip.distill_loss(x, y, 10.0, x.detach(), y.detach(), 5.0),
    ],
    ids=["ids", "margin", "siglip", "siglip rows", "nt-xent", "distill"],
)
def test_autograd_keeps_memory_linear_in_n(loss):
    def kept(n: int) -> int:
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x, y = torch.randn(n, 8, requires_grad=True), torch.randn(n, 8, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss(x, y)
        return sum(storages.values())

    assert kept(6000) < 4.5 * kept(1500)


@pytest.mark.parametrize("name", ["siglip_loss", "distill_loss"])
def test_compile_fullgraph_and_functional_grad(name):
    x, y = torch.randn(24, 6), torch.randn(24, 6)
    more = (-5.0,) if name == "siglip_loss" else (x.flip(0), y.flip(0), 5.0)

    def loss(x):
        return getattr(fastclip, name)(x, y, 10.0, *more)

    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(leaf), leaf)
    (compiled,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(leaf), leaf)
    torch.testing.assert_close(compiled, grad)
    torch.testing.assert_close(torch.func.grad(loss)(x), grad)
    batch = torch.vmap(torch.func.grad(loss))(torch.stack([x, y]))
    torch.testing.assert_close(batch[0], grad)
    (twice,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        twice.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_pair_left_out_may_score_far_above_all_negatives(dtype, backend):
    """Its exponential under the negatives' shift overflows: no gradient may notice."""
    image, text = torch.eye(4, dtype=dtype), torch.eye(4, dtype=dtype).flip(0)
    image, text = image.requires_grad_(), text.requires_grad_()
    ids = torch.tensor([0, 1, 1, 0])
    fastclip.clip_loss(image, text, 2000.0, ids=ids, ids_mode="ignore", backend=backend).backward()
    assert image.grad.isfinite().all() and text.grad.isfinite().all()
