"""An encoder's input, cut along the batch: a tensor, or a tuple, list or mapping of tensors (nested as well)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

Call = Callable[[Callable[..., Tensor], Iterator[Tensor]], Tensor]


def take_apart(value: object, name: str) -> tuple[list[Tensor], Call]:
    """The tensors of `value`, and a function call(encoder, others) that runs an encoder on others in their places.

    It calls encoder(tensor), encoder(*sequence) or encoder(**mapping), and keeps no tensor of `value` alive.
    ValueError unless the tensors are [N, ...] of one N >= 1.
    """
    tensors: list[Tensor] = []
    rebuild = _structure(value, tensors)
    shapes = [tuple(tensor.shape) for tensor in tensors]
    sizes = {shape[:1] for shape in shapes}
    if len(sizes) != 1 or sizes <= {(), (0,)}:
        raise ValueError(f"{name} must hold tensors [N, ...] of one N >= 1, got {shapes or 'no tensor'}")
    if isinstance(value, Mapping):
        return tensors, lambda encoder, others: encoder(**rebuild(others))
    if isinstance(value, (tuple, list)):
        return tensors, lambda encoder, others: encoder(*rebuild(others))
    return tensors, lambda encoder, others: encoder(rebuild(others))


def _structure(value: object, tensors: list[Tensor]) -> Callable[[Iterator[Tensor]], Any]:
    """Appends the tensors inside `value`; the result puts others into their places. Mappings become dicts."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return next
    if isinstance(value, Mapping):
        named = {name: _structure(part, tensors) for name, part in value.items()}
        return lambda others: {name: rebuild(others) for name, rebuild in named.items()}
    if isinstance(value, (tuple, list)):
        parts = [_structure(part, tensors) for part in value]
        kind = list if isinstance(value, list) else tuple
        return lambda others: kind(rebuild(others) for rebuild in parts)
    return lambda others: value
