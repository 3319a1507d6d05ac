"""Several results files of one machine as one; of what is in two of them, the later file's counts.

python -m benchmarks.merge ALL.json PART.json PART.json ...
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from fastclip.benchmarks.results import load


@dataclass(frozen=True)
class MergeConfig:
    """Merge results files of one machine."""

    out: tyro.conf.Positional[Path]
    """The file to write; it must not exist."""
    parts: tyro.conf.Positional[tuple[Path, ...]]
    """Files that `fastclip bench` wrote."""


def main(config: MergeConfig) -> None:
    if config.out.exists():
        raise ValueError(f"{config.out} exists")
    merged, *others = (load(part) for part in config.parts)
    for other in others:
        merged.merge(other)
    merged.save(config.out)
    print(f"{config.out}: {len(merged.rows)} rows from {len(config.parts)} files")


if __name__ == "__main__":
    try:
        main(tyro.cli(MergeConfig))
    except (ValueError, OSError) as error:
        sys.exit(f"benchmarks.merge: {error}")
