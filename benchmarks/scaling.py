"""How far `fastclip plan` is from measured training steps on this processor: memory and time of a small CLIP.

    python -m fastclip.benchmarks.scaling --threads 2 --out benchmarks/results/scaling.json

Rates are measured once, on a micro-batch and on a loss of 4,096 pairs; the steps are others. Memory is above that of
the process before it made the model; each step has a process of its own.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import torch
import tyro

from fastclip import clip_loss
from fastclip.benchmarks import machine, noise
from fastclip.benchmarks.children import return_freed_blocks, run_in_child
from fastclip.benchmarks.grad_caching import model_and_batch
from fastclip.benchmarks.memory import watch
from fastclip.benchmarks.progress import Progress
from fastclip.benchmarks.results import Results
from fastclip.benchmarks.tables import extra
from fastclip.grad_cache import GradCache
from fastclip.plan.measure import measure as measure_rates
from fastclip.plan.memory import memory
from fastclip.plan.rates import times
from fastclip.plan.setting import Setting
from fastclip.plan.work import work

MIB = 2**20
STEPS = 3  # of which the first warms up
# (pairs, micro-batch, recomputed)
QUICK = ((512, None, False), (1024, 128, False))
FULL = (
    (512, None, False),
    (2048, None, False),
    (2048, None, True),
    (2048, 128, False),
    (8192, 128, False),
    (8192, 512, False),
    (8192, 512, True),
    (16384, 128, False),
)


@dataclass(frozen=True)
class Scaling:
    """Compare `fastclip plan` with measured steps of a small CLIP on this machine's processor."""

    quick: bool = False
    """Two small steps only."""
    threads: int | None = None
    """Threads of torch and of the kernels; torch's own choice if not given."""
    out: Path | None = None
    """Results file to write, with the machine's name and the rates, for `fastclip plan --rates`."""


def measure(quick: bool) -> list[dict]:
    """One line a step: memory and time as planned and as measured, and how many times as much was planned."""
    return compare(quick)[0]


def compare(quick: bool) -> tuple[list[dict], list[dict]]:
    """The steps' lines, and the rates as one line."""
    threads, progress, lines = torch.get_num_threads(), Progress(), []
    config = model_and_batch(1)[0].config
    base = Setting(config, 4096, dtype="fp32", micro_batch=128, on_cpu=True)
    rates = measure_rates(base)
    steps = QUICK if quick else FULL
    progress.ready(len(steps))
    for batch, micro_batch, recompute in steps:
        progress.tell(f"{batch:,} pairs, micro-batch {micro_batch}")
        setting = replace(base, batch=batch, micro_batch=micro_batch, recompute=recompute)
        planned_mib, planned_s = memory(setting).peak / MIB, times(work(setting), rates).step
        mib, seconds = run_in_child(run, setting, threads=threads)
        line = {"N": batch, "micro-batch": micro_batch or "all", "recomputed": "yes" if recompute else "no"}
        line |= {"planned MiB": round(planned_mib), "measured MiB": round(mib), "MiB, ratio": planned_mib / mib}
        line |= {"planned s": planned_s, "measured s": seconds, "s, ratio": planned_s / seconds}
        lines.append(line)
    progress.close()
    return lines, [{"dtype": "fp32", **asdict(rates)}]


def run(setting: Setting) -> tuple[float, float]:
    """(peak MiB, median seconds) of training steps; for a process of its own."""
    return_freed_blocks()
    warm_up, *inputs = model_and_batch(8)  # libraries, threads, their buffers
    clip_loss(*warm_up(*inputs)).backward()
    del warm_up, inputs
    before, peak, _ = watch()
    model, images, tokens = model_and_batch(setting.batch)
    model.set_grad_checkpointing(setting.recompute)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    encode = model
    if setting.micro_batch is not None:
        cached = GradCache([model.encode_image, model.encode_text], setting.micro_batch)
        encode = lambda *batch: (*cached(*batch), model.logit_scale)  # noqa: E731 - as model(images, tokens)
    taken = []
    for _ in range(STEPS):
        start = time.perf_counter()
        optimizer.zero_grad()
        clip_loss(*encode(images, tokens)).backward()
        optimizer.step()
        taken.append(time.perf_counter() - start)
    return peak() - before, median(taken[1:])


def main(config: Scaling) -> None:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    here, quiet = machine.describe(torch.get_num_threads()), noise.Noise()
    print(machine.headline(here))
    lines, rates = compare(config.quick)
    part = {"date": here["date"], "commit": here["commit"], **quiet.measured()}
    for cells in extra(lines):
        print("  ".join(f"{cell:>13}" for cell in cells))
    if config.out is not None:
        Results("cpu", here, extra={"scaling": lines, "rates": rates}, parts=[part]).save(config.out)
        print(f"Results: {config.out}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Scaling, prog="python -m fastclip.benchmarks.scaling"))
    except (ValueError, OSError) as error:
        sys.exit(f"scaling: {error}")
