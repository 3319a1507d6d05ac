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
    piece = config.micro_batch
    text = Moved(wrapped(model.text, config, world), world.device)
    if config.model.lock_image:
        image = Frozen(Moved(model.image, world.device), piece)
    else:
        image = Moved(wrapped(model.image, config, world), world.device)
    if piece is not None and not config.model.lock_image:
        cached = GradCache([image, text], piece)
        return lambda batch: cached(batch.images, batch.tokens)
    if piece is not None:
        cached_text = GradCache([text], piece)
        return lambda batch: (image(batch.images), *cached_text(batch.tokens))
    return lambda batch: (image(batch.images), text(batch.tokens))


class Moved(nn.Module):
    """A tower whose inputs wait where they are: with micro-batches a GPU holds one of them, not the whole batch."""

    def __init__(self, tower: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.tower, self.device = tower, device

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.tower(inputs.to(self.device, non_blocking=True))


class Frozen(nn.Module):
    """A frozen tower, `piece` rows at a time (None: all at once); nothing is kept for backward."""

    def __init__(self, tower: nn.Module, piece: int | None) -> None:
        super().__init__()
        self.tower, self.piece = tower, piece

    @torch.no_grad()
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.tower(part) for part in inputs.split(self.piece or len(inputs))])


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


def wrapped(tower: nn.Module, config: TrainConfig, world: World) -> nn.Module:
    """A trained tower, compiled and replicated as the configuration says. Each has a reducer of its own."""
    if config.precision.compile:
        tower.compile()
    if world.group is None or config.parallel == "fsdp":
        return tower
    # Buffers are the first process's; World.share gives them to the others when they are read, not at every step.
    devices = [world.device] if world.device.type == "cuda" else None
    return DistributedDataParallel(tower, device_ids=devices, gradient_as_bucket_view=True, **{SYNC_BUFFERS: False})
