"""The Triton backend on a GPU: every dtype and size beside chunked float64, and what only a GPU can show.

Self-contained, so that a machine with torch, Triton and pytest alone can run it (`make gpu`).
"""

import os
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from fastclip import clip_loss, info_nce, ops, siglip_loss

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Tiles are 128 x 128 (64 x 64 for IEEE float32); 5,000 spans several groups and waves with a small workspace.
SIZES = {"one": 1, "two": 2, "tile-1": 127, "tile": 128, "tile+1": 129, "ragged": 5000}


def features(n, d, dtype, *, noise=1.0, seed=0):
    draw = torch.Generator("cuda").manual_seed(seed)
    image = torch.randn(n, d, generator=draw, device="cuda")
    text = image + noise * torch.randn(n, d, generator=draw, device="cuda")
    return image.to(dtype), text.to(dtype)


def value_and_grads(loss, image, text, scale, **options):
    image, text = image.detach().clone().requires_grad_(), text.detach().clone().requires_grad_()
    dtype = torch.float64 if image.dtype == torch.float64 else torch.float32
    scale = torch.tensor(scale, dtype=dtype, device="cuda", requires_grad=True)
    value = loss(image, text, scale, **options)
    return [t.detach().double() for t in (value, *torch.autograd.grad(value, (image, text, scale)))]


def fast(image, text, scale, **options):
    return clip_loss(image, text, scale, backend="triton", **options)


def truth(image, text, scale, **options):
    def loss(image, text, scale):
        return clip_loss(image, text, scale, backend="eager", **options)

    return value_and_grads(loss, image.double(), text.double(), scale)


def dense(image, text, scale):
    S = scale * (F.normalize(image, dim=1) @ F.normalize(text, dim=1).T)
    labels = torch.arange(len(S), device=S.device)
    return (F.cross_entropy(S, labels) + F.cross_entropy(S.T, labels)) / 2


def assert_within_dense_budget(image, text, scale, ulps=8):
    got, want = value_and_grads(fast, image, text, scale), truth(image, text, scale)
    plain = value_and_grads(dense, image, text, scale)
    eps, logit = torch.finfo(image.dtype).eps, 1.0 + abs(scale)
    sizes = [logit, *(logit / len(image) ** 0.5 + logit * want[i].norm() for i in (1, 2)), 1 + logit * want[3].abs()]
    for name, g, w, p, size in zip(("loss", "image", "text", "scale"), got, want, plain, sizes, strict=True):
        error, allowed = (g - w).norm(), 2 * (p - w).norm().nan_to_num(torch.inf) + ulps * eps * size
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [1, 65, 512])
@pytest.mark.parametrize("n", SIZES.values(), ids=SIZES.keys())
def test_clip_loss(n, d, dtype):
    assert_within_dense_budget(*features(n, d, dtype), 10.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.0, -20.0, 100.0, 300.0, 1e4])
@pytest.mark.parametrize("case", ["collapsed", "antipodal", "trained"])
def test_degenerate_batches(case, scale, dtype):
    image, text = features(300, 65, torch.float32)
    if case == "collapsed":
        image, text = 1 + 1e-3 * image, 1 + 1e-3 * text
    elif case == "antipodal":
        image, text = 1 + 1e-2 * image, -1 + 1e-2 * text
    else:
        text = image + 1e-3 * text
    assert_within_dense_budget(image.to(dtype), text.to(dtype), scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [32768, 131072])
def test_large_batches_beside_chunked_float64(n, dtype):
    image, text = features(n, 64, dtype, noise=2.0)
    got, want = value_and_grads(fast, image, text, 50.0), truth(image, text, 50.0)
    tolerance = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}[dtype]
    for name, g, w in zip(("loss", "image", "text", "scale"), got, want, strict=True):
        assert (g - w).norm() <= tolerance * w.norm(), name


def test_well_trained_losses_keep_their_relative_accuracy():
    image, text = features(2048, 512, torch.float32, noise=0.3)
    got, want = value_and_grads(fast, image, text, 60.0), truth(image, text, 60.0)
    assert want[0] < 1e-6
    for g, w in zip(got, want, strict=True):
        assert (g - w).norm() <= 1e-4 * w.norm()


