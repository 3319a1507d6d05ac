"""fastclip data."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from fastclip.data.config import DataConfig
from fastclip.data.pack import PackConfig


@dataclass(frozen=True)
class Pack(PackConfig):
    """Write tar shards and their index from any source, leaving out what cannot be used."""

    source: tyro.conf.Positional[str] = tyro.MISSING
    """As --data.source of `fastclip train`."""
    out: tyro.conf.Positional[Path] = tyro.MISSING
    """Folder to write; it must be new or empty."""
    data: DataConfig = field(default_factory=DataConfig)

    def run(self) -> None:
        from fastclip.data.pack import pack

        index, report = pack(named(self.data, self.source), self.out, self)
        size = sum(shard["bytes"] for shard in index["shards"])
        print(f"{index['samples']:,} samples in {len(index['shards']):,} shards, {size / 1e6:,.1f} MB: {self.out}")
        if report.counts:
            print(f"Left out or mended: {report.summary()}")


@dataclass(frozen=True)
class Report:
    """Count, measure and show what is in a source, and name what is wrong with it."""

    source: tyro.conf.Positional[str]
    """As --data.source of `fastclip train`."""
    out: Path = Path("runs/data")
    """Folder that gets report.json and sheet.png."""
    samples: int | None = None
    """How many to look at, spread over the data; all if not given. Of tar shards the first ones."""
    workers: int = 0
    """Processes that read and decode; 0 does it in this one."""
    verify: bool = False
    """Compare tar shards with the checksums of their index.json, too."""
    data: DataConfig = field(default_factory=DataConfig)

    def run(self) -> None:
        from fastclip.data.survey import describe, survey, write_report

        data = named(self.data, self.source)
        figures = survey(data, self.workers, self.samples, self.verify)
        print(describe(self.source, figures))
        write_report(data, figures, self.out)
        print(f"Written: {self.out / 'report.json'}, {self.out / 'sheet.png'}")


@dataclass(frozen=True)
class Data:
    """Pack a data set into tar shards, or report what is in it."""

    action: Annotated[
        Annotated[Pack, tyro.conf.subcommand("pack")] | Annotated[Report, tyro.conf.subcommand("report")],
        tyro.conf.arg(name=""),
    ]

    def run(self) -> None:
        self.action.run()


def named(data: DataConfig, source: str) -> DataConfig:
    """UserError where --data.source names a source as well."""
    from fastclip.errors import UserError

    if data.source != DataConfig().source:
        raise UserError(f"name the source once: {source!r} or --data.source")
    return replace(data, source=source)
