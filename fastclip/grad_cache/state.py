"""What a second forward pass must find as the first one found it: random generators, autocast, buffers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn


class RandomState:
    """The states of torch's global generators: the CPU's and those of `devices`."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self.cpu = torch.get_rng_state()
        self.others = [(d, torch.get_device_module(d).get_rng_state(*_which(d))) for d in devices]

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        for device, state in self.others:
            torch.get_device_module(device).set_rng_state(state, *_which(device))


def _which(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type == "mps" else (device,)  # there is only one


def devices_of(tensors: Iterable[Tensor]) -> list[torch.device]:
    """Where code that works on these tensors may draw random numbers, the CPU left out."""
    found = {tensor.device for tensor in tensors}
    if torch.accelerator.is_available():
        found.add(torch.device(torch.accelerator.current_accelerator().type, torch.accelerator.current_device_index()))
    return sorted((device for device in found if device.type not in ("cpu", "meta")), key=str)


@contextmanager
def random_state_kept(devices: Iterable[torch.device]) -> Iterator[None]:
    """Afterwards the generators are where they were before."""
    before = RandomState(devices)
    try:
        yield
    finally:
        before.restore()


class Autocast:
    """torch.autocast as it is now on the CPU and on the types of `devices`; apply() brings it back elsewhere."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        types = sorted({"cpu", *(device.type for device in devices)})
        self.states = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in types
            if torch.amp.is_autocast_available(kind)
        ]
        self.caches = torch.is_autocast_cache_enabled()

    @contextmanager
    def apply(self) -> Iterator[None]:
        """Inside, autocast is as it was."""
        forget_rounded_weights()
        with ExitStack() as stack:
            for kind, enabled, dtype in self.states:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=self.caches))
            yield


def forget_rounded_weights() -> None:
    """Autocast keeps the weights it has rounded; torch 2.10 gives those rounded without a graph to code that needs one.

    Such code gets no gradient and no error (pytorch/pytorch#158232).
    """
    torch.clear_autocast_cache()


class Unchanged:
    """The modules' parameters and modes as they are now: with others the second pass would belong to other features."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        modules = list(modules)
        self.versions = [(p, p._version) for module in modules for p in module.parameters()]
        self.modes = [(part, part.training) for module in modules for part in module.modules()]

    def check(self) -> None:
        """RuntimeError where one has changed."""
        if any(p._version != version for p, version in self.versions):
            raise RuntimeError("a parameter has changed since GradCache was called: the features are out of date")
        if any(part.training != training for part, training in self.modes):
            raise RuntimeError("train() or eval() since GradCache was called: the second pass would not be the first")


class Buffers:
    """Copies of the buffers that training changes: those of the submodules in training mode."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        parts = {id(part): part for module in modules for part in module.modules() if part.training}
        buffers = {id(b): b for part in parts.values() for b in part.buffers(recurse=False)}
        self.copies: list[tuple[Tensor, Tensor]] = [(buffer, buffer.detach().clone()) for buffer in buffers.values()]

    @torch.no_grad()
    def restore(self) -> None:
        for buffer, copy in self.copies:
            buffer.copy_(copy)

    @contextmanager
    def apply(self) -> Iterator[None]:
        """Inside, the buffers begin with the copied values; afterwards they are as they were before."""
        present = [(buffer, buffer.detach().clone()) for buffer, _ in self.copies]
        self.restore()
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in present:
                    buffer.copy_(value)
