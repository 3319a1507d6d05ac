"""How the two towers run: compiled, spread over processes, a piece of the batch at a time, or just as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import signature

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from fastclip.clip.model import Clip
from fastclip.data.batch import Batch
from fastclip.errors import UserError
from fastclip.grad_cache import GradCache
from fastclip.train.config import TrainConfig
from fastclip.train.parallel import World

# torch 2.13 renamed it; the old name warns there.
NAMES = signature(DistributedDataParallel).parameters
SYNC_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in NAMES else "broadcast_buffers"
Encode = Callable[[Batch], tuple[torch.Tensor, torch.Tensor]]


def prepare(model: Clip, config: TrainConfig, world: World) -> None:
    """Freeze, move and, for FSDP2, shard the model in place: before the optimiser is made."""
    model.to(world.device)
    if config.model.lock_image:
        model.image.requires_grad_(False)
    model.set_grad_checkpointing(config.model.recompute)
    if world.group is None or config.parallel == "ddp":
        model.to(memory_format=torch.channels_last)  # faster convolutions; FSDP2 takes contiguous weights only
        return
    mesh = init_device_mesh(world.device.type, (world.size,))
    for tower in trained_towers(model):
        for blocks in (part for part in tower.modules() if isinstance(part, nn.ModuleList)):
            for block in blocks:
                fully_shard(block, mesh=mesh)
        fully_shard(tower, mesh=mesh)


def make_encode(model: Clip, config: TrainConfig, world: World) -> Encode:
    """Batch -> (image features [N, D], text features [N, D]), ready for backward. UserError for a bad micro-batch."""
    check_pieces(model, config, world)
    wrap = wrapper(config, world)
    text = wrap(model.text)
    if config.model.lock_image:
        image = locked(model.image, config.micro_batch)
        if config.micro_batch is None:
            return lambda batch: (image(batch.images), text(batch.tokens))
        cached_text = GradCache([text], config.micro_batch)
        return lambda batch: (image(batch.images), *cached_text(batch.tokens))
    image = wrap(model.image)
    if config.micro_batch is None:
        return lambda batch: (image(batch.images), text(batch.tokens))
    cached = GradCache([image, text], config.micro_batch)
    return lambda batch: cached(batch.images, batch.tokens)


def check_pieces(model: Clip, config: TrainConfig, world: World) -> None:
    """UserError where batch normalisation would get a single pair."""
    pairs, piece = config.batch // world.size, config.micro_batch or config.batch
    normalised = any(isinstance(part, _BatchNorm) for tower in trained_towers(model) for part in tower.modules())
    if normalised and 1 in (pairs, piece, pairs % piece):
        raise UserError(
            f"batch normalisation needs more than one pair: {pairs} pairs of each process in pieces of {piece} leave "
            "one alone; change --batch or --micro-batch"
        )


def trained_towers(model: Clip) -> Sequence[nn.Module]:
    return [tower for tower in (model.image, model.text) if any(p.requires_grad for p in tower.parameters())]


def wrapper(config: TrainConfig, world: World) -> Callable[[nn.Module], nn.Module]:
    """What a trained tower is wrapped in. Each tower has its own reducer, so that both encoders are plain modules."""

    def wrap(tower: nn.Module) -> nn.Module:
        if config.precision.compile:
            tower.compile()
        if world.group is None or config.parallel == "fsdp":
            return tower
        # Buffers are the first process's; TrainState shares them when they are read, not at every step.
        devices = [world.device] if world.device.type == "cuda" else None
        return DistributedDataParallel(tower, device_ids=devices, gradient_as_bucket_view=True, **{SYNC_BUFFERS: False})

    return wrap


def locked(tower: nn.Module, micro_batch: int | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """A frozen tower, in evaluation mode, a piece at a time; nothing is kept for backward."""

    @torch.no_grad()
    def encode(inputs: torch.Tensor) -> torch.Tensor:
        return torch.cat([tower(part) for part in inputs.split(micro_batch or len(inputs))])

    return encode
