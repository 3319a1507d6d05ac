"""What the trainer gets: pictures and token ids, row by row the two sides of a pair."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

import torch


@dataclass(frozen=True)
class Batch:
    """N pairs: `images` float32 [N, C, S, S] and `tokens` int64 [N, L].

    `pair_ids` int64 [N], where asked for, is equal in rows of equal captions: for the losses' `ids`.
    """

    images: torch.Tensor
    tokens: torch.Tensor
    pair_ids: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """In page-locked memory, from where copies to a GPU run beside the computation."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, function) -> Batch:
        ids = None if self.pair_ids is None else function(self.pair_ids)
        return Batch(function(self.images), function(self.tokens), ids)


def caption_ids(captions: list[str]) -> torch.Tensor:
    """int64 [N]: equal for captions that differ in case or white space only, the same in every process and run."""
    digests = (blake2b(caption.casefold().encode(), digest_size=8).digest() for caption in captions)
    return torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests], dtype=torch.int64)
