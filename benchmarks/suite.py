"""One run from its settings to its files: measure, print, keep, draw, compare."""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from pathlib import Path

import torch

from fastclip.benchmarks import external, guard, machine, noise, report
from fastclip.benchmarks.case import Problem
from fastclip.benchmarks.cases import CASES
from fastclip.benchmarks.config import Config
from fastclip.benchmarks.progress import Progress
from fastclip.benchmarks.results import Results, Row, load, new_path
from fastclip.benchmarks.run import Runner

# In a checkout its own folder; in an installed copy, which has none, the folder one is in.
FOLDER = Path(__file__).parent / "results" if (Path(__file__).parent / "results").is_dir() else Path.cwd()


def run(config: Config) -> int:
    """Returns the exit code: 1 where --against found fastclip slower. Raises ValueError for settings that cannot be."""
    config.check()
    # Huge pages for large tensors, as in the trainer (Linux; torch reads this at its first allocation).
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    known = {name for case in CASES.values() for name in case.peers}
    if set(config.peers) - known:
        raise ValueError(f"--peers takes {', '.join(sorted(known))}; got {' '.join(config.peers)}")
    old = load(config.against) if config.against else None
    if config.device == "gpu" or (config.device == "auto" and torch.cuda.is_available()):
        from fastclip.benchmarks import gpu_suite

        results, path = gpu_suite.run(config, FOLDER)
        runner = None
    else:
        results, path, runner = _measure(config.resolved())
    print(f"\nResults: {path}")
    if config.plots:
        _show(results, path)
    return _guard(results, path, old, config.threshold, runner) if old else 0


def _measure(config: Config) -> tuple[Results, Path, Runner]:
    """The CPU's cases, and what the others measure; kept after every process."""
    torch.set_num_threads(config.threads)
    here = machine.describe(config.threads)
    earlier = load(config.add) if config.add else None
    path = config.add or config.out or new_path(FOLDER, machine.file_stem(here))
    results, progress, quiet = Results("cpu", here), Progress(), noise.Noise()
    runner = Runner(config, results, progress.tell, earlier)
    others = external.wanted(config)
    print(machine.headline(here), *_missing(config), "", sep="\n")
    progress.ready(runner.steps() + len(others))
    start = time.perf_counter()

    def finished(rows: list[Row]) -> None:
        progress.print(report.problem_table(rows))

    def kept() -> None:
        if earlier is None:
            results.save(path)

    try:
        runner.run(finished, kept)
        for name in others:
            progress.tell(external.MODULES[name])
            results.extra[name] = external.measure(name, config)
    except KeyboardInterrupt:
        progress.print("Interrupted; what was measured until now is kept.")
    finally:
        progress.close()
    settings = {key: value for key, value in asdict(config).items() if key not in ("out", "add", "against", "plots")}
    took = {"took_s": round(time.perf_counter() - start, 1), **quiet.measured()}
    results.add_part({"date": here["date"], "commit": here["commit"], "settings": settings, **took})
    if earlier is not None:
        earlier.merge(results)
        results = runner.results = earlier
    results.save(path)
    print(report.summary(results))
    return results, path, runner


def _missing(config: Config) -> list[str]:
    """What cannot be measured here, with the line that installs it."""
    told = {
        f"Not measured, {case.name}: {peer.label}: {reason}"
        for case in CASES.values()
        if config.wants(case.name)
        for peer in case.peers.values()
        if (reason := peer.why_not())
    }
    return sorted(told)


def _show(results: Results, path: Path) -> None:
    try:
        from fastclip.benchmarks import page, pictures
    except ModuleNotFoundError as error:
        print(f"No plots and no page: {error.name} is not installed; pip install matplotlib")
        return
    for picture in pictures.save(results, path):
        print(f"Plot: {picture}")
    print(f"Page: {page.save(results, path)}")


def _guard(results: Results, path: Path, old: Results, threshold: float, runner: Runner | None) -> int:
    """Compares; what seems slower is measured once more before it counts."""
    changes = guard.compare(old, results)
    if not changes:
        print("Nothing was measured here that the other file has as well: nothing to compare.")
        return 1
    slower = [change.row for change in changes if change.slowdown > threshold]
    if slower and runner is not None:
        print(f"{len(slower)} seem slower; measuring these again.")
        again = dict.fromkeys(Problem(row.case, row.n, row.d, row.dtype, row.mode) for row in slower)
        runner.again(list(again))
        results.save(path)
        changes = guard.compare(old, results)
    print(guard.told(changes, threshold, old, results))
    return int(any(change.failed(threshold) for change in changes))
