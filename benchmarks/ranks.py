"""What two processes that train together lose against two that train apart: samples/s of `fastclip train`.

    python -m fastclip.benchmarks.ranks --out results/ranks.json

Together: torchrun with two processes of one thread, the loss over the pairs of both, gradients averaged by DDP (gloo).
Apart: two processes of one thread at the same time, each with half the pairs and its own loss. The glyphs, the demo's
small model. The two ways take turns.

A run has two figures, over its steps but the first ones and those that also compute accuracy: the median of the steps'
rates, and the mean, samples over seconds. Together a step is slow where either process is: what slows a third of each
one's steps at random (page faults, mostly) is in one median and not in the other.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean, median

from fastclip.benchmarks.machine import describe, headline
from fastclip.evaluate.files import save_json

TOGETHER = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
WARM_UP = 3  # steps
FIGURES = ("median", "mean")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = [512, 1024, 2048]
    parser.add_argument("--pairs", type=int, nargs="+", default=sizes, help=f"a step of each process (default {sizes})")
    parser.add_argument("--steps", type=int, default=15, help="steps of each run (default 15)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each way (default 3)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    given = parser.parse_args()
    rows = [compared(pairs, given.steps, given.rounds) for pairs in given.pairs]
    machine = describe(threads=1)
    print(headline(machine))
    for row in rows:
        ratios = ", ".join(f"{row[figure]['ratio']:.3f} ({figure})" for figure in FIGURES)
        print(f"{row['pairs_per_process']} pairs each: together / apart {ratios}, median of {given.rounds} rounds")
    if given.out is not None:
        settings = {"steps": given.steps, "warm_up": WARM_UP, "rounds": given.rounds, "unit": "samples/s"}
        save_json(given.out, {"machine": machine, "settings": settings, "rows": rows})


def compared(pairs: int, steps: int, rounds: int) -> dict:
    """samples/s of each round and their ratio, by figure."""
    row = {"pairs_per_process": pairs} | {figure: {"apart": [], "together": []} for figure in FIGURES}
    for turn in range(rounds):
        ways = {"apart": speeds([[], []], pairs, steps), "together": speeds([TOGETHER], 2 * pairs, steps)}
        for figure in FIGURES:
            for way, runs in ways.items():
                row[figure][way].append(sum(run[figure] for run in runs))
        now = ", ".join(f"{way} {row['mean'][way][-1]:,.0f}" for way in ways)
        print(f"{pairs} pairs, round {turn + 1}: {now} samples/s (mean)", flush=True)
    for figure in FIGURES:
        both = zip(row[figure]["apart"], row[figure]["together"], strict=True)
        row[figure]["ratio"] = median(together / apart for apart, together in both)
    return row


def speeds(launchers: list, batch: int, steps: int) -> list[dict[str, float]]:
    """The figures of each run of `fastclip train`, all started at once."""
    with tempfile.TemporaryDirectory() as folder:
        runs = [Path(folder, str(i)) for i in range(len(launchers))]
        started = [start(launcher, out, batch, steps) for launcher, out in zip(launchers, runs, strict=True)]
        errors = [process.communicate()[1] for process in started]
        for process, error in zip(started, errors, strict=True):
            if process.returncode:
                raise SystemExit(f"fastclip train failed:\n{error[-2000:]}")
        return [speed(out) for out in runs]


def start(launcher: list, out: Path, batch: int, steps: int) -> subprocess.Popen:
    # Nothing but steps: the one evaluation and the one checkpoint come after the last.
    options = f"""--batch {batch} --schedule.steps {steps} --threads 1 --device cpu --log.every 1 --log.no-tensorboard
        --evaluation.every 0 --evaluation.samples 16 --checkpoint.every 0"""
    command = [sys.executable, *launcher, "-m", "fastclip", "train", "--out", str(out), *shlex.split(options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def speed(out: Path) -> dict[str, float]:
    """samples/s of a run's steps: their median, and their mean over time."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rates = [r["samples_per_second"] for r in records if "loss" in r and "accuracy" not in r and r["step"] > WARM_UP]
    # Each has as many samples.
    return {"median": median(rates), "mean": 1 / fmean(1 / rate for rate in rates)}


if __name__ == "__main__":
    main()
