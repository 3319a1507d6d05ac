"""fastclip train."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastclip.train.config import TrainConfig


@dataclass(frozen=True)
class Train(TrainConfig):
    """Train a CLIP model, on one device or, under torchrun, on many. docs/training.md has examples.

    Exits with 0 when the run is done; with 130 after SIGINT and 143 after SIGTERM, when a checkpoint has been written.
    """

    config: Path | None = None
    """TOML file of these settings, such as a run's config.toml; the command line has the last word."""

    @classmethod
    def defaults(cls, arguments: Sequence[str]) -> Train:
        """The settings before the command line's: those of the file that it names. UserError for a bad file."""
        from fastclip.train.settings import read_settings

        for i, option in enumerate(arguments):
            name, joined, value = option.partition("=")
            if name == "--config" and (joined or arguments[i + 1 :]):
                return read_settings(Path(value if joined else arguments[i + 1]), cls)
        return cls()

    def run(self) -> None:
        from fastclip.train.trainer import train

        stopped = train(self)
        if stopped:
            sys.exit(128 + stopped)
