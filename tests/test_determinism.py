"""The same bits from run to run and, on the CPU kernels, for any number of threads."""

import pytest
import torch
from cases import features

from fastclip import available_backends, clip_loss
from fastclip.backends import cpu

RUNS = 20


def bits(image, text, backend, scale=20.0):
    leaves = [t.clone().requires_grad_() for t in (image, text, torch.tensor(scale, device=image.device))]
    loss, stats = clip_loss(*leaves, backend=backend, label_smoothing=0.1, return_stats=True)
    return [loss.detach(), *torch.autograd.grad(loss, leaves), *vars(stats).values()]


@pytest.mark.parametrize("count", [1, 2], ids=["one-thread", "two-threads"])
@pytest.mark.parametrize(("n", "d"), [(401, 70), (1930, 5)], ids=["ragged", "two-waves"])
def test_twenty_runs_give_the_same_bits(backend, n, d, count, threads):
    threads(count)
    image, text = features(n, d, backend)
    first = bits(image, text, backend)
    for _ in range(RUNS - 1):
        for got, want in zip(bits(image, text, backend), first, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [20.0, 2000.0], ids=["one-shift", "exact-path"])
@pytest.mark.parametrize(("n", "d"), [(523, 70), (1930, 9)], ids=["ragged", "two-waves"])
def test_cpu_kernels_give_the_same_bits_for_any_number_of_threads(n, d, scale, dtype, threads):
    if "cpu" not in available_backends():
        pytest.skip(f"the C++ kernels are not built here: {cpu.why_not(None)}")
    image, text = features(n, d, "cpu", dtype)
    results = []
    for count in (1, 2, 3, 8):
        threads(count)
        results.append(bits(image, text, "cpu", scale))
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            assert torch.equal(got, want)


def test_deterministic_algorithms_change_nothing(backend):
    image, text = features(300, 20, backend)
    want = bits(image, text, backend)
    torch.use_deterministic_algorithms(True)
    try:
        got = bits(image, text, backend)
    finally:
        torch.use_deterministic_algorithms(False)
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)
