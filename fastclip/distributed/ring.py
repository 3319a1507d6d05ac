"""The ring: each rank sees all columns of S, one rank's keys after the other, and never holds more than two of them.

Legend: y [m_r, D] this rank's keys, y_b [m_b, D] those of the block at hand, dy likewise; W ranks.

At step t rank r holds the keys of rank r - t, while those of rank r - t - 1 are on their way to it. The gradient of a
block follows it one step behind: each rank adds its part, the sum travels on while the next block is computed, and the
last rank sends it home.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor

from fastclip.checks import accumulation_dtype
from fastclip.distributed.shards import Shards

_KEYS, _GRADIENTS = 1, 2  # tags: two kinds of message are on the way at once


class Block(NamedTuple):
    """The columns of S that belong to one rank, and their keys [m_b, D]; own: it is this rank, and they come first."""

    cols: slice
    y: Tensor
    own: bool


def blocks(y: Tensor, shards: Shards) -> Iterator[Block]:
    """Every column of S once. A rank has to take all of its blocks: the others wait for them."""
    keys = y.detach().contiguous()
    for step in range(shards.world):
        owner = (shards.rank - step) % shards.world
        arriving, works = keys, []
        if step < shards.world - 1:
            arriving = keys.new_empty(shards.cols[owner - 1], keys.shape[1])
            works = _pass_on(keys, arriving, shards, _KEYS)
        yield Block(shards.columns(owner), keys, step == 0)
        for work in works:
            work.wait()
        keys = arriving


class Gradients:
    """Collects dy, block by block in the order of `blocks`, and brings it to the keys' owners; float32 on the way."""

    def __init__(self, shards: Shards) -> None:
        self.shards, self.step = shards, 0
        self.own: Tensor
        self.leaving: Tensor  # kept until it has left
        self.arriving: Tensor
        self.works: list[dist.Work]

    def add(self, dy: Tensor) -> None:
        """This rank's part of the next block's dy [m_b, D]."""
        if self.step == 0:
            self.own = dy
        else:
            total = dy.to(accumulation_dtype(dy.dtype))
            if self.step > 1:
                total = self._arrived().add_(total)
            owner = (self.shards.rank - self.step) % self.shards.world
            self.leaving, self.arriving = total, total.new_empty(self.shards.cols[owner - 1], total.shape[1])
            self.works = _pass_on(self.leaving, self.arriving, self.shards, _GRADIENTS)
        self.step += 1

    def home(self) -> Tensor:
        """The sum over all ranks for this rank's keys [m_r, D]."""
        return self.own if self.shards.world == 1 else self._arrived().add_(self.own).to(self.own.dtype)

    def _arrived(self) -> Tensor:
        for work in self.works:
            work.wait()
        return self.arriving


def _pass_on(leaving: Tensor, arriving: Tensor, shards: Shards, tag: int) -> list[dist.Work]:
    """Starts sending to the next rank and receiving from the previous one."""
    following, previous = (dist.get_global_rank(shards.group, (shards.rank + step) % shards.world) for step in (1, -1))
    return dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, leaving, following, shards.group, tag),
            dist.P2POp(dist.irecv, arriving, previous, shards.group, tag),
        ]
    )
