"""The registered operators: schemas, autograd, and any rectangle of pairs."""

import pytest
import torch
from cases import device_of, features, require
from torch.autograd import gradcheck

from fastclip import clip_loss, ops, reference


def rectangle(n: int, m: int, d: int, backend: str, dtype=torch.float64):
    """x [N, D], y [M, D], a scale and each row's positive: some columns serve several rows, others none."""
    generator = torch.Generator().manual_seed(n * m)
    x, y = (torch.randn(rows, d, generator=generator, dtype=torch.float64) for rows in (n, m))
    positive = torch.randint(0, m, (n,), generator=generator)
    x, y, scale = (t.to(device_of(backend), dtype) for t in (x, y, torch.tensor(3.0)))
    require(backend, x)
    return x, y, scale, positive.to(x.device)


def dense_sums(x, y, scale, positive, normalize):
    """log row_sum + row_shift, log col_sum + col_shift and pos, from the whole matrix."""
    S = reference.logits(x, y, scale, normalize=normalize)
    rows = torch.arange(len(S), device=S.device)
    hit = torch.zeros_like(S, dtype=torch.bool)
    hit[rows, positive] = True
    negatives = S.masked_fill(hit, -torch.inf)
    return negatives.logsumexp(1), negatives.logsumexp(0), S[rows, positive]


def log_sums(x, y, scale, positive, normalize, backend):
    row_sum, col_sum, row_shift, col_shift, pos = ops.similarity_sums(x, y, scale, positive, normalize, backend)
    return row_sum.log() + row_shift, col_sum.log() + col_shift, pos


RECTANGLES = {
    "row": (2, 40),
    "column": (40, 2),
    "wide": (7, 193),
    "tall": (193, 7),
    "two-blocks": (200, 390),
    "square": (65, 65),
}


@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "as-is"])
@pytest.mark.parametrize(("n", "m"), RECTANGLES.values(), ids=RECTANGLES.keys())
def test_any_rectangle_and_any_positives(backend, n, m, normalize):
    x, y, scale, positive = rectangle(n, m, 5, backend)
    inputs = [t.requires_grad_() for t in (x, y, scale)]
    results = []
    for sums in (log_sums(*inputs, positive, normalize, backend), dense_sums(*inputs, positive, normalize)):
        weighted = sum((s * torch.linspace(1, 2, len(s)).to(s)).sum() for s in sums)
        results.append([t.detach() for t in (*sums, *torch.autograd.grad(weighted, inputs))])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(("n", "m"), RECTANGLES.values(), ids=RECTANGLES.keys())
def test_ranks_of_any_rectangle(backend, n, m, dtype):
    x, y, scale, positive = rectangle(n, m, 8, backend, dtype)
    rows = torch.arange(n, device=x.device)
    got = ops.similarity_ranks(x, y, scale, rows, positive, True, backend)
    S = reference.logits(x.double(), y.double(), scale.double())
    for g, w in zip(got, reference.ranks(S, rows, positive), strict=True):
        assert g.dtype == torch.int64 and torch.equal(g, w)


@pytest.mark.parametrize("needs", [[True, True, True], [True, False, False], [False, True, True]], ids=str)
def test_opcheck(backend, needs):
    x, y, scale, positive = rectangle(5, 7, 4, backend, torch.float32)
    row_sum, col_sum, row_shift, col_shift, pos = ops.similarity_sums(x, y, scale, positive, True, backend)
    sums = torch.ops.fastclip.similarity_sums.default
    backward = torch.ops.fastclip.similarity_sums_backward.default
    ranks = torch.ops.fastclip.similarity_ranks.default
    torch.library.opcheck(sums, (x, y, scale, positive, True, backend))
    upstream = (torch.rand_like(row_sum), torch.rand_like(col_sum), torch.rand_like(pos))
    torch.library.opcheck(backward, (x, y, scale, positive, row_shift, col_shift, *upstream, True, needs, backend))
    torch.library.opcheck(ranks, (x, y, scale, torch.arange(5, device=x.device), positive, True, backend))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_fake_kernels_know_every_dtype(backend, dtype):
    x, y, scale, positive = rectangle(3, 4, 2, backend, dtype)
    scale = scale.to(torch.float64 if dtype == torch.float64 else torch.float32)
    torch.library.opcheck(torch.ops.fastclip.similarity_sums.default, (x, y, scale, positive, False, backend))


def test_fake_kernels_refuse_two_devices():
    x, positive = torch.randn(3, 2), torch.arange(3)
    with pytest.raises(ValueError, match="one device, got cpu, meta"):
        torch.ops.fastclip.similarity_sums(x.to("meta"), x.to("meta"), torch.tensor(1.0), positive, True, "")


@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "as-is"])
def test_gradcheck(backend, normalize):
    image, text = features(7, 3, backend, torch.float64)
    scale = torch.tensor(2.0, dtype=torch.float64, device=image.device)
    inputs = [t.requires_grad_() for t in (image, text, scale)]
    weight = torch.linspace(0.5, 2, 7, dtype=torch.float64, device=image.device)

    def loss(image, text, scale):
        return clip_loss(
            image,
            text,
            scale,
            normalize=normalize,
            weight=weight,
            label_smoothing=0.1,
            reduction="none",
            backend=backend,
        )

    assert gradcheck(loss, inputs)


def test_gradcheck_on_the_exact_path(backend):
    # Cosines of about -1 at scale 200: a fixed shift would underflow, so that each row and column has its own.
    image, _ = features(6, 3, backend, torch.float64)
    image = torch.nn.functional.normalize(image[:1] + 0.05 * image, dim=1)
    inputs = [t.requires_grad_() for t in (image, (-image).detach().clone())]

    def loss(image, text):
        return clip_loss(image, text, 200.0, backend=backend)

    shift = ops.similarity_sums(*inputs, torch.tensor(200.0).double(), torch.arange(6), True, backend)[2].detach()
    assert (shift != shift[0]).any()
    assert gradcheck(loss, inputs)


def test_second_backward_needs_the_graph_to_be_kept(backend):
    image, text = features(8, 4, backend)
    image.requires_grad_()
    loss = clip_loss(image, text, 5.0, backend=backend)
    loss.backward(retain_graph=True)
    first = image.grad.clone()
    loss.backward()
    assert torch.equal(image.grad, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_changing_features_before_backward_is_caught(backend):
    image, text = features(8, 4, backend)
    image.requires_grad_()
    loss = clip_loss(image, text, 5.0, backend=backend)
    text.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["eager", "triton", "cuda"])
def test_runs_on_the_current_stream(backend):
    image, text = (t.cuda() for t in features(512, 64))
    require(backend, image)
    want = clip_loss(image, text, 10.0, backend=backend)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # what the default stream sees before this is over is zeros
        late_image, late_text = image * 1, text * 1
        got = clip_loss(late_image, late_text, 10.0, backend=backend)
    stream.synchronize()
    assert torch.equal(got, want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("backend", ["eager", "triton", "cuda"])
def test_runs_on_a_device_that_is_not_the_current_one(backend):
    image, text = features(100, 32)
    require(backend, image.cuda(0))
    results = [clip_loss(image.cuda(i), text.cuda(i), 10.0, backend=backend) for i in range(2)]
    assert [r.device.index for r in results] == [0, 1]
    torch.testing.assert_close(results[0].cpu(), results[1].cpu())
