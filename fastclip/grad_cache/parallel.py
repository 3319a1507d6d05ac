"""One reduction of the gradients per backward pass, over the processes of DistributedDataParallel and of FSDP2.

Here "replay" is one micro-batch's second pass, forward and backward; there are many in one backward pass.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable

# The last backward pass, by autograd's number, that ends with a reduction of a DistributedDataParallel's gradients.
_REDUCED_AFTER: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()


class Reduction:
    """What the data-parallel wrappers among `modules` do in the passes of one call.

    wanted: whether gradients are to be reduced; DistributedDataParallel.no_sync counts as well, as it is now.
    ValueError for a DistributedDataParallel with static_graph=True, which counts the gradients of a parameter.
    """

    def __init__(self, modules: Sequence[nn.Module], wanted: bool) -> None:
        self.wanted = wanted
        self.replicated, self.sharded, self.synchronised = _wrappers(modules)
        if any(module.static_graph for module in self.replicated):
            raise ValueError("gradient caching encodes several times a step: build DDP without static_graph=True")
        self._reduced = [module for module in self.replicated if wanted and module.require_backward_grad_sync]

    def at_the_end(self) -> None:
        """Within a backward pass: reduce the replicated modules' gradients once, when all of it is done.

        Not with the last replay: the logit scale's gradient, or another loss's, may come after that.
        """
        backward_pass = torch._C._current_graph_task_id()
        for module in self._reduced:
            if _REDUCED_AFTER.get(module) != backward_pass:
                _REDUCED_AFTER[module] = backward_pass
                Variable._execution_engine.queue_callback(functools.partial(_reduce_now, module))

    @contextmanager
    def replays(self) -> Iterator[None]:
        """Inside, replicated modules that are called prepare no reduction of their own."""
        with ExitStack() as stack:
            for module in self.replicated:
                stack.enter_context(module.no_sync())
            yield
        for module in self.sharded:
            module.reshard()

    @contextmanager
    def replay(self, last: bool) -> Iterator[None]:
        """Inside, sharded modules add up gradients, and reduce them in the last replay."""
        for module in self.sharded:
            module.set_requires_gradient_sync(last and self.wanted, recurse=False)
        try:
            yield
        finally:
            for module in self.sharded:
                module.set_requires_gradient_sync(True, recurse=False)

    def check_same(self, micro_batches: list[int]) -> None:
        """ValueError on every process if they differ in the forward passes in which they meet; one number a tower."""
        for group, device in _meetings(self.sharded, self.synchronised):
            most, least = torch.tensor(micro_batches, device=device), torch.tensor(micro_batches, device=device)
            dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
            dist.all_reduce(least, dist.ReduceOp.MIN, group=group)
            if not torch.equal(most, least):
                raise ValueError(
                    "FSDP2 and SyncBatchNorm make the processes meet in each forward pass, so all need the same number "
                    f"of micro-batches, got {micro_batches} here, {least.tolist()} to {most.tolist()} in all"
                )


def warn_if_alone(modules: Sequence[nn.Module]) -> None:
    """For encoders that say nothing of the other processes: nobody would reduce their gradients."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        replicated, sharded, _ = _wrappers(modules)
        if not replicated and not sharded:
            warnings.warn(
                "GradCache sees neither DistributedDataParallel nor FSDP2, so each process keeps its own gradients: "
                "name the wrapper, modules=[ddp_model], or the bare model if you reduce them yourself",
                stacklevel=3,
            )


def _wrappers(modules: Sequence[nn.Module]) -> tuple[list[Any], list[Any], list[Any]]:
    """DistributedDataParallel, FSDP2 and SyncBatchNorm modules inside `modules`, each once."""
    if not (dist.is_available() and dist.is_initialized()):
        return [], [], []
    from torch.distributed.fsdp import FSDPModule
    from torch.nn.parallel import DistributedDataParallel

    parts = {id(part): part for module in modules for part in module.modules()}.values()
    kinds = (DistributedDataParallel, FSDPModule, nn.SyncBatchNorm)
    return tuple([part for part in parts if isinstance(part, kind)] for kind in kinds)


def _meetings(sharded: Sequence[nn.Module], synchronised: Sequence[nn.SyncBatchNorm]) -> list[Any]:
    """(process group, device) pairs in which these modules communicate during a forward pass."""
    from torch.distributed.tensor import DTensor

    shards = [p for module in sharded for p in module.parameters() if isinstance(p, DTensor)]
    found = [(group, p.device) for p in shards for group in p.device_mesh.get_all_groups()]
    for module in synchronised:
        if module.training:
            found.append((module.process_group or dist.group.WORLD, module.running_mean.device))
    return list(dict.fromkeys(found))


def _reduce_now(module: Any) -> None:
    """Have a DistributedDataParallel average the gradients that its parameters hold, in its own way.

    Its reducer waits for a hook per parameter after a forward pass of its own. A backward pass through a node that
    touches all parameters and gives none of them a gradient fires those hooks; an undefined gradient adds nothing.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    with torch.enable_grad():
        touched = _Touch.apply(torch.zeros((), device=parameters[0].device), *parameters)
        module.require_forward_param_sync = True  # as after a forward pass: the next one broadcasts the buffers
        module.reducer.prepare_for_forward()
        module.reducer._rebuild_buckets()
        module.reducer.prepare_for_backward([touched] if module.find_unused_parameters else [])
        touched.backward()


class _Touch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value: Tensor, *parameters: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, ...]:
        return (None,) * len(ctx.needs_input_grad)
