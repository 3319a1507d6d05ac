"""The CLIP loss without options in one call (fastclip/plain.py); what takes the fixture `backend` tests it too."""

import pytest
import torch
from cases import SIZES, assert_close, features, value_and_grads

from fastclip import available_backends, clip_loss, plain, siglip_loss
from fastclip.backends import cpu
from fastclip.checks import accumulation_dtype

pytestmark = pytest.mark.skipif("cpu" not in available_backends(), reason="only the C++ kernels offer it")


@pytest.fixture
def calls(monkeypatch) -> list:
    """The arguments of every loss that was taken in one call."""
    seen = []
    original = cpu.clip_loss
    monkeypatch.setattr(cpu, "clip_loss", lambda *args: (seen.append(args), original(*args))[1])
    return seen


def test_what_it_computes(calls):
    for options in ({}, {"normalize": False}, {"reduction": "sum"}, {"weight": torch.ones(5)}):
        clip_loss(*features(5, 3), 5.0, backend="cpu", **options)
    assert [args[3:6] for args in calls[:3]] == [(None, True, True), (None, True, False), (None, False, True)]
    assert len(calls) == 4


@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "none"},
        {"return_stats": True},
        {"label_smoothing": 0.1},
        {"hardness": 1.0},
        {"false_negative_margin": 0.1},
        {"ids": torch.arange(5) // 2},
        {"weight": torch.ones(5, requires_grad=True)},
        {"backend": "eager"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_it_does_not_compute_goes_the_other_way(calls, options):
    clip_loss(*features(5, 3), 5.0, **{"backend": "cpu", **options})
    assert not calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [0.0, -20.0, 14.0, 2000.0], ids=["zero", "negative", "one-shift", "exact-path"])
@pytest.mark.parametrize("size", ["one", "two", "tile+1", "wide-panel+1", "block+1"])
def test_both_ways_give_the_same(monkeypatch, size, scale, dtype):
    """Up to the rounding of what is summed in another order; test_accuracy.py holds either to float64."""
    weight = torch.rand(SIZES[size], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    image, text = features(SIZES[size], 65, "cpu", dtype)
    for options in ({}, {"normalize": False}, {"reduction": "sum"}, {"weight": weight}):
        if not options.get("normalize", True):
            image, text = 0.3 * image, 0.3 * text
        together = value_and_grads(clip_loss, image, text, scale, backend="cpu", **options)
        with monkeypatch.context() as patch:
            patch.setattr(plain, "serves", lambda *args: False)
            apart = value_and_grads(clip_loss, image, text, scale, backend="cpu", **options)
        assert_close(together, apart, dtype, ulps=32 if dtype in (torch.float32, torch.float64) else 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("n", [7, 512, 513, 1930], ids=["all", "all-that-fits", "some", "none-and-two-waves"])
def test_what_is_kept_of_the_similarities_changes_no_bit(monkeypatch, n, dtype):
    """1 MiB holds 512 x 512 of them in float32."""
    image, text = features(n, 9, "cpu", dtype)
    scale = torch.tensor(20.0, dtype=accumulation_dtype(dtype))
    results = []
    for mib in (0, 1, 64):
        monkeypatch.setattr(cpu, "WORKSPACE", mib * 2**20)
        args = (image, text, scale, None, True, True, [True] * 3, "cpu")
        results.append(torch.ops.fastclip.clip_loss(*args))
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


@pytest.mark.parametrize(
    ("n", "d", "rows"), [(1448, 2, 1448), (4096, 1024, 4096), (4096, 512, 2048), (8192, 512, 2048), (16384, 512, 1024)]
)
def test_how_much_of_the_similarities_is_kept(n, d, rows):
    """All of a small batch, at most 4 D columns' worth and 64 MiB of others."""
    x = torch.empty(n, d)
    assert cpu.kept_rows(x) == rows
    assert 4 * rows * n <= 64 * 2**20
    assert plain.serves(x, None, "cpu") and not plain.serves(torch.empty(16385, 512), None, "cpu")


def test_a_batch_is_taken_if_a_sixteenth_of_its_similarities_is_kept(calls, monkeypatch):
    monkeypatch.setattr(cpu, "WORKSPACE", 2**20)
    for n in (2048, 2049):
        clip_loss(*features(n, 2), 5.0, backend="cpu")
    assert [len(args[0]) for args in calls] == [2048]
    monkeypatch.setattr(cpu, "WORKSPACE", 0)
    clip_loss(*features(2, 2), 5.0, backend="cpu")
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d", [64, 65], ids=["whole-panels", "ragged"])
def test_any_number_of_threads_and_runs_give_the_same_bits(d, dtype, threads):
    image, text = features(523, d, "cpu", dtype)
    results = []
    for count in (1, 2, 3, 8, 2, 2):
        threads(count)
        results.append(value_and_grads(clip_loss, image, text, 20.0, backend="cpu"))
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


@pytest.mark.parametrize("needs", [[True] * 3, [True, False, False], [False, True, True], [False] * 3], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_opcheck(dtype, needs):
    image, text = features(5, 4, "cpu", dtype)
    scale = torch.tensor(7.0, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    for weight in (None, torch.rand(5, dtype=scale.dtype)):
        torch.library.opcheck(
            torch.ops.fastclip.clip_loss.default, (image, text, scale, weight, True, True, needs, "cpu")
        )


@pytest.mark.parametrize(
    "loss", [clip_loss, lambda *args, **options: siglip_loss(*args, -5.0, **options)], ids=["clip", "siglip"]
)
@pytest.mark.parametrize("upstream", [1 / 3, 65536.0, 2.0**-20], ids=["third", "loss-scale", "tiny"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_what_comes_from_above_meets_unrounded_gradients(backend, loss, upstream, dtype):
    """GradScaler multiplies a float16 loss by up to 65536, infinity's neighbour, so that small gradients survive."""
    image, text = (10.0 * t for t in features(64, 32, backend, torch.float32))
    image, text = image.to(dtype), text.to(dtype)
    of_one = value_and_grads(loss, image.float(), text.float(), 10.0, backend=backend)
    of_many = value_and_grads(
        lambda *args, **options: upstream * loss(*args, **options), image, text, 10.0, backend=backend
    )
    # One unit in the last place, of float16's denormals where the gradients are so small.
    for got, want in zip(of_many[1:3], of_one[1:3], strict=True):
        smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        assert (got - upstream * want).abs().max() <= 2 * torch.finfo(
            dtype
        ).eps * upstream * want.abs().max() + smallest


def test_scratch_serves_later_calls_of_any_size():
    want = [value_and_grads(clip_loss, *features(n, 40), 20.0, backend="cpu") for n in (300, 7, 190, 900)]
    assert len(cpu._scratch.buffer) <= cpu.KEPT_BYTES
    for n, before in zip((300, 7, 190, 900), want, strict=True):
        assert all(map(torch.equal, value_and_grads(clip_loss, *features(n, 40), 20.0, backend="cpu"), before))
