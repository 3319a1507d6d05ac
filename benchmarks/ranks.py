"""What two processes that train together lose against two that train apart: samples/s of `fastclip train`.

    python -m fastclip.benchmarks.ranks --out results/ranks.json

Together: torchrun with two processes of one thread, the loss over the pairs of both, gradients averaged by DDP (gloo).
Apart: two processes of one thread at the same time, each with half the pairs and its own loss. The glyphs, the demo's
small model. The two ways take turns; the figure of a run is the median over its steps but the first ones.
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
from statistics import median

from fastclip.benchmarks.machine import describe, headline
from fastclip.evaluate.files import save_json

TOGETHER = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
WARM_UP = 3  # steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=512, help="pairs a step of each process (default 512)")
    parser.add_argument("--steps", type=int, default=15, help="steps of each run (default 15)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each way (default 3)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    given = parser.parse_args()
    apart, together = [], []
    for turn in range(given.rounds):
        apart.append(sum(speeds([[], []], given.pairs, given.steps)))
        together += speeds([TOGETHER], 2 * given.pairs, given.steps)
        print(f"round {turn + 1}: apart {apart[-1]:,.0f}, together {together[-1]:,.0f} samples/s", flush=True)
    ratio = median(b / a for a, b in zip(apart, together, strict=True))
    machine = describe(threads=1)
    print(f"{headline(machine)}\ntogether / apart: {ratio:.3f} (median of {given.rounds} rounds)")
    if given.out is not None:
        settings = {"pairs_per_process": given.pairs, "steps": given.steps}
        figures = {"apart": apart, "together": together, "ratio": ratio}
        save_json(given.out, {"machine": machine, "settings": settings, "samples_per_second": figures})


def speeds(launchers: list, batch: int, steps: int) -> list[float]:
    """samples/s of each run of `fastclip train`, all started at once."""
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


def speed(out: Path) -> float:
    """The median over the steps after the warm-up."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return median(r["samples_per_second"] for r in records if "loss" in r and r["step"] > WARM_UP)


if __name__ == "__main__":
    main()
