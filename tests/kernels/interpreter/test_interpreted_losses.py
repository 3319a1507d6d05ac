"""Every loss through the Triton backend, interpreted on the CPU, beside the float64 reference.

The error allowed is the dense PyTorch loss's own in the same dtype (design: error on average below it), here at most
twice on a single case plus a few units in the last place of the quantity's natural size.
"""

import pytest
import torch
from cases import dense_loss, features, truth, value_and_grads

from fastclip import clip_loss, info_nce, siglip_loss
from fastclip.kernels import configs
from fastclip.kernels.configs import Tiles

DTYPES = [torch.float32, torch.float16]
# Tiles here are 32 x 64 (conftest.py); operands are padded to 128 bytes a row.
SIZES = {"one": 1, "two": 2, "tile-1": 31, "tile": 64, "tile+1": 65}
WIDTHS = {"d1": 1, "d-odd": 33, "d-two-steps": 65}


def triton_loss(image, text, scale, **options):
    return clip_loss(image, text, scale, backend="triton", **options)


def sizes_of(got, want, scale):
    """Natural size of each quantity, in which a rounding of S by eps * scale shows as eps: math.md, eq. 7."""
    logit, n = 1.0 + abs(scale), len(want[1])
    gradients = (logit / n**0.5 + logit * want[i].norm() for i in (1, 2))
    return [logit, *gradients, 1.0 + logit * want[3].abs()]


def assert_within_dense_budget(image, text, scale, ulps=8, **options):
    got = value_and_grads(triton_loss, image, text, scale, **options)
    want = truth(image, text, scale, **options)
    dense = value_and_grads(dense_loss, image, text, scale, **options)
    eps = torch.finfo(image.dtype).eps
    names = ("loss", "grad image", "grad text", "grad scale")
    for name, g, w, d, size in zip(names, got, want, dense, sizes_of(got, want, scale), strict=True):
        error, allowed = (g - w).norm(), 2 * (d - w).norm().nan_to_num(torch.inf) + ulps * eps * size
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", WIDTHS.values(), ids=WIDTHS.keys())
@pytest.mark.parametrize("n", SIZES.values(), ids=SIZES.keys())
def test_clip_loss(n, d, dtype):
    image, text = features(n, d, "cpu", dtype)
    assert_within_dense_budget(image, text, 10.0)


def degenerate(case, dtype):
    image, text = features(40, 33, "cpu", torch.float64)
    if case == "collapsed":
        image, text = 1 + 1e-3 * image, 1 + 1e-3 * text
    elif case == "antipodal":
        image, text = 1 + 1e-2 * image, -1 + 1e-2 * text
    elif case == "trained":
        text = image + 1e-3 * text
    elif case == "zero-rows":
        image[::3] = 0
    return image.to(dtype), text.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.0, -20.0, 100.0, 300.0, 1e4])
@pytest.mark.parametrize("case", ["collapsed", "antipodal", "trained", "zero-rows", "random"])
def test_degenerate_batches(case, scale, dtype):
    assert_within_dense_budget(*degenerate(case, dtype), scale)


@pytest.mark.parametrize("noise", [0.5, 0.3])
def test_well_trained_losses_keep_their_relative_accuracy(noise):
    # Losses of 1e-6 and below, where a log-sum-exp minus a logit has no digits left.
    image, text = features(48, 512, "cpu", noise=noise)
    got, want = value_and_grads(triton_loss, image, text, 60.0), truth(image, text, 60.0)
    assert want[0] < 1e-5
    for g, w in zip(got, want, strict=True):
        assert (g - w).norm() <= 1e-4 * w.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_features_taken_as_they_are(dtype):
    image, text = features(40, 64, "cpu", dtype)
    assert_within_dense_budget(0.2 * image, 3.0 * text, 1.0, normalize=False)
    assert_within_dense_budget(0.2 * image[:, :33], 3.0 * text[:, :33], 1.0, normalize=False)


