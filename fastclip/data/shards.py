"""Batches from tar shards, read as streams: each worker of each rank has one.

A stream reads its pieces of the shards in passes, in windows of `buffer` samples (fewer, if they are large), and
permutes each window. All that is a function of (seed, epoch, stream, pass, where the window starts), so a cursor (pass,
start of the window, samples taken of it) says where a stream stands, and going on means to read up to the window,
decoding nothing and leaving out whole shards whose counts are known.

Where the epoch's length is known (index.json, or `epoch_samples`), every rank gets the same number of batches and a
stream that runs dry begins another pass. Where it is not, one process reads each sample once and then the epoch ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from fastclip.data.batch import Batch
from fastclip.data.chance import generator_for
from fastclip.data.config import DataConfig
from fastclip.data.deal import Deal, Piece
from fastclip.data.fetch import Collate, Fetched, pieces_of
from fastclip.data.report import DataReport
from fastclip.data.sample import BadSample, Sample
from fastclip.data.tar import Note, label_of, read_shard
from fastclip.errors import UserError

# Passes of one stream without a sample that can be used.
EMPTY_TURNS = 10
# A window is full with so many bytes of images, however few they are.
LARGEST_WINDOW = 256 * 2**20
Cursor = tuple[int, int, int]
Notes = list[tuple[str, str]]


@dataclass(frozen=True, eq=False)
class Shards(IterableDataset):
    """The pieces of the batches of one epoch on one rank.

    UserError for less than a batch, and for a length that is needed and not known.
    """

    urls: tuple[str, ...]
    counts: dict[str, int]
    collate: Collate
    config: DataConfig
    batch: int
    rank: int
    world: int
    workers: int
    seed: int
    epoch: int = 0
    done: int = 0
    last: int = -1
    cursors: dict[int, Cursor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.length is None and (self.world > 1 or self.config.last == "wrap" or self.config.resample):
            raise UserError(
                "several processes, --data.last wrap and --data.resample need the length of an epoch, and there is no "
                "index.json with the counts of all shards: give --data.epoch-samples"
            )
        if self.steps == 0:
            ranks = f" on each of {self.world} processes" if self.world > 1 else ""
            raise UserError(f"the data has {self.length:,} samples, fewer than one batch of {self.batch:,}{ranks}")

    @property
    def problems(self) -> DataReport:
        return DataReport()

    @property
    def length(self) -> int | None:
        """Samples of an epoch, over all ranks."""
        if self.config.epoch_samples is not None:
            return self.config.epoch_samples
        known = all(url in self.counts for url in self.urls)
        return sum(self.counts[url] for url in self.urls) if known else None

    @property
    def steps(self) -> int | None:
        """Batches an epoch, the same on every rank; None where each sample is read once, however many there are."""
        if self.length is None or self.config.last == "keep":
            return None
        whole, rest = divmod(self.length, self.batch * self.world)
        return whole + (self.config.last == "wrap" and rest > 0 and whole > 0)

    @property
    def pieces(self) -> int:
        """In which each batch is fetched, from the streams in turn."""
        return pieces_of(self.batch)

    @property
    def streams(self) -> int:
        """Of each rank."""
        return max(self.workers, 1)

    def resume(self, epoch: int, done: int, state: dict[str, Any]) -> tuple[Shards, None]:
        """The data set of `epoch` after `done` batches; `state` as in Loader.streams."""
        cursors = {int(stream): tuple(cursor) for stream, cursor in state.get("cursors", {}).items()}
        last = state.get("last", -1)
        if cursors and state["dealt"] != self.dealt:
            # Other processes or workers: what is left of the epoch comes from a pass that none has begun.
            turn = 1 + max(cursor[0] for cursor in cursors.values())
            cursors, last = {stream: (turn, 0, 0) for stream in range(self.streams)}, -1
        return replace(self, epoch=epoch, done=done, last=last, cursors=cursors), None

    @property
    def dealt(self) -> list[int]:
        """What the streams' contents depend on, beside the seed."""
        return [self.world, self.streams]

    def __iter__(self) -> Iterator[Fetched]:
        worker = get_worker_info()
        number = worker.id if worker is not None else 0
        # The DataLoader asks its workers in turn, from the first: this one has the stream whose turn it is.
        stream = (self.last + 1 + number) % self.streams
        done, steps, pieces = self.done, self.steps, self.pieces
        left = None if steps is None else len(range(done * pieces + number, steps * pieces, self.streams))
        try:
            yield from islice(self._pieces(stream), left)
        except UserError as error:
            yield Fetched(None, failed=str(error))

    def _pieces(self, stream: int) -> Iterator[Fetched]:
        # What was met: in all pieces so far, and for this one.
        total, report = DataReport(), DataReport()
        images, captions, names = [], [], []
        cursor = self.cursors.get(stream, (0, 0, 0))
        good_turn = cursor[0]
        for cursor, sample, notes in self._samples(stream, cursor):  # noqa: B020
            for kind, name in notes:
                report.add(kind, name)
            if cursor[0] - good_turn == EMPTY_TURNS:
                total.merge(report)
                raise UserError(f"nothing can be read from the {len(self.urls):,} shards: {total.summary()}")
            if sample is None:
                continue
            generator = generator_for("sample", self.seed, self.epoch, self.rank, stream, *cursor)
            try:
                image, caption = self.collate.decode(sample, generator, report)
            except BadSample as bad:
                report.add(bad.kind, str(bad))
                so_far = DataReport(samples=len(images))
                so_far.merge(total)
                so_far.merge(report)
                so_far.check(self.config.max_skipped)
                continue
            good_turn = cursor[0]
            images.append(image)
            captions.append(caption)
            names.append(sample.name)
            if len(images) == self.batch // self.pieces:
                yield self._fetched(self.collate(images, captions, names, report), report, stream, cursor)
                total.merge(report)
                report = DataReport()
                images, captions, names = [], [], []
        rest = self.collate(images, captions, names, report) if self.config.last == "keep" else None
        yield self._fetched(rest, report, stream, cursor)

    def _fetched(self, piece: Batch | None, report: DataReport, stream: int, cursor: Cursor) -> Fetched:
        return Fetched(piece, report, stream=stream, cursor=cursor, counts=piece is not None)

    def _samples(self, stream: int, cursor: Cursor) -> Iterator[tuple[Cursor, Sample | None, Notes]]:
        """(cursor after it, sample, notes), pass after pass; one pass where the epoch has no known length.

        None for a sample that index.json counts and the shard lacks, and at the end of a pass.
        """
        turn, start, taken = cursor
        while True:
            yield from self._turn(stream, turn, start, taken)
            if self.steps is None:
                return
            turn, start, taken = turn + 1, 0, 0

    def _turn(self, stream: int, turn: int, start: int, skip: int) -> Iterator[tuple[Cursor, Sample | None, Notes]]:
        notes: Notes = []
        source = self._source(stream, turn, start, lambda kind, name: notes.append((kind, name)))
        while held := read_window(source, self.config.buffer):
            size = len(held)
            generator = generator_for("window", self.seed, self.epoch, self.rank, stream, turn, start)
            places = torch.randperm(size, generator=generator).tolist() if self.config.shuffle else list(range(size))
            for taken, place in enumerate(places):
                if taken >= skip:
                    yield (turn, start, taken + 1), held[place], notes if taken == 0 else []
                held[place] = None
            notes.clear()
            start, skip = start + size, 0
        yield (turn, start, 0), None, notes

    def _source(self, stream: int, turn: int, skip: int, note: Note) -> Iterator[Sample | None]:
        """The stream's samples of one pass in the shards' order, from the one numbered `skip`."""

        def after_skipping(kind: str, name: str) -> None:
            if not skip:
                note(kind, name)

        deal = Deal(len(self.urls), self.world * self.streams, self.seed, self.config.shuffle, self.config.resample)
        for piece in deal.pieces(stream * self.world + self.rank, self.epoch, turn):
            count = self.counts.get(self.urls[piece.shard])
            # Not where it ends just there: what the reader notes at its end belongs to the next window.
            if count is not None and piece.size(count) < skip:
                skip -= piece.size(count)
                continue
            for sample in self._piece(piece, count, after_skipping):
                if skip:
                    skip -= 1
                else:
                    yield sample

    def _piece(self, piece: Piece, count: int | None, note: Note) -> Iterator[Sample | None]:
        url = self.urls[piece.shard]
        # One of the streams that share a shard speaks for it.
        speak = note if piece.first == 0 else (lambda kind, name: None)
        read = 0
        for sample in read_shard(url, self.config.captions, speak):
            if read == count:
                speak("changed shard", f"{label_of(url)}: more samples than the {count:,} of index.json")
                return
            if piece.has(read):
                yield sample
            read += 1
        if count is not None and read < count:
            speak("changed shard", f"{label_of(url)}: {read:,} samples, index.json has {count:,}")
            for missing in range(read, count):
                if piece.has(missing):
                    yield None


def read_window(source: Iterator[Sample | None], most: int) -> list[Sample | None]:
    """The next `most` samples, or fewer where they fill LARGEST_WINDOW or the source ends."""
    held: list[Sample | None] = []
    size = 0
    for sample in source:
        held.append(sample)
        size += len(sample.image) if sample is not None and isinstance(sample.image, bytes) else 0
        if len(held) == most or size >= LARGEST_WINDOW:
            break
    return held
