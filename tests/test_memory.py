"""What a training step holds: O((N + M) D) saved for backward, and a bounded workspace. Never an N x N matrix."""

import pytest
import torch
from cases import device_of, features, run_python

from fastclip import available_backends, clip_loss, plain
from fastclip.backends import eager

MIB = 2**20


def saved_bytes(loss, image, text, **options) -> int:
    """Bytes of the distinct storages that autograd keeps for backward, the features' own included."""
    storages = {}

    def keep(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = loss(image.requires_grad_(), text.requires_grad_(), torch.tensor(10.0, requires_grad=True), **options)
    assert result.requires_grad
    return sum(storages.values())


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "reduction": "none"}], ids=["plain", "smoothed"])
def test_what_autograd_keeps_grows_with_n(backend, options):
    d, sizes = 8, (1500, 3000, 6000)
    kept = [saved_bytes(clip_loss, *features(n, d, backend), backend=backend, **options) for n in sizes]
    assert kept[1] <= 2.05 * kept[0] and kept[2] <= 2.05 * kept[1]
    features_and_vectors = 4 * sizes[2] * (2 * d + 60)
    assert kept[2] <= features_and_vectors + (4 * sizes[2] * 6 * d if options else 0)


@pytest.mark.skipif("cpu" not in available_backends(), reason="only the C++ kernels give value and gradients together")
def test_features_and_gradients_are_kept_where_they_come_with_the_value():
    n, d = 1448, 8
    assert saved_bytes(clip_loss, *features(n, d), backend="cpu") <= 4 * (4 * n * d + 2)


def test_the_dense_loss_would_fail_that_test():
    from cases import dense_loss

    kept = [saved_bytes(dense_loss, *features(n, 8)) for n in (500, 1000)]
    assert kept[1] > 3.5 * kept[0]


def test_half_precision_features_are_kept_as_they_are(backend):
    n, d = 1500, 256
    kept = saved_bytes(clip_loss, *features(n, d, backend, torch.bfloat16), backend=backend)
    tensors = 4 if plain.serves(torch.empty(n, d), None, backend) else 2  # their gradients as well
    assert kept < tensors * n * d * 2 + 64 * 4 * n


PEAK = """
import torch
from fastclip import available_backends, clip_loss

def peak_mib():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024

def step(n):
    x, y = (torch.randn(n, {d}).requires_grad_() for _ in range(2))
    clip_loss(x, y, torch.tensor(10.0, requires_grad=True), backend="{backend}").backward()

step(256)  # what torch and its thread pool take once
before = peak_mib()
step({n})
print(peak_mib() - before)
"""


def test_peak_memory_of_a_step(backend):
    """8192 pairs: a float32 matrix of them would be 256 MiB, the dense loss holds several."""
    if device_of(backend) != "cpu":
        pytest.skip("VmHWM is the host's memory; tests/kernels has the GPU's")
    try:
        open("/proc/self/status").close()
    except OSError:
        pytest.skip("peak memory is read from Linux's /proc")
    n, d = 8192, 32
    done = run_python(PEAK.format(n=n, d=d, backend=backend))
    assert done.returncode == 0, done.stderr
    # Inputs and gradients (4), packed or normalised copies and their gradients (6).
    features_mib = 10 * n * d * 4 / MIB
    # A wave of G, the partial sums of 32 groups and what is kept of S; or the chunks of S and their temporaries.
    workspace_mib = {"cpu": 14 + 32 * 2 * n * 8 / MIB + 8, "eager": 8 * eager.CHUNK_ELEMENTS * 4 / MIB}[backend]
    assert float(done.stdout) < features_mib + workspace_mib + 4
