"""What travels from the process that decodes to the one that trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from fastclip.data.batch import Batch, caption_ids
from fastclip.data.report import DataReport
from fastclip.data.sample import Decoder

Tokenizer = Callable[[list[str]], torch.Tensor]


@dataclass(frozen=True)
class Fetched:
    """A batch, and what was met while it was made. Without a batch: nothing was left to fill one.

    `stream` and `cursor`: for shards, which worker's stream it came from and how far that had been read.
    `counts`: whether it is one of the epoch's steps. `failed`: the message of a UserError, to be raised where it makes
    one line.
    """

    batch: Batch | None
    report: DataReport = field(default_factory=DataReport)
    stream: int | None = None
    cursor: tuple[int, int] = (0, 0)
    counts: bool = True
    failed: str | None = None

    def pin_memory(self) -> Fetched:
        return self if self.batch is None else replace(self, batch=self.batch.pin_memory())


@dataclass(frozen=True)
class Collate:
    """Decoded samples -> Batch; counts duplicate and over-long captions."""

    decode: Decoder
    tokenizer: Tokenizer
    pair_ids: bool

    def __call__(
        self, images: Sequence[torch.Tensor], captions: list[str], names: Sequence[str], report: DataReport
    ) -> Batch | None:
        """None for no samples."""
        if not captions:
            return None
        ids = caption_ids(captions)
        report.samples += len(captions)
        report.duplicates += len(captions) - len(ids.unique())
        # Tokenizers that can tell, do.
        if truncated := getattr(self.tokenizer, "truncated", None):
            for row in truncated(captions).nonzero().flatten().tolist():
                report.add("long caption", names[row])
        return Batch(torch.stack(list(images)), self.tokenizer(captions), ids if self.pair_ids else None)