def test_float32_follows_torchs_precision():
    image, text = features(1000, 256, torch.float32)
    want = truth(image, text, 50.0)
    before = torch.backends.cuda.matmul.fp32_precision
    errors = {}
    try:
        for precision in ("ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = precision
            errors[precision] = (value_and_grads(fast, image, text, 50.0)[1] - want[1]).norm() / want[1].norm()
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert errors["ieee"] < 1e-5 < errors["tf32"] < 1e-2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_twenty_runs_are_bitwise_equal(dtype):
    image, text = features(5000, 512, dtype)
    first = value_and_grads(fast, image, text, 50.0)
    for _ in range(19):
        assert all(torch.equal(a, b) for a, b in zip(first, value_and_grads(fast, image, text, 50.0), strict=True))


def test_a_small_workspace_changes_little(monkeypatch):
    image, text = features(5000, 64, torch.bfloat16)
    whole = value_and_grads(fast, image, text, 20.0)
    monkeypatch.setenv("FASTCLIP_WORKSPACE_MIB", "1")
    for a, b in zip(whole, value_and_grads(fast, image, text, 20.0), strict=True):
        assert (a - b).norm() <= 1e-3 * b.norm()


def test_memory_does_not_grow_with_the_square(monkeypatch):
    monkeypatch.setenv("FASTCLIP_WORKSPACE_MIB", "64")
    image, text = (t.requires_grad_() for t in features(65536, 64, torch.bfloat16))
    fast(image, text, 50.0).backward()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fast(image, text, 50.0).backward()
    # Operands and gradients in bfloat16 and float32: a few times the 8 MiB of one side, and the workspace.
    assert torch.cuda.max_memory_allocated() - before < (3 * 64 + 10 * 8 + 2 * 16) * 2**20


def test_nothing_waits_for_the_host():
    image, text = (t.requires_grad_() for t in features(1000, 64, torch.bfloat16))
    scale = torch.tensor(20.0, device="cuda", requires_grad=True)
    fast(image, text, scale).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        fast(image, text, scale).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_another_stream():
    image, text = features(3000, 256, torch.bfloat16)
    want = value_and_grads(fast, image, text, 20.0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = value_and_grads(fast, image, text, 20.0)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_cuda_graph_captures_a_step():
    image, text = (t.requires_grad_() for t in features(3000, 256, torch.bfloat16))
    scale = torch.tensor(20.0, device="cuda", requires_grad=True)

    def step():
        loss = fast(image, text, scale)
        return loss, *torch.autograd.grad(loss, (image, text, scale))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    new_image, new_text = features(3000, 256, torch.bfloat16, seed=1)
    with torch.no_grad():
        image.copy_(new_image)
        text.copy_(new_text)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


def test_torch_compile():
    image, text = (t.requires_grad_() for t in features(1000, 64, torch.bfloat16))

    def loss(image, text):
        return fast(2 * image, text, 20.0)

    got = torch.compile(loss, fullgraph=True)(image, text)
    want = loss(image, text)
    torch.testing.assert_close(got, want)
    for g, w in zip(torch.autograd.grad(got, (image, text)), torch.autograd.grad(want, (image, text)), strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("ids_mode", ["ignore", "positive"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ids(dtype, ids_mode):
    image, text = features(1000, 65, dtype)
    options = {"ids": torch.arange(1000, device="cuda") // 3, "ids_mode": ids_mode}
    got, want = value_and_grads(fast, image, text, 20.0, **options), truth(image, text, 20.0, **options)
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5}[dtype]
    for g, w in zip(got, want, strict=True):
        assert (g - w).norm() <= tolerance * w.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_siglip_loss(dtype):
    image, text = features(3000, 65, dtype)

    def loss(backend):
        def run(image, text, scale):
            return siglip_loss(image, text, scale, -10.0, backend=backend)

        return run

    got = value_and_grads(loss("triton"), image, text, 10.0)
    want = value_and_grads(loss("eager"), image.double(), text.double(), 10.0)
    tolerance = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}[dtype]
    for g, w in zip(got, want, strict=True):
        assert (g - w).norm() <= tolerance * w.norm()


def test_info_nce_with_extra_keys():
    query, key = features(3000, 65, torch.bfloat16)
    labels = torch.randint(0, 3000, (1000,), device="cuda")

    def loss(backend):
        def run(query, key, scale):
            return info_nce(query, key, scale, labels=labels, symmetric=True, backend=backend)

        return run

    got = value_and_grads(loss("triton"), query[:1000], key, 20.0)
    want = value_and_grads(loss("eager"), query[:1000].double(), key.double(), 20.0)
    for g, w in zip(got, want, strict=True):
        assert (g - w).norm() <= 1e-2 * w.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_pair_never_beats_itself_or_its_copy(dtype):
    # All products are real numbers here, not integers: ties hold only if equal operands give equal bits.
    image, text = features(3000, 512, dtype)
    text = image.clone()
    text[1::2] = text[::2]
    index = torch.arange(3000, device="cuda")
    scale = torch.tensor(20.0, device="cuda")
    row_rank, _ = ops.similarity_ranks(image, text, scale, index, index, True, "triton")
    assert (row_rank[::2] == 0).all()


def test_rows_further_apart_than_int32():
    # 4,096 rows whose offsets reach 2.2e9 elements: 4.3 GiB of which 4 MiB are read.
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    stride = 2**31 // 4096 + 17
    storage = torch.zeros(4096 * stride, dtype=torch.bfloat16, device="cuda")
    image, text = features(4096, 512, torch.bfloat16)
    far = storage.as_strided((4096, 512), (stride, 1))
    far.copy_(image)
    got, want = fast(far, text, 20.0), fast(image, text, 20.0)
    assert torch.equal(got, want)


def test_operands_larger_than_int32():
    # 2^22 + 200 keys of 512: 2.1e9 elements in the operand and in the gradient.
    if torch.cuda.mem_get_info()[0] < 48 * 2**30:
        pytest.skip("needs 48 GiB of free GPU memory")
    keys = 2**22 + 200
    query, _ = features(256, 512, torch.bfloat16)
    key = torch.randn(keys, 512, device="cuda", dtype=torch.bfloat16)
    labels = torch.arange(keys - 256, keys, device="cuda")
    key[labels] = query
    key.requires_grad_()
    loss = info_nce(query, key, 20.0, labels=labels, backend="triton")
    (grad,) = torch.autograd.grad(loss, key)
    tail = slice(keys - 1000, keys)
    unit, units = F.normalize(query.float(), dim=1), F.normalize(key.detach()[tail].float(), dim=1)
    S = 20 * unit @ units.T
    total = sum((20 * unit @ F.normalize(c.detach().float(), dim=1).T).exp().sum(1) for c in key.split(2**18))
    torch.testing.assert_close(loss, (total.log() - S[:, -256:].diagonal()).mean(), rtol=1e-3, atol=1e-3)
    P = S.exp() / total[:, None]
    P[:, -256:] -= torch.eye(256, device="cuda")
    want = 20 / 256 * P.T @ unit
    want = (want - units * (want * units).sum(1, keepdim=True)) / key.detach()[tail].float().norm(dim=1, keepdim=True)
    assert (grad[tail].float() - want).norm() <= 2e-2 * want.norm()


def test_deterministic_algorithms():
    image, text = features(1000, 64, torch.bfloat16)
    plain = value_and_grads(fast, image, text, 20.0)
    if "CUBLAS_WORKSPACE_CONFIG" not in os.environ:
        pytest.skip("torch asks for CUBLAS_WORKSPACE_CONFIG=:4096:8 in deterministic mode")
    torch.use_deterministic_algorithms(True)
    try:
        got = value_and_grads(fast, image, text, 20.0)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_the_current_one():
    image, text = features(1000, 64, torch.bfloat16)
    other = fast(image.to("cuda:1"), text.to("cuda:1"), 20.0)
    torch.testing.assert_close(other.to("cuda:0"), fast(image, text, 20.0))


SANITIZED = """
import torch
from fastclip import clip_loss, siglip_loss
image, text = (torch.randn(130, 65, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
ids = torch.arange(130, device="cuda") // 2
for loss in (
    clip_loss(image, text, 20.0, backend="triton"),
    clip_loss(image, -image, 500.0, backend="triton"),
    clip_loss(image, text, 20.0, ids=ids, ids_mode="ignore", backend="triton"),
    siglip_loss(image, text, 10.0, -10.0, backend="triton"),
):
    loss.backward()
torch.cuda.synchronize()
"""


# `make gpu` leaves these out by their name: `make gpu GPU="--only tests --sanitizer"` runs them.
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool):
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not os.path.exists(sanitizer):
        pytest.skip("compute-sanitizer is not installed")
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [sanitizer, "--tool", tool, "--kernel-regex", "kns=_kernel", sys.executable, "-c", SANITIZED]
    try:
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    except subprocess.TimeoutExpired:
        pytest.skip("compute-sanitizer took more than 240 s")
    output = run.stdout + run.stderr
    if "not supported" in output.lower():
        pytest.skip("compute-sanitizer refuses this device")
    assert run.returncode == 0, output[-3000:]
    assert "ERROR SUMMARY: 0 errors" in output or "0 hazards" in output, output[-3000:]
