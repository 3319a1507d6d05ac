"""How a pass over the shards is dealt to the streams that read it: each sample to exactly one of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastclip.data.chance import generator_for, order


@dataclass(frozen=True)
class Piece:
    """Of a shard, the samples j with first <= j % modulus < last."""

    shard: int
    first: int = 0
    last: int = 1
    modulus: int = 1

    def has(self, sample: int) -> bool:
        return self.first <= sample % self.modulus < self.last

    def size(self, samples: int) -> int:
        """How many of a shard's first `samples` samples belong to the piece."""
        whole, rest = divmod(samples, self.modulus)
        return whole * (self.last - self.first) + min(max(rest - self.first, 0), self.last - self.first)


@dataclass(frozen=True)
class Deal:
    """`streams` = ranks times workers. Whole shards as far as they go round; the rest is cut into equal pieces."""

    shards: int
    streams: int
    seed: int
    shuffle: bool
    resample: bool

    def pieces(self, stream: int, epoch: int, turn: int) -> list[Piece]:
        """What `stream` reads in pass `turn` of `epoch`, in order. With resampling: whole shards, drawn at random."""
        if self.resample:
            drawn = math.ceil(self.shards / self.streams)
            key = generator_for("shards", self.seed, epoch, turn, stream).initial_seed()
            return [Piece(shard) for shard in order(self.shards, drawn, key, 0, shuffle=True, resample=True).tolist()]
        # A key of its own for each pass: `order` knows seed and epoch only.
        key = generator_for("shards", self.seed, turn).initial_seed()
        shards = order(self.shards, self.shards, key, epoch, shuffle=self.shuffle, resample=False).tolist()
        whole, rest = divmod(self.shards, self.streams)
        pieces = [Piece(shard) for shard in shards[stream : whole * self.streams : self.streams]]
        # The rest, each shard in as many slices as there are streams, is a row of rest * streams slices: `rest` each.
        first, end = stream * rest, (stream + 1) * rest
        while first < end:
            shard, low = divmod(first, self.streams)
            high = min(self.streams, low + end - first)
            pieces.append(Piece(shards[whole * self.streams + shard], low, high, self.streams))
            first += high - low
        return pieces
