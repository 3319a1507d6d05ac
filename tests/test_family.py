"""Every variant of the losses against the dense float64 definition (fastclip/reference.py), on every backend."""

import random

import pytest
import torch

import fastclip
from fastclip import reference

BACKENDS = fastclip.available_backends(torch.empty(1, 1))
SOFTMAX_OPTIONS = ("plain", "smoothing", "positive", "positive+smoothing", "ignore", "margin", "hardness")


def features(seed: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries [N, D] and at least as many keys [M, D]; sizes from one pair to several row tiles, ragged."""
    generator = torch.Generator().manual_seed(seed)
    rng = random.Random(seed)
    n = rng.choice([1, 2, 5, 17, 60, 200])
    m, d = n + rng.choice([0, 0, 3, 30]), rng.choice([2, 5, 16, 33])
    query = torch.randn(n, d, generator=generator, dtype=torch.float64)
    key = torch.randn(m, d, generator=generator, dtype=torch.float64)
    key[:n] += rng.choice([0.0, 1.0]) * query
    return query.to(dtype), key.to(dtype)


def errors(fast, dense, inputs) -> list[float]:
    """Relative errors of the value and of each input's gradient, both weighted by random numbers per pair."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    values, truth = fast(*inputs), dense(*exact)
    upstream = torch.rand(truth.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    grads = torch.autograd.grad((values * upstream.to(values.dtype)).sum(), inputs)
    true_grads = torch.autograd.grad((truth * upstream).sum(), exact)
    pairs = [(values, truth), *zip(grads, true_grads, strict=True)]
    # A gradient that is exactly 0 (N = 1) is measured against 1e-3, the size that rounding of S alone gives it.
    return [((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-3)).item() for a, b in pairs]


def options_of(kind: str, query, key, labels, seed: int) -> dict:
    chosen = {}
    if "smoothing" in kind:
        chosen["label_smoothing"] = 0.2
    if "positive" in kind or kind == "ignore":
        generator = torch.Generator().manual_seed(seed)
        key_ids = torch.randint(0, max(1, len(key) // 2), (len(key),), generator=generator)
        own = torch.arange(len(query)) if labels is None else labels
        chosen.update(ids=key_ids[own], key_ids=key_ids, ids_mode="ignore" if kind == "ignore" else "positive")
    if kind == "margin":
        chosen["false_negative_margin"] = 0.1
    if kind == "hardness":
        chosen["hardness"] = 3.0
    return chosen


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", SOFTMAX_OPTIONS)
def test_info_nce_against_the_dense_definition(kind, backend):
    for seed in range(24):
        rng = random.Random(f"{kind}{seed}")
        query, key = features(seed, torch.float64)
        labels = rng.choice(
            [None, torch.randperm(len(key), generator=torch.Generator().manual_seed(seed))[: len(query)]]
        )
        if kind in ("plain", "ignore", "positive") and rng.random() < 0.3:  # several queries share a key
            labels = torch.randint(0, len(key), (len(query),), generator=torch.Generator().manual_seed(seed))
        directions = dict.fromkeys(("symmetric", "query_negatives", "key_negatives", "normalize"))
        chosen = {name: rng.random() < 0.5 for name in directions} | options_of(kind, query, key, labels, seed)
        scale = torch.tensor(rng.choice([1.0, 5.0, 20.0]), dtype=torch.float64)
        worst = errors(
            lambda q, k, s: fastclip.info_nce(q, k, s, labels=labels, reduction="none", backend=backend, **chosen),
            lambda q, k, s: reference.info_nce(q, k, s, labels=labels, **chosen),
            (query, key, scale),
        )
        assert max(worst) < 1e-8 and all(e == e for e in worst), (seed, chosen, worst)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", SOFTMAX_OPTIONS)
def test_clip_loss_is_the_symmetric_info_nce(kind, backend):
    for seed in range(12):
        image, text = features(seed, torch.float64)
        text = text[: len(image)]
        chosen = options_of(kind, image, text, None, seed)
        ids = chosen.pop("key_ids", None)
        both = {"ids": ids, "key_ids": ids} if ids is not None else {}
        single = chosen | ({"ids": ids} if ids is not None else {})
        worst = errors(
            lambda x, y, s: fastclip.clip_loss(x, y, s, reduction="none", backend=backend, **single),
            lambda x, y, s: reference.info_nce(x, y, s, symmetric=True, **(chosen | both)),
            (image, text, torch.tensor(7.0, dtype=torch.float64)),
        )
        assert max(worst) < 1e-8 and all(e == e for e in worst), (seed, worst)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ids_mode", [None, "positive", "ignore"])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_siglip_loss_against_the_dense_definition(reduction, ids_mode, backend):
    for seed in range(16):
        image, text = features(seed, torch.float64)
        text = text[: len(image)]
        ids = torch.randint(0, max(1, len(image) // 2), (len(image),), generator=torch.Generator().manual_seed(seed))
        chosen = {"normalize": seed % 2 == 0} | ({"ids": ids, "ids_mode": ids_mode} if ids_mode else {})
        weight = torch.rand(len(image), dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.1

        def dense(x, y, s, b):
            losses = reference.siglip_loss(x, y, s, b, **chosen) * weight
            return {"none": losses, "sum": losses.sum(), "mean": losses.sum() / weight.sum()}[reduction]

        worst = errors(
            lambda x, y, s, b: fastclip.siglip_loss(
                x,
                y,
                s,
                b,
                weight=weight,
                reduction=reduction,
                backend=backend,
                **chosen,
            ),
            dense,
            (image, text, torch.tensor(10.0, dtype=torch.float64), torch.tensor(-5.0, dtype=torch.float64)),
        )
        assert max(worst) < 1e-8 and all(e == e for e in worst), (seed, worst)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("teacher_scale", [1.0, 100.0])
def test_distill_loss_against_the_dense_definition(teacher_scale, backend):
    for seed in range(16):
        image, text = features(seed, torch.float64)
        text = text[: len(image)]
        normalize = seed % 2 == 0
        generator = torch.Generator().manual_seed(seed)
        teacher = [torch.randn(len(image), 11, generator=generator, dtype=torch.float64) for _ in range(2)]
        T = reference.logits(*teacher, teacher_scale, normalize=normalize)
        worst = errors(
            lambda x, y, s: fastclip.distill_loss(
                x,
                y,
                s,
                *teacher,
                teacher_scale,
                normalize=normalize,
                backend=backend,
            ),
            lambda x, y, s: reference.distill_loss(reference.logits(x, y, s, normalize=normalize), T),
            (image, text, torch.tensor(10.0, dtype=torch.float64)),
        )
        assert max(worst) < 1e-8 and all(e == e for e in worst), (seed, worst)


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

    assert kept(4096) < 4.5 * kept(1024)


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
