"""`python -m benchmarks`: run the suite, print the tables, write the results file and the plots."""

import sys
import time
from dataclasses import asdict
from pathlib import Path

import tyro

from benchmarks import machine, report
from benchmarks.config import Config
from benchmarks.progress import Progress
from benchmarks.results import Results, Row, new_path
from benchmarks.run import Runner

FOLDER = Path(__file__).parent / "results"


def main(config: Config) -> None:
    config = config.resolved()
    here = machine.describe(config.threads)
    settings = {key: value for key, value in asdict(config).items() if key not in ("out", "plots")}
    results = Results("cpu", here, settings)
    path = config.out or new_path(FOLDER, machine.file_stem(here))
    print(machine.headline(here), *filter(None, [machine.noise_warning(here)]), "", sep="\n")

    progress = Progress()

    def finished(rows: list[Row]) -> None:
        results.save(path)
        progress.print(report.group_table(rows))

    start = time.perf_counter()
    try:
        runner = Runner(config, results, progress.tell)
        progress.ready(runner.steps())
        runner.run(finished)
    except KeyboardInterrupt:
        progress.print("Interrupted; what was measured until now is kept.")
    finally:
        progress.close()
    results.took_s = round(time.perf_counter() - start, 1)
    results.save(path)
    print(report.summary(results))
    print(f"\nResults: {path} ({results.took_s:.0f} s)")
    if config.plots:
        _plot(results, path)


def _plot(results: Results, path: Path) -> None:
    try:
        from benchmarks import plots
    except ModuleNotFoundError as error:
        print(f"No plots: {error.name} is not installed; pip install matplotlib")
        return
    for picture in plots.save(results, path):
        print(f"Plot: {picture}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, prog="python -m benchmarks"))
    except (ValueError, OSError) as error:
        sys.exit(f"benchmarks: {error}")
