"""Batches for the trainer, from any source, that can go on exactly where they were left.

Order and randomness are pure functions of (seed, epoch, position), so the state is how far the epoch has been handed
out; batches that workers have fetched ahead are not in it, and are fetched again.
"""

from __future__ import annotations

import copy
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import DataLoader

from fastclip.data.batch import Batch, Joined
from fastclip.data.chance import generator_for
from fastclip.data.config import DataConfig
from fastclip.data.fetch import Collate, Fetched, Tokenizer
from fastclip.data.report import REFUSED, SKIPPED, DataReport
from fastclip.data.rows import Rows
from fastclip.data.sample import Decoder
from fastclip.data.shard_files import expand, read_counts
from fastclip.data.shards import Shards
from fastclip.data.sources import kind_of, open_rows
from fastclip.errors import UserError

VERSION = 1


def make_loader(
    config: DataConfig,
    tokenizer: Tokenizer,
    transform: Callable[..., torch.Tensor],
    batch: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    seed: int = 0,
    pin_memory: bool = False,
) -> Loader:
    """A Loader of batches of `batch` pairs for process `rank` of `world`, decoded by `workers` processes.

    tokenizer(captions) gives int64 [N, L]; transform(RGB PIL image) float32 [C, S, S], with a torch.Generator as
    `generator` if it has that parameter. UserError for data that cannot be used, ValueError for numbers that cannot be.
    """
    config.check()
    if batch < 1 or workers < 0 or not 0 <= rank < world:
        raise ValueError(
            f"need batch >= 1, workers >= 0 and 0 <= rank < world, got {batch}, {workers}, {rank}, {world}"
        )
    if config.last == "keep" and world > 1:
        raise ValueError("last='keep' is for one process: ranks would get batches of different sizes")
    collate = Collate(Decoder.of(transform), tokenizer)
    if kind_of(config) == "shards":
        urls = tuple(expand(config.sources))
        plan = Shards(urls, read_counts(urls), collate, config, batch, rank, world, workers, seed)
    else:
        plan = Rows(open_rows(config), collate, config, batch, rank, world, seed)
    return Loader(plan, workers, pin_memory)


class Loader:
    """Iterating gives the rest of the current epoch, and then moves on to the next.

    `epoch` and `batches` (handed out in it) say where it stands; `steps_per_epoch` is None where only reading the data
    would tell; `report` counts what was handed out and what was wrong with it.
    """

    def __init__(self, plan: Rows | Shards, workers: int = 0, pin_memory: bool = False) -> None:
        self.plan, self.config, self.workers, self.pin_memory = plan, plan.config, workers, pin_memory
        self.epoch = 0
        self.batches = 0
        self.streams: dict[str, Any] = {}
        self.report = DataReport()
        self.report.merge(plan.problems)
        self.warned: set[str] = set()

    @property
    def steps_per_epoch(self) -> int | None:
        return self.plan.steps

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of `epoch`; where it is the current one, stay in the middle of it."""
        if epoch != self.epoch:
            self.epoch, self.batches, self.streams = epoch, 0, {}

    def state_dict(self) -> dict[str, Any]:
        """Numbers, strings, lists and dicts only; each process has its own. See docs/data.md for when it is exact."""
        return {
            "version": VERSION,
            "epoch": self.epoch,
            "batches": self.batches,
            "pairs": self.plan.batch * self.plan.world,
            "streams": copy.deepcopy(self.streams),
            "report": self.report.to_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.get("version") != VERSION:
            raise ValueError(f"the data state has version {state.get('version')}, expected {VERSION}")
        # Another batch or number of processes: as many samples into the epoch.
        pairs = self.plan.batch * self.plan.world
        self.epoch, self.batches = state["epoch"], state["batches"] * state["pairs"] // pairs
        self.streams = copy.deepcopy(state["streams"])
        self.report = DataReport.from_dict(state["report"])

    def __iter__(self) -> Iterator[Batch]:
        taken: list[Fetched] = []
        joined = Joined(self.plan.batch, self.pin_memory)
        for fetched in self._fetched():
            if fetched.piece is not None:
                joined.add(fetched.piece)
            taken.append(replace(fetched, piece=None))
            if sum(part.counts for part in taken) == self.plan.pieces:
                batch = joined.batch()
                self.batches += 1
                self._count(taken, batch)
                if batch is not None:
                    yield self._given(batch)
                taken, joined = [], Joined(self.plan.batch, self.pin_memory)
        # What does not fill a batch.
        batch = joined.batch() if self.config.last == "keep" else None
        self._count(taken, batch)
        if batch is not None:
            self.batches += 1
            yield self._given(batch)
        self.report.check(self.config.max_skipped, final=True)
        if not self.batches:
            raise UserError(f"the data does not fill one batch: {self.report.summary()}")
        self.epoch, self.batches, self.streams = self.epoch + 1, 0, {}

    def _fetched(self) -> Iterator[Fetched]:
        """The pieces of the epoch that are left, in order. UserError for what went wrong in a worker."""
        dataset, numbers = self.plan.resume(self.epoch, self.batches, self.streams)
        fetching = DataLoader(
            dataset,
            batch_size=None,
            sampler=numbers,
            num_workers=self.workers,
            collate_fn=_same,
            worker_init_fn=start_worker,
            # Its own: it draws a number from torch's global generator otherwise.
            generator=generator_for("workers", self.plan.seed, self.epoch),
        )
        try:
            for fetched in fetching:
                if fetched.failed is not None:
                    raise UserError(fetched.failed)
                yield fetched
        except RuntimeError as error:
            if not re.match(r"DataLoader worker \(pid.*(killed by signal|exited unexpectedly)", str(error)):
                raise
            raise UserError(
                "a process that reads data was killed, for want of memory perhaps: lower the number of workers or "
                f"--data.buffer ({str(error).splitlines()[0]})"
            ) from error

    def _given(self, batch: Batch) -> Batch:
        return batch if self.config.pair_ids else replace(batch, pair_ids=None)

    def _count(self, taken: list[Fetched], batch: Batch | None) -> None:
        """Report a batch and what was met on the way to it; UserError where that is too much."""
        for part in taken:
            self.report.merge(part.report)
            for kind in (*SKIPPED, *REFUSED):
                if kind in part.report.counts:
                    self._warn(kind, f"{kind}: {part.report.names[kind][0]} (left out; further ones are counted)")
            if part.stream is not None:
                cursors = self.streams.get("cursors", {}) | {str(part.stream): list(part.cursor)}
                self.streams = {"dealt": self.plan.dealt, "last": part.stream, "cursors": cursors}
        if batch is not None:
            duplicates = len(batch) - len(batch.pair_ids.unique())
            self.report.duplicates += duplicates
            if duplicates and not self.config.pair_ids:
                self._warn(
                    "duplicates",
                    f"{duplicates:,} captions occur more than once in a batch and count as negatives of each other; "
                    "--data.pair-ids hands them to the loss as ids (further ones are counted)",
                )
        self.report.check(self.config.max_skipped)

    def _warn(self, what: str, message: str) -> None:
        if what not in self.warned:
            self.warned.add(what)
            warnings.warn(message, stacklevel=4)


def _same(fetched: Fetched) -> Fetched:
    return fetched


def start_worker(number: int) -> None:
    # Each worker is one process of several: no threads of its own.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # A forked copy of fsspec's event loop has no thread behind it.
    if "fsspec.asyn" in sys.modules:
        sys.modules["fsspec.asyn"].reset_lock()
