"""What travels from the process that decodes to the one that trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from fastclip.data.batch import Batch, caption_ids
from fastclip.data.report import DataReport
from fastclip.data.sample import Decoder

Tokenizer = Callable[[list[str]], torch.Tensor]


# Samples that a worker decodes at a time, at most: a batch is many such pieces, so that all workers are busy with the
# batch that is wanted next, and what they hold does not grow with it.
LARGEST_PIECE = 256
SMALLEST_PIECE = 32


def pieces_of(batch: int) -> int:
    """In how many equal pieces a batch is fetched: as few as LARGEST_PIECE allows; one if they would be tiny."""
    fitting = (count for count in range(1, batch + 1) if batch % count == 0 and batch // count <= LARGEST_PIECE)
    pieces = next(fitting)
    return pieces if batch // pieces >= min(batch, SMALLEST_PIECE) else 1


@dataclass(frozen=True)
class Fetched:
    """A piece of a batch, and what was met while it was made. Without a piece: nothing was left to fill one.

    `stream` and `cursor`: for shards, which worker's stream it came from and how far that had been read.
    `counts`: whether it is one of a batch's pieces. `failed`: the message of a UserError, to be raised where it makes
    one line.
    """

    piece: Batch | None
    report: DataReport = field(default_factory=DataReport)
    stream: int | None = None
    cursor: tuple[int, int, int] = (0, 0, 0)
    counts: bool = True
    failed: str | None = None


@dataclass(frozen=True)
class Collate:
    """Decoded samples -> a piece of a Batch, with pair_ids; counts samples and over-long captions."""

    decode: Decoder
    tokenizer: Tokenizer

    def __call__(
        self, images: Sequence[torch.Tensor], captions: list[str], names: Sequence[str], report: DataReport
    ) -> Batch | None:
        """None for no samples."""
        if not captions:
            return None
        report.samples += len(captions)
        # Tokenizers that can tell, do.
        if truncated := getattr(self.tokenizer, "truncated", None):
            for row in truncated(captions).nonzero().flatten().tolist():
                report.add("long caption", names[row])
        return Batch(torch.stack(list(images)), self.tokenizer(captions), caption_ids(captions))
