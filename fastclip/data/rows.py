"""Batches of a source whose samples can be read in any order: tables, folders, Hugging Face data sets, glyphs.

Batch b of an epoch is a pure function of (seed, epoch, b, rank): rows [b B W + r B, b B W + (r + 1) B) of the epoch's
order, for batches of B on each of W ranks. So the batches of all ranks side by side are those of one process with W
times the batch, the number of workers changes nothing, and going on from batch b costs nothing. Workers fetch a batch
in pieces.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch.utils.data import Dataset

from fastclip.data.chance import generator_for, order
from fastclip.data.config import DataConfig
from fastclip.data.fetch import Collate, Fetched, pieces_of
from fastclip.data.report import DataReport
from fastclip.data.sample import BadSample, Sample
from fastclip.errors import UserError

# As many substitutes in a row that cannot be used either: the data is beyond use.
ATTEMPTS = 1000


class Source(Protocol):
    """Samples by number. `problems`: what was met when it was opened. Reading may raise BadSample."""

    problems: DataReport

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


@dataclass(frozen=True, eq=False)
class Rows(Dataset):
    """The pieces of the batches of one epoch on one rank. UserError for fewer samples than one batch."""

    source: Source
    collate: Collate
    config: DataConfig
    batch: int
    rank: int
    world: int
    seed: int
    epoch: int = 0
    order: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    def __post_init__(self) -> None:
        if not self.steps:
            ranks = f" on each of {self.world} processes" if self.world > 1 else ""
            raise UserError(f"the data has {self.length:,} samples, fewer than one batch of {self.batch:,}{ranks}")

    @property
    def length(self) -> int:
        """Samples an epoch, over all ranks."""
        return self.config.epoch_samples or len(self.source)

    @property
    def steps(self) -> int:
        """Batches an epoch, the same on every rank."""
        whole, rest = divmod(self.length, self.batch * self.world)
        keeps = self.config.last == "keep" or (self.config.last == "wrap" and whole > 0)
        return whole + (rest > 0 and keeps)

    @property
    def problems(self) -> DataReport:
        return self.source.problems

    @property
    def dealt(self) -> None:
        """No batch depends on how many processes or workers there are."""

    @property
    def pieces(self) -> int:
        """In which each batch is fetched."""
        return pieces_of(self.batch)

    def resume(self, epoch: int, done: int, state: dict[str, Any]) -> tuple[Rows, Iterable[int]]:
        """(the data set, the numbers of the pieces left) of `epoch` after `done` batches."""
        keep = self.config.last == "keep"
        length = self.length if keep else self.steps * self.batch * self.world
        config = self.config
        rows = order(len(self.source), length, self.seed, epoch, shuffle=config.shuffle, resample=config.resample)
        count = math.ceil(length / (self.batch // self.pieces)) if keep else self.steps * self.pieces
        return replace(self, epoch=epoch, order=rows), range(done * self.pieces, count)

    def __getitem__(self, number: int) -> Fetched:
        step, piece = divmod(number, self.pieces)
        size = self.batch // self.pieces
        start = (step * self.world + self.rank) * self.batch
        first = start + piece * size
        report = DataReport()
        images, captions, names = [], [], []
        for position, row in enumerate(self.order[first : first + size].tolist(), first):
            try:
                name, image, caption = self._decoded(row, position, start, report)
            except BadSample:
                continue
            except UserError as error:
                return Fetched(None, report, failed=str(error))
            images.append(image)
            captions.append(caption)
            names.append(name)
        return Fetched(self.collate(images, captions, names, report), report)

    def _decoded(self, row: int, position: int, start: int, report: DataReport) -> tuple[str, torch.Tensor, str]:
        """The sample at `row`, or a random one in its place, if possible one that the batch from `start` lacks.

        BadSample when none is wanted (last="keep"), UserError when none can be found.
        """
        generator = generator_for("sample", self.seed, self.epoch, position)
        used: set[int] = set()
        for _ in range(ATTEMPTS):
            try:
                sample = self.source[row]
                return sample.name, *self.collate.decode(sample, generator, report)
            except BadSample as bad:
                report.add(bad.kind, str(bad))
                if self.config.last == "keep":
                    raise
            used = used or set(self.order[start : start + self.batch].tolist())
            row = int(torch.randint(len(self.source), (1,), generator=generator))
            while row in used and len(used) < len(self.source):
                row = int(torch.randint(len(self.source), (1,), generator=generator))
            used.add(row)
        raise UserError(f"{ATTEMPTS:,} samples in a row cannot be used: {report.summary()}")
