"""How fastclip's operators are registered: schema, implementation for every device, fake kernel, vmap."""

import functools
import inspect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastclip.checks import early_gradient_dtype

ONCE = "fastclip losses are differentiable once: a gradient of their gradient is not available"

_lib = torch.library.Library("fastclip", "DEF")


def register(schema: str, run: Callable, fake: Callable) -> None:
    """Defines fastclip::<schema>. run: chooses a backend and calls it; fake: the shapes and dtypes it returns."""
    name = schema.split("(")[0]
    _lib.define(schema)
    _lib.impl(name, _without_autocast(run), "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastclip::{name}", fake, lib=_lib)
    torch.library.register_vmap(f"fastclip::{name}", _by_loop(getattr(torch.ops.fastclip, name)), lib=_lib)


def with_signature(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """Class decorator: torch binds forward's arguments at each call, which takes as long as a kernel.

    The losses give all of them in their order, so that there is nothing to bind.
    """
    function.forward.__signature__ = _AllGiven(inspect.signature(function.forward).parameters.values())
    return function


class _AllGiven(inspect.Signature):
    def bind(self, *args):
        return _Given(args)


class _Given:
    """What torch asks of an inspect.BoundArguments."""

    def __init__(self, args: tuple) -> None:
        self.args, self.kwargs = args, {}

    def apply_defaults(self) -> None:
        pass


def same_device(*tensors: Tensor | None) -> None:
    """Fake kernels check devices themselves."""
    devices = {str(tensor.device) for tensor in tensors if tensor is not None}
    if len(devices) > 1:
        raise ValueError(f"fastclip operators take tensors of one device, got {', '.join(sorted(devices))}")


def like_or_empty(tensors: Sequence[Tensor], needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """A contiguous gradient for what is needed, an empty tensor for the rest: what every backend returns."""
    return tuple(tensor.new_empty(tensor.shape if need else (0,)) for tensor, need in zip(tensors, needs, strict=True))


def early_or_empty(tensors: Sequence[Tensor], needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """The same for gradients that come with the value (checks.early_gradient_dtype)."""
    return tuple(
        tensor.new_empty(tensor.shape if need else (0,), dtype=early_gradient_dtype(tensor.dtype))
        for tensor, need in zip(tensors, needs, strict=True)
    )


def scaled(upstream: Tensor, inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """upstream (0-d) times the gradients that came with the value, in the inputs' dtypes.

    Tied to the inputs where they may be differentiated again, so that doing it raises.
    """
    run = _ScaleOnce.apply if torch.is_grad_enabled() else _ScaleOnce.forward
    return run(upstream, *inputs, *grads)


def wanted(grads: Sequence[Tensor], needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """None in place of the empty tensors."""
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


class LastGradient(torch.autograd.Function):
    """Of a gradient: a node that is tied to its arguments, so that differentiating it raises."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_grads):
        raise RuntimeError(ONCE)


class _ScaleOnce(LastGradient):
    @staticmethod
    def forward(upstream, *inputs_and_grads):
        half = len(inputs_and_grads) // 2
        inputs, grads = inputs_and_grads[:half], inputs_and_grads[half:]
        return tuple((upstream * grad).to(input.dtype) for input, grad in zip(inputs, grads, strict=True))


def _without_autocast(run: Callable) -> Callable:
    """Autocast would round the products inside a backend; the features have been cast by checks.py already."""

    @functools.wraps(run)
    def plain(x, *args, **kwargs):
        if not torch.is_autocast_enabled(x.device.type):
            return run(x, *args, **kwargs)
        with torch.autocast(x.device.type, enabled=False):
            return run(x, *args, **kwargs)

    return plain


def _by_loop(op: Callable) -> Callable:
    """A batch of problems one after the other: each is large enough to fill the machine."""

    def rule(info, in_dims, *args):
        runs = [
            op(*(arg.select(dim, i) if isinstance(dim, int) else arg for arg, dim in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        outputs = tuple(torch.stack(output) for output in zip(*runs, strict=True))
        return outputs, (0,) * len(outputs)

    return rule
