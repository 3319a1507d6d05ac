"""Gradient checkpointing: a module's inner activations are computed again in backward instead of being kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def call(module: nn.Module, *args: object, recomputed: bool) -> torch.Tensor:
    """module(*args), its activations kept or `recomputed`. The result and the module's state are the same."""
    if not (recomputed and torch.is_grad_enabled()):
        return module(*args)
    # Nothing random happens inside the towers' blocks, so there is no generator to put back.
    again = partial(checkpoint, module, *args, use_reentrant=False, preserve_rng_state=False)
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm)]
    # A compiled graph writes its buffers once, however often it computes a value.
    if not norms or torch.compiler.is_compiling():
        return again()
    return again(context_fn=lambda: (nullcontext(), _statistics_kept(norms)))


@contextmanager
def _statistics_kept(norms: list[_BatchNorm]) -> Iterator[None]:
    """Batch normalisation moves its running statistics in each forward pass; the second must not count."""
    own = [dict(norm._buffers) for norm in norms]
    for norm in norms:
        norm._buffers.update({name: b.clone() for name, b in norm._buffers.items() if b is not None})
    try:
        yield
    finally:
        for norm, buffers in zip(norms, own, strict=True):
            norm._buffers.update(buffers)
