"""GradCache, and the autograd node that encodes twice: without a graph, then piece by piece with one.

Legend: N rows of a batch; features [N, ...] of any trailing shape.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastclip.grad_cache.parallel import Reduction, warn_if_alone
from fastclip.grad_cache.pieces import take_apart
from fastclip.grad_cache.state import (
    Autocast,
    Buffers,
    RandomState,
    Unchanged,
    devices_of,
    forget_rounded_weights,
    random_state_kept,
)


class GradCache:
    """Encoders that hold the activations of one micro-batch at a time, whatever the batch.

        cached = GradCache([model.encode_image, model.encode_text], micro_batch=64)
        image_features, text_features = cached(images, tokens)
        clip_loss(image_features, text_features, model.logit_scale).backward()

    A call encodes the batch without a graph and returns all features; the loss is any function of them. The loss's
    backward pass ends at the features, then encodes each micro-batch again, now with a graph, and sends the features'
    gradient through it. The parameters get the gradient of the whole batch, for one more forward pass and the memory of
    the features and one micro-batch (Gao et al. 2021, arXiv 2101.06983).

    It gives features and hides the second pass inside `backward` so that nothing around it changes: any loss,
    `scaler.scale(loss).backward()`, a sum of losses, accumulation over several backward passes.

    The second pass finds autocast, torch's global random generators (dropout, augmentation on the device) and the
    buffers of modules in training mode as the first one did; afterwards they are as if there had been one pass.
    docs/grad_cache.md says what this means for BatchNorm, DistributedDataParallel and FSDP2.

    Args:
        encoders: callables, one per input, that treat rows independently and return a floating-point tensor with one
            row for each row of their input.
        micro_batch: rows encoded at a time: one number, or one per encoder. The last micro-batch may be shorter.
        modules: the modules that the encoders run, and the DistributedDataParallel around them, if any. By default the
            encoders themselves, or the modules whose methods they are.

    Raises:
        ValueError: no encoder, a micro_batch below 1 or not one per encoder, or an encoder that is a plain function,
            whose modules cannot be seen, without `modules`.
    """

    def __init__(
        self,
        encoders: Sequence[Callable[..., Tensor]],
        micro_batch: int | Sequence[int],
        *,
        modules: Sequence[nn.Module] | None = None,
    ) -> None:
        sizes = [micro_batch] * len(encoders) if isinstance(micro_batch, int) else list(micro_batch)
        if not encoders or len(sizes) != len(encoders) or min(sizes) < 1:
            raise ValueError(
                "micro_batch must be at least 1, one number or one per encoder; "
                f"got {micro_batch} for {len(encoders)} encoders"
            )
        if modules is None:
            owners = [_owner(encoder, f"encoders[{i}]") for i, encoder in enumerate(encoders)]
            modules = list(dict.fromkeys(owners))
            warn_if_alone(modules)
        self.encoders, self.sizes, self.modules = list(encoders), sizes, list(modules)
        self._reduces = True

    @torch.compiler.disable
    def __call__(self, *inputs: object) -> tuple[Tensor, ...]:
        """Features [N, ...], one tensor per encoder, in the dtype the encoder returns.

        inputs: one per encoder: a tensor, a sequence (encoder(*sequence)) or a mapping (encoder(**mapping)) whose
            tensors are all [N, ...]; they are cut along dimension 0, anything else is passed on as it is. They may lie
            on another device than the encoder: it can move each piece. An input that requires a gradient gets it.

        Under torch.no_grad() the features carry no graph, and nothing is kept for a second pass.

        Raises ValueError for inputs that do not fit, TypeError for an encoder that returns something else; `backward`
        raises RuntimeError if a parameter, an input or a module's mode has changed since the call.
        """
        if len(inputs) != len(self.encoders):
            raise ValueError(f"expected one input per encoder, {len(self.encoders)}, got {len(inputs)}")
        reduction = Reduction(self.modules, self._reduces)
        passes, tensors = [], []
        for i, (encoder, size, value) in enumerate(zip(self.encoders, self.sizes, inputs, strict=True)):
            own, call = take_apart(value, f"input {i}")
            encode = functools.partial(call, encoder)
            passes.append(_Passes(encode, range(0, len(own[0]), size), self.modules, reduction))
            tensors.append(own)
        reduction.check_same([len(p.starts) for p in passes])
        return tuple(p.features(own) for p, own in zip(passes, tensors, strict=True))

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Calls inside leave each process its own gradients, to add up over several calls; the last goes outside.

        It serves DistributedDataParallel (whose own no_sync does too) and FSDP2. What counts is where the call is made,
        not its backward pass.
        """
        before, self._reduces = self._reduces, False
        try:
            yield
        finally:
            self._reduces = before


