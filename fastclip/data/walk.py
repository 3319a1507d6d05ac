"""Every sample of a source once, looked at in worker processes: for packing and for the report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from fastclip.data.config import DataConfig
from fastclip.data.loader import start_worker
from fastclip.data.report import DataReport
from fastclip.data.rows import Source
from fastclip.data.sample import BadSample, Sample
from fastclip.data.shard_files import expand, read_counts
from fastclip.data.sources import kind_of, open_rows
from fastclip.data.tar import read_shard

Work = Callable[[Sample], Any]


@dataclass
class Seen:
    """What the work made of a sample, None for one that cannot be used; what was noted."""

    result: Any = None
    notes: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Walk:
    """Iterate over it for Seen after Seen. `total`: how many samples there are, None where only reading would tell."""

    dataset: Dataset
    total: int | None
    problems: DataReport
    workers: int

    def __iter__(self) -> Iterator[Seen]:
        yield from DataLoader(
            self.dataset, batch_size=None, num_workers=self.workers, collate_fn=_same, worker_init_fn=start_worker
        )


def walk(config: DataConfig, work: Work, workers: int = 0, rows: Callable[[int], Sequence[int]] = range) -> Walk:
    """`work(sample)` for every sample; it may raise BadSample. UserError for a source that cannot be opened.

    rows(size) gives the order of a source that can be read in any; shards are read as they come, or dealt to workers.
    """
    if kind_of(config) == "shards":
        urls = expand(config.sources)
        counts = read_counts(urls)
        total = sum(counts.values()) if len(counts) == len(set(urls)) else None
        return Walk(_Shards(urls, config.captions, work), total, DataReport(), workers)
    source = open_rows(config)
    chosen = rows(len(source))
    return Walk(_Rows(source, chosen, work), len(chosen), source.problems, workers)


@dataclass(frozen=True, eq=False)
class _Rows(Dataset):
    source: Source
    rows: Sequence[int]
    work: Work

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Seen:
        try:
            return Seen(self.work(self.source[int(self.rows[index])]))
        except BadSample as bad:
            return Seen(notes=[(bad.kind, str(bad))])


@dataclass(frozen=True, eq=False)
class _Shards(IterableDataset):
    urls: Sequence[str]
    fields: Sequence[str]
    work: Work

    def __iter__(self) -> Iterator[Seen]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        for url in self.urls[first::step]:
            notes: list[tuple[str, str]] = []
            for sample in read_shard(url, self.fields, partial(_note, notes)):
                try:
                    result = self.work(sample)
                except BadSample as bad:
                    result = None
                    notes.append((bad.kind, str(bad)))
                yield Seen(result, list(notes))
                notes.clear()
            if notes:
                yield Seen(notes=notes)


def _note(notes: list[tuple[str, str]], kind: str, name: str) -> None:
    notes.append((kind, name))


def _same(seen: Seen) -> Seen:
    return seen
