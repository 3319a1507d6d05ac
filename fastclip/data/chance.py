"""All randomness of the data: pure functions of (seed, epoch, position), so that a run can go on from anywhere."""

from __future__ import annotations

import math
from hashlib import blake2b

import torch


def generator_for(*parts: int | str) -> torch.Generator:
    """A generator of its own for each tuple, such as ("sample", seed, epoch, position)."""
    digest = blake2b(",".join(map(str, parts)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def order(size: int, length: int, seed: int, epoch: int, *, shuffle: bool, resample: bool) -> torch.Tensor:
    """int64 [length], indices below `size`: shuffled, drawn with replacement, or as they come.

    Beyond `size` it goes round: each further pass holds every index once and has its own permutation.
    """
    if resample:
        return torch.randint(size, (length,), generator=generator_for("order", seed, epoch))
    rounds = range(math.ceil(length / size))
    if not shuffle:
        return torch.arange(size).repeat(len(rounds))[:length]
    return torch.cat([torch.randperm(size, generator=generator_for("order", seed, epoch, turn)) for turn in rounds])[
        :length
    ]