class _Passes:
    """One encoder's two passes over one batch."""

    def __init__(
        self,
        encode: Callable[[Iterator[Tensor]], Tensor],
        starts: range,
        modules: Sequence[nn.Module],
        reduction: Reduction,
    ) -> None:
        self.encode, self.starts, self.modules, self.reduction = encode, starts, modules, reduction

    def features(self, tensors: list[Tensor]) -> Tensor:
        if not torch.is_grad_enabled():
            return self.first(tensors, lambda: None)
        # The parameters are no inputs of the node; it needs one that wants a gradient.
        return _Encode.apply(self, torch.empty(0, requires_grad=True), *tensors)

    def first(self, tensors: Sequence[Tensor], before_each: Callable[[], None]) -> Tensor:
        """All features, without a graph."""
        features = None
        for start in self.starts:
            before_each()
            rows = slice(start, start + self.starts.step)
            piece = self._checked([t[rows] for t in tensors])
            if features is None:
                features = piece.new_empty(len(tensors[0]), *piece.shape[1:])
            features[rows] = piece
        return features

    def remembered(self, tensors: Sequence[Tensor]) -> Tensor:
        """first(), keeping what second() needs to find again."""
        parameters = [p for module in self.modules for p in module.parameters()]
        self.devices = devices_of([*tensors, *parameters])
        self.autocast, self.buffers = Autocast(self.devices), Buffers(self.modules)
        self.unchanged = Unchanged(self.modules)
        self.generators: list[RandomState] = []
        features = self.first(tensors, lambda: self.generators.append(RandomState(self.devices)))
        forget_rounded_weights()
        return features

    def second(self, tensors: Sequence[Tensor], grad: Tensor, wanted: Sequence[bool]) -> list[Tensor | None]:
        """Sends grad [N, ...] to the parameters, one micro-batch after the other; the gradients of `tensors`."""
        grads = [torch.zeros_like(t) if want else None for t, want in zip(tensors, wanted, strict=True)]
        with random_state_kept(self.devices), self.buffers.apply(), self.reduction.replays():
            for start, generators in zip(self.starts, self.generators, strict=True):
                self.unchanged.check()
                rows = slice(start, start + self.starts.step)
                leaves = [t[rows].detach().requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)]
                generators.restore()
                with torch.enable_grad(), self.autocast.apply():
                    features = self._checked(leaves)
                if not features.requires_grad:
                    break  # a frozen encoder
                with self.reduction.replay(last=start == self.starts[-1]):
                    torch.autograd.backward(features, grad[rows])
                for whole, leaf in zip(grads, leaves, strict=True):
                    if whole is not None and leaf.grad is not None:
                        whole[rows] = leaf.grad
        self.reduction.at_the_end()
        return grads

    def _checked(self, tensors: list[Tensor]) -> Tensor:
        features = self.encode(iter(tensors))
        if not isinstance(features, Tensor) or not features.is_floating_point():
            what = features.dtype if isinstance(features, Tensor) else type(features).__name__
            raise TypeError(f"an encoder must return a floating-point tensor, got {what}")
        if features.shape[:1] != tensors[0].shape[:1]:
            raise ValueError(f"an encoder must return {len(tensors[0])} rows, got shape {tuple(features.shape)}")
        return features


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, passes: _Passes, anchor: Tensor, *tensors: Tensor) -> Tensor:
        ctx.passes = passes
        ctx.save_for_backward(*tensors)
        return passes.remembered(tensors)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError("gradient caching can be differentiated once only")
        return None, None, *ctx.passes.second(ctx.saved_tensors, grad, ctx.needs_input_grad[2:])


def _owner(encoder: Callable[..., Tensor], name: str) -> nn.Module:
    """The module that is the encoder, or whose method it is."""
    while isinstance(encoder, functools.partial):
        encoder = encoder.func
    owner = getattr(encoder, "__self__", encoder)
    if not isinstance(owner, nn.Module):
        raise ValueError(f"{name} is neither a module nor a module's method: name the modules it runs, modules=[...]")
    return owner
