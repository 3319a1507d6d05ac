"""How far `fastclip plan` is from measured training steps on this processor: memory and time of a small CLIP.

    python -m fastclip.benchmarks.scaling --threads 2 --out benchmarks/results/scaling.json

Rates are medians of short runs on a micro-batch and on a loss of 4,096 pairs, one run before each step; the steps are
others. Each run has a process of its own. Memory is above that of the process before it made the model, with every
freed block given back at once. Time is that of another process, which keeps freed blocks for the next tensors as any
training does: one that gives them back maps every tensor anew, which takes longer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import torch
import tyro

from fastclip import clip_loss
from fastclip.benchmarks import machine, noise
from fastclip.benchmarks.children import return_freed_blocks, run_in_child
from fastclip.benchmarks.grad_caching import model_and_batch
from fastclip.benchmarks.measure import seconds
from fastclip.benchmarks.memory import watch
from fastclip.benchmarks.progress import Progress
from fastclip.benchmarks.results import Results
from fastclip.benchmarks.tables import extra
from fastclip.grad_cache import GradCache
from fastclip.plan.measure import measure as measure_rates
from fastclip.plan.memory import memory
from fastclip.plan.rates import Rates, times
from fastclip.plan.setting import Setting
from fastclip.plan.work import work

MIB = 2**20
STEPS = 3  # that are timed, of which the first warms up
WARM_UP = 8  # pairs
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
    threads, progress = torch.get_num_threads(), Progress()
    base = Setting(model_and_batch(1)[0].config, 4096, dtype="fp32", micro_batch=128, on_cpu=True)
    settings = [replace(base, batch=n, micro_batch=m, recompute=r) for n, m, r in (QUICK if quick else FULL)]
    probes, found = [], []
    progress.ready(len(settings))
    for setting in settings:
        progress.tell(f"{setting.batch:,} pairs, micro-batch {setting.micro_batch}")
        probes.append(run_in_child(measure_rates, base, threads=threads))
        found.append([run_in_child(run, setting, threads=threads) for run in (peak_mib, step_s)])
    progress.close()
    medians = {name: median(getattr(probe, name) for probe in probes) for name in ("towers", "forward", "loss")}
    rates = replace(probes[0], **medians)
    return [_line(*each, rates) for each in zip(settings, found, strict=True)], [{"dtype": "fp32", **asdict(rates)}]


def _line(setting: Setting, found: list[float], rates: Rates) -> dict:
    line = {"N": setting.batch, "micro-batch": setting.micro_batch or "all"}
    line["recomputed"] = "yes" if setting.recompute else "no"
    planned_mib, planned_s = memory(setting).peak / MIB, times(work(setting), rates).step
    mib, took_s = found
    line |= {"planned MiB": round(planned_mib), "measured MiB": round(mib), "MiB, ratio": planned_mib / mib}
    return line | {"planned s": planned_s, "measured s": took_s, "s, ratio": planned_s / took_s}


def training(setting: Setting) -> Callable[..., None]:
    """step(pairs): a training step of the first so many pairs, of the whole batch if not given."""
    model, images, tokens = model_and_batch(setting.batch)
    model.set_grad_checkpointing(setting.recompute)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    encode = model
    if setting.micro_batch is not None:
        cached = GradCache([model.encode_image, model.encode_text], setting.micro_batch)
        encode = lambda *batch: (*cached(*batch), model.logit_scale)  # noqa: E731 - as model(images, tokens)

    def step(pairs: int = setting.batch) -> None:
        optimizer.zero_grad()
        clip_loss(*encode(images[:pairs], tokens[:pairs])).backward()
        optimizer.step()

    return step


def peak_mib(setting: Setting) -> float:
    """Peak MiB of a training step; for a process of its own."""
    return_freed_blocks()
    training(replace(setting, batch=WARM_UP))()  # libraries, threads, their buffers
    before, peak, _ = watch()
    step = training(setting)
    step(WARM_UP)  # makes AdamW's moments
    step()
    return peak() - before


def step_s(setting: Setting) -> float:
    """Median seconds of training steps after one that warms up; for a process of its own."""
    step = training(setting)
    return median([seconds(step)[0] for _ in range(STEPS)][1:])


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
