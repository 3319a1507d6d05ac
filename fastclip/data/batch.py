"""What the trainer gets: pictures and token ids, row by row the two sides of a pair."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch.nn.functional import pad


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


class Joined:
    """A batch of `rows` pairs that comes in pieces: each is copied to its place and can then be freed."""

    def __init__(self, rows: int, pin_memory: bool) -> None:
        self.rows, self.pin_memory, self.filled = rows, pin_memory, 0
        self.images: torch.Tensor | None = None
        self.tokens: list[torch.Tensor] = []
        self.pair_ids: list[torch.Tensor] = []

    def add(self, piece: Batch) -> None:
        """`piece` has pair_ids."""
        if self.images is None:
            shape = (self.rows, *piece.images.shape[1:])
            self.images = torch.empty(shape, dtype=piece.images.dtype, pin_memory=self.pin_memory)
        self.images[self.filled : self.filled + len(piece)] = piece.images
        self.filled += len(piece)
        # Copies: tensors from other processes hold an open file each, and a process may have few.
        self.tokens.append(piece.tokens.clone())
        self.pair_ids.append(piece.pair_ids.clone())

    def batch(self) -> Batch | None:
        """None where nothing was added. Rows of tokens are padded with 0 to the longest."""
        if self.images is None:
            return None
        longest = max(tokens.shape[1] for tokens in self.tokens)
        tokens = torch.cat([pad(tokens, (0, longest - tokens.shape[1])) for tokens in self.tokens])
        pair_ids = torch.cat(self.pair_ids)
        if self.pin_memory:
            tokens, pair_ids = tokens.pin_memory(), pair_ids.pin_memory()
        return Batch(self.images[: self.filled], tokens, pair_ids)
