"""The operators under function transforms and the compiler, and second derivatives that must raise."""

import pytest
import torch
from cases import BACKENDS, assert_close, device_of, features, sizes, truth

from fastclip import clip_loss

# torch 2.13 warns about what its own compiler and function transforms do.
warnings_of_torch = pytest.mark.filterwarnings(
    "ignore:.*torch.jit.script.* is deprecated:DeprecationWarning",
    "ignore:.*should not be instantiated:DeprecationWarning",
)


@pytest.mark.parametrize("n", **sizes("one", "tile+1", "panel+1"))
def test_func_grad(backend, n):
    image, text = features(n, 8, backend)
    scale = torch.tensor(10.0, device=image.device)
    grads = torch.func.grad(lambda *args: clip_loss(*args, backend=backend), argnums=(0, 1, 2))(image, text, scale)
    want = truth(image, text, 10.0)
    # The first entry is the loss, which torch.func.grad does not return.
    assert_close([want[0], *(t.cpu().double() for t in grads)], want, torch.float32)


def test_vmap(backend):
    batch = [features(9, 5, backend, seed=seed) for seed in range(3)]
    images, texts = (torch.stack(side) for side in zip(*batch, strict=True))
    scales = torch.tensor([1.0, 10.0, 50.0], device=images.device)

    def loss(*args):
        return clip_loss(*args, backend=backend)

    got = torch.func.vmap(loss)(images, texts, scales)
    torch.testing.assert_close(got, torch.stack([loss(*args) for args in zip(images, texts, scales, strict=True)]))
    shared = torch.func.vmap(loss, in_dims=(0, None, None))(images, texts[0], scales[1])
    torch.testing.assert_close(shared, torch.stack([loss(image, texts[0], scales[1]) for image in images]))
    inner = torch.func.vmap(loss, in_dims=(1, 1, 0))(images.transpose(0, 1), texts.transpose(0, 1), scales)
    torch.testing.assert_close(inner, got)


def test_vmap_of_grad(backend):
    batch = [features(9, 5, backend, seed=seed) for seed in range(3)]
    images, texts = (torch.stack(side) for side in zip(*batch, strict=True))
    grad = torch.func.grad(lambda image, text: clip_loss(image, text, 10.0, backend=backend))
    for got, image, text in zip(torch.func.vmap(grad)(images, texts), images, texts, strict=True):
        torch.testing.assert_close(got, grad(image, text))


def test_vmap_of_ranks(backend):
    batch = [features(9, 5, backend, seed=seed) for seed in range(2)]
    images, texts = (torch.stack(side) for side in zip(*batch, strict=True))

    def mean_rank(image, text):
        return clip_loss(image, text, 5.0, return_stats=True, backend=backend)[1].mean_rank

    got = torch.func.vmap(mean_rank)(images, texts)
    assert torch.equal(got, torch.stack([mean_rank(*pair) for pair in batch]))


def step(image, text, log_scale, backend):
    loss, stats = clip_loss(image, text, log_scale.exp(), label_smoothing=0.1, return_stats=True, backend=backend)
    return loss, stats.image_accuracy


def check_compiled(backend, compiler):
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    image, text = features(33, 8, backend)
    results = []
    for run in (step, compiled):
        inputs = [t.clone().requires_grad_() for t in (image, text, torch.tensor(2.0, device=image.device))]
        loss, accuracy = run(*inputs, backend)
        results.append((loss, accuracy, *torch.autograd.grad(loss, inputs)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


@warnings_of_torch
def test_compile_without_graph_breaks(backend):
    check_compiled(backend, "aot_eager")


@warnings_of_torch
def test_compile_dynamic_shapes(backend):
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (9, 17):
        image, text = features(n, 8, backend)
        scale = torch.tensor(2.0, device=image.device)
        torch.testing.assert_close(compiled(image, text, scale, backend)[0], step(image, text, scale, backend)[0])


def has_compiler() -> bool:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return bool(get_cpp_compiler())
    except InvalidCxxCompiler:
        return False


@warnings_of_torch
def test_compile_with_inductor():
    if device_of(BACKENDS[0]) == "cpu" and not has_compiler():
        pytest.skip("torch.compile needs a C++ compiler on the CPU")
    check_compiled(BACKENDS[0], "inductor")


def test_double_backward_raises(backend):
    image, text = features(8, 4, backend)
    scale = torch.tensor(5.0, device=image.device)
    inputs = [t.requires_grad_() for t in (image, text, scale)]
    for index in range(3):
        loss = clip_loss(*inputs, backend=backend)
        (grad,) = torch.autograd.grad(loss, inputs[index], create_graph=True)
        for other in inputs:
            with pytest.raises(RuntimeError, match="differentiable once"):
                torch.autograd.grad(grad.sum(), other, retain_graph=True)


def test_gradient_penalty_raises(backend):
    # The gradient with respect to an upstream factor is a second derivative as well.
    image, text = features(8, 4, backend)
    image.requires_grad_()
    weight = torch.ones(8, device=image.device, requires_grad=True)
    loss = clip_loss(image, text, 5.0, weight=weight, reduction="sum", backend=backend)
    (grad,) = torch.autograd.grad(loss, image, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(grad.square().sum(), weight)


@warnings_of_torch
def test_second_derivatives_of_func_raise(backend):
    image, text = features(8, 4, backend)

    def loss(image):
        return clip_loss(image, text, 5.0, backend=backend)

    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.func.grad(lambda image: torch.func.grad(loss)(image).square().sum())(image)
    with pytest.raises(RuntimeError):
        torch.func.hessian(loss)(image)


@warnings_of_torch
def test_forward_mode_raises(backend):
    image, text = features(8, 4, backend)
    with pytest.raises(RuntimeError):
        torch.func.jvp(lambda image: clip_loss(image, text, 5.0, backend=backend), (image,), (torch.ones_like(image),))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError):
        dual = torch.autograd.forward_ad.make_dual(image, torch.ones_like(image))
        clip_loss(dual, text, 5.0, backend=backend)