@pytest.mark.parametrize("view", ["transposed", "sliced", "offset", "expanded"])
def test_strides(view):
    image, text = features(40, 36, "cpu")
    if view == "transposed":
        image = image.T.contiguous().T
    elif view == "sliced":
        image = torch.stack([image, image], dim=2).flatten(1)[:, ::2]
    elif view == "offset":
        image = torch.cat([torch.full((7,), torch.nan), image.flatten()])[7:].view(40, 36)
    else:
        image = image[:1].expand(40, 36)
    got = [t.detach() for t in value_and_grads(triton_loss, image, text, 10.0)]
    want = truth(image, text, 10.0)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-6)


def test_a_small_workspace_changes_no_result(monkeypatch):
    image, text = features(300, 20, "cpu")
    tiles = Tiles(BN=64, BM=128, BD=32, GROUP=2, warps=4, stages=1)
    monkeypatch.setattr(configs, "built_in", lambda *key: tiles)
    whole = value_and_grads(triton_loss, image, text, 20.0)
    # Three groups of 128 rows forward, and blocks of G of 256 x 256 and what is left backward.
    monkeypatch.setattr(configs, "workspace", lambda: 4096)
    assert configs.partial_rows(tiles, 300, 4096) == 128
    assert configs.wave(300, 300, 32, 4, 4096) == (512, 256)
    monkeypatch.setattr(configs, "wave", lambda *sizes: (256, 256))
    for got, want in zip(value_and_grads(triton_loss, image, text, 20.0), whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("upstream", [1e-30, 1.0, 65536.0, 1e30])
def test_half_gradients_survive_any_upstream_gradient(upstream):
    # Summed in float32 up to the last step, where float16 itself limits what a gradient may be.
    image, text = features(40, 33, "cpu", torch.float16)
    scale = torch.tensor(20.0, requires_grad=True)
    (got,) = torch.autograd.grad(upstream * triton_loss(image, text, scale), scale)
    want = upstream * truth(image, text, 20.0)[3]
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("upstream", [1.0, 65536.0])
def test_sigmoid_gradients_are_rounded_after_the_loss_scale(upstream):
    image, text = features(40, 33, "cpu", torch.float16)
    half = [t.requires_grad_() for t in (image, text)]
    wide = [t.detach().double().requires_grad_() for t in half]
    got = torch.autograd.grad(upstream * siglip_loss(*half, 10.0, -5.0, backend="triton"), half)
    want = torch.autograd.grad(upstream * siglip_loss(*wide, 10.0, -5.0, backend="eager"), wide)
    for g, w in zip(got, want, strict=True):
        assert (g.double() - w).norm() <= 2e-3 * w.norm()


def test_weights_may_differ_by_many_orders():
    image, text = features(40, 33, "cpu", torch.float16)
    weight = torch.logspace(-12, 0, 40)
    got = value_and_grads(triton_loss, image, text, 20.0, weight=weight)
    want = truth(image, text, 20.0, weight=weight.double())
    for g, w in zip(got, want, strict=True):
        assert (g - w).norm() <= 2e-3 * w.norm()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_entry_is_never_masked(bad):
    image, text = features(40, 33, "cpu")
    image[3, 5] = bad
    loss, grad_image, *_ = value_and_grads(triton_loss, image, text, 10.0)
    assert loss.isnan() and grad_image[3].isnan().all()


@pytest.mark.parametrize("case", ["random", "antipodal"])
@pytest.mark.parametrize("ids_mode", ["ignore", "positive"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ids(dtype, ids_mode, case):
    image, text = degenerate(case, dtype)
    ids = torch.arange(40) // 3 * 2**40
    options = {"ids": ids, "ids_mode": ids_mode}
    got = value_and_grads(triton_loss, image, text, 100.0, **options)
    want = value_and_grads(clip_loss, image.double(), text.double(), 100.0, backend="eager", **options)
    tolerance = 2e-4 if dtype == torch.float32 else 2e-2
    for g, w, size in zip(got, want, sizes_of(got, want, 100.0), strict=True):
        assert (g - w).norm() <= tolerance * size


def test_a_batch_of_one_id_has_no_negatives():
    image, text = features(40, 33, "cpu")
    got = value_and_grads(triton_loss, image, text, 10.0, ids=torch.zeros(40, dtype=torch.int64), ids_mode="ignore")
    assert all((g == 0).all() for g in got)


@pytest.mark.parametrize("margin", [0.0, 0.1])
def test_false_negative_margin(margin):
    # Noisy pairs: many negatives score above their row's positive, or above their column's, seldom both.
    image, text = features(40, 33, "cpu", noise=4.0)
    options = {"false_negative_margin": margin}
    got = value_and_grads(triton_loss, image, text, 10.0, **options)
    want = value_and_grads(clip_loss, image.double(), text.double(), 10.0, backend="eager", **options)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_info_nce_with_extra_keys_and_shared_positives(dtype):
    query, key = features(70, 33, "cpu", dtype)
    query, labels = query[:40], torch.randint(0, 70, (40,), generator=torch.Generator().manual_seed(1))

    def loss(backend):
        def run(query, key, scale):
            return info_nce(query, key, scale, labels=labels, symmetric=True, backend=backend)

        return run

    got = value_and_grads(loss("triton"), query, key, 20.0)
    want = value_and_grads(loss("eager"), query.double(), key.double(), 20.0)
    for g, w in zip(got, want, strict=True):
        assert (g - w).norm() <= (1e-5 if dtype == torch.float32 else 3e-3) * w.norm()


@pytest.mark.parametrize(
    ("scale", "bias", "ids_mode"),
    [
        (10.0, -10.0, None),
        (100.0, 0.0, None),
        (1.0, -30.0, None),
        (0.0, 3.0, None),
        (10.0, -10.0, "ignore"),
        (10.0, -10.0, "positive"),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_siglip_loss(dtype, scale, bias, ids_mode):
    image, text = features(70, 33, "cpu", dtype)
    options = {} if ids_mode is None else {"ids": torch.arange(70) // 3, "ids_mode": ids_mode}

    def loss(backend):
        def run(image, text, scale):
            return siglip_loss(image, text, scale, bias, backend=backend, **options)

        return run

    got = value_and_grads(loss("triton"), image, text, scale)
    want = value_and_grads(loss("eager"), image.double(), text.double(), scale)
    for g, w in zip(got, want, strict=True):
        assert (g - w).norm() <= (2e-6 if dtype == torch.float32 else 3e-3) * (w.norm() + 0.1)


def test_siglip_bias_rows_and_value_alone():
    image, text = features(70, 33, "cpu")
    bias = torch.tensor(-5.0, requires_grad=True)
    upstream = torch.linspace(0.5, 2, 70)
    results = []
    for backend, dtype in (("triton", torch.float32), ("eager", torch.float64)):
        losses = siglip_loss(image.to(dtype), text.to(dtype), 10.0, bias, reduction="none", backend=backend)
        (grad,) = torch.autograd.grad((losses * upstream).sum(), bias)
        with torch.no_grad():
            alone = siglip_loss(image.to(dtype), text.to(dtype), 10.0, bias, backend=backend)
        results.append((losses.double(), grad.double(), alone.double()))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-7)


def test_only_the_gradients_that_are_wanted():
    image, text = features(40, 33, "cpu")
    want = truth(image, text, 10.0)
    for wanted, index in ((image, 1), (text, 2)):
        leaf = wanted.clone().requires_grad_()
        pair = (leaf, text) if wanted is image else (image, leaf)
        (grad,) = torch.autograd.grad(triton_loss(*pair, 10.0), leaf)
        torch.testing.assert_close(grad.double(), want[index], rtol=1e-4, atol=1e-7)


def test_float64_is_left_to_another_backend():
    image, text = features(4, 3, "cpu", torch.float64)
    with pytest.raises(RuntimeError, match="float64 features are left to the eager backend"):
        triton_loss(image, text, 10.0)


def test_bfloat16_is_refused_by_the_interpreter():
    image, text = features(4, 3, "cpu", torch.bfloat16)
    with pytest.raises(RuntimeError, match="multiplies bfloat16 wrongly"):
        triton_loss(image, text, 10.0)


def test_smoothing_and_sides_compose():
    image, text = features(40, 33, "cpu")
    assert_within_dense_budget(image, text, 10.0, label_smoothing=0.1)
