"""What OpenCLIP's losses say about processes in their constructors, and what that means here."""

import functools
import warnings

import torch.distributed as dist

from fastclip.distributed.shards import Sharded

# OpenCLIP's ways of passing the texts on, None its default.
MODE_OF_DIST_IMPL = {None: "ring", "bidir": "ring", "shift": "ring", "reduce": "gather", "gather": "gather"}


def default_group(rank: int, world_size: int, sharded: Sharded) -> Sharded | None:
    """`sharded`, for the default group, which has to be the one that the arguments describe; None for one process."""
    if world_size <= 1:  # OpenCLIP's tests pass 0 for one process
        return None
    if not dist.is_initialized():
        raise ValueError(f"world_size={world_size} needs torch.distributed.init_process_group first")
    if (rank, world_size) != (dist.get_rank(), dist.get_world_size()):
        got = f"rank={dist.get_rank()} and world_size={dist.get_world_size()}"
        raise ValueError(f"rank={rank} and world_size={world_size} do not fit the default process group, {got}")
    return sharded


def no_horovod(use_horovod: bool, world_size: int) -> None:
    if use_horovod and world_size > 1:
        raise NotImplementedError("Horovod is not supported: use torch.distributed (DDP or FSDP)")


@functools.cache
def warn_of_local_loss() -> None:
    """Once per process."""
    message = (
        "local_loss without gather_with_grad: OpenCLIP's gradients leave out the other ranks' share. fastclip computes "
        "those of the whole batch, as with gather_with_grad=True"
    )
    warnings.warn(message, UserWarning, stacklevel=4)
