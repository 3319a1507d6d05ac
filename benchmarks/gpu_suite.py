"""`fastclip bench` on a GPU: the benchmarks of `make gpu`, without its tests, in the suite's form."""

from __future__ import annotations

from pathlib import Path

import torch

from fastclip.benchmarks import gpu
from fastclip.benchmarks.config import Config
from fastclip.benchmarks.results import Results, load, new_path

QUICK = {"--minutes": (3,), "--widths": (512,), "--sizes": (4096, 16384, 65536)}


def run(config: Config, folder: Path) -> tuple[Results, Path]:
    """Raises ValueError where there is no GPU, or the kernels cannot run on it."""
    if config.add:
        raise ValueError("--add is for the CPU's suite")
    if not torch.cuda.is_available():
        raise ValueError("no CUDA device here; --device cpu measures the processor")
    path = config.out or new_path(folder, gpu.file_stem())
    arguments = ["--out", str(path), "--only", "losses"]
    if not config.quick:
        arguments.append("training")
    chosen = QUICK if config.quick else {}
    given = {"--sizes": config.sizes, "--dtypes": config.dtypes, "--widths": (config.d, *(config.widths or ()))}
    chosen |= {flag: values for flag, values in given.items() if values and values != (512,)}
    for flag, values in chosen.items():
        arguments += [flag, *map(str, values)]
    if config.quick:
        arguments.append("--no-largest")
    if gpu.main(arguments) or not path.exists():
        raise ValueError("the kernels cannot run on this GPU; --device cpu measures the processor")
    return load(path), path
