"""The processes of a run: one alone, or those that torchrun started, on one machine or many."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor

from fastclip.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among the others. `group` is None for a process that torchrun did not start."""

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None

    @property
    def first(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.rank == 0

    def say(self, text: str) -> None:
        if self.first:
            print(text, flush=True)

    def barrier(self) -> None:
        if self.group is not None:
            dist.barrier()

    def from_first(self, value: Any) -> Any:
        """The first process's `value`, in all of them."""
        if self.group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def decided(self, decide: Callable[[], T]) -> T:
        """What `decide` returns in the first process, in all of them; its UserError is raised in all of them."""
        answer, problem = None, None
        if self.first:
            try:
                answer = decide()
            except UserError as error:
                problem = error
        answer, problem = self.from_first((answer, problem))
        if problem is not None:
            raise problem
        return answer

    def gather(self, value: Any) -> list[Any]:
        """Each process's `value`, in all of them."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def highest(self, value: int) -> int:
        """The largest of the processes' numbers."""
        if self.group is None:
            return value
        box = torch.tensor(value, device=self.device)
        dist.all_reduce(box, dist.ReduceOp.MAX)
        return int(box)

    def gather_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """[W n, ...]: each process's rows [n, ...], as many in each, on all of them. No gradient."""
        if self.group is None:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.size)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    def share(self, tensors: Iterable[torch.Tensor]) -> None:
        """Give every process the first one's values, in place."""
        if self.group is not None:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    @torch.no_grad()
    def average(self, tensors: Iterable[torch.Tensor | None]) -> None:
        """Replace each tensor by its mean over the processes."""
        if self.group is not None:
            for tensor in tensors:
                if tensor is not None:
                    dist.all_reduce(tensor)
                    tensor.div_(self.size)


@contextmanager
def processes(device: str | None) -> Iterator[World]:
    """The World of this process, with torchrun's process group: nccl on GPUs, gloo on CPUs."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    chosen = torch.device(device or (f"cuda:{local}" if torch.cuda.is_available() else "cpu"))
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"--device {device}: torch sees no GPU here")
        torch.cuda.set_device(chosen)
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield World(0, 1, chosen, None)
        return
    # torchrun keeps its store for the processes that it starts again: without names of their own they would find the
    # addresses of those that died (torch 2.13, --standalone: connection refused, or waiting for ever).
    store, rank, size = next(rendezvous("env://"))
    store = dist.PrefixStore(f"fastclip-{os.environ['TORCHELASTIC_RESTART_COUNT']}-of-{size}", store)
    # Naming the device binds the group to it: no communicator is made on the wrong GPU.
    binding = {"device_id": chosen} if chosen.type == "cuda" else {}
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, **binding)
    try:
        yield World(dist.get_rank(), dist.get_world_size(), chosen, dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def restarted() -> bool:
    """Whether torchrun has started this process again after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def gradient_norm(parameters: Iterable[nn.Parameter]) -> float:
    """The 2-norm of all gradients together, over all shards of those that are sharded. May be inf or NaN."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    whole = [g for g in gradients if not isinstance(g, DTensor)]
    sharded = [g for g in gradients if isinstance(g, DTensor)]
    total = torch.nn.utils.get_total_norm(whole).square()
    if sharded:
        total = total + torch.nn.utils.get_total_norm(sharded).full_tensor().square()
    return total.sqrt().item()


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a sharded tensor; every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
