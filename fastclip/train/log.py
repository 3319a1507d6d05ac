"""What a run says about itself: metrics.jsonl, TensorBoard, Weights & Biases and the console.

A record is a dict of plain numbers with `step` and `samples`; training records have `loss`, evaluations other names.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastclip.data.cache import write_atomic
from fastclip.errors import UserError
from fastclip.train.config import LogConfig, TrainConfig
from fastclip.train.memory import peak_mib
from fastclip.train.parallel import World
from fastclip.train.progress import Progress
from fastclip.train.state import TrainState
from fastclip.train.step import StepResult

METRICS = "metrics.jsonl"
# A line holds so much; metrics.jsonl has all.
NOT_PRINTED = ("@5", "@10", "pairs", "top-5", "mean_per_class")


class RunLog:
    """Collects, shows and writes the records; in processes other than the first it does nothing. A context manager.

    `records`: all so far, those of the resumed run included. `folder`: None writes no files. `step_flops`: of the
    model, forward and backward, for one step of all processes.
    """

    def __init__(
        self,
        config: TrainConfig,
        world: World,
        progress: Progress,
        folder: Path | None = None,
        step_flops: float | None = None,
    ) -> None:
        self.config, self.world, self.progress, self.step_flops = config, world, progress, step_flops
        self.records: list[dict[str, Any]] = []
        self.writers: list[Any] = []
        self.accuracy = 0.0
        if folder is not None and world.first:
            self.records = earlier(folder / METRICS, progress.begin)
            self.writers = open_writers(config.log, folder, progress.begin)
        self.restart_clock()

    def restart_clock(self) -> None:
        self.since, self.steps, self.waited = time.perf_counter(), 0, 0.0

    def step(self, state: TrainState, result: StepResult, waited: float, *, last: bool) -> None:
        """After each step; every so often a record. `waited`: seconds that the step waited for its batch."""
        if not self.world.first:
            return
        self.waited += waited
        self.steps += 1
        seconds = time.perf_counter() - self.since
        self.accuracy = self.accuracy if result.accuracy is None else result.accuracy
        self.progress(state.step, self.describe(result, seconds))
        if result.skipped:
            self.say(f"step {state.step}: skipped, loss {result.loss}, gradient norm {result.gradient_norm}")
        if result.clamped and state.clamped == 1:
            self.say(f"step {state.step}: the logit scale reached {result.scale:.1f} and is kept there")
        eventful = result.skipped or result.accuracy is not None
        if last or eventful or state.step % self.config.log.every == 0:
            self.write(self.record(state, result, seconds))
            self.restart_clock()

    def record(self, state: TrainState, result: StepResult, seconds: float) -> dict[str, Any]:
        record = {
            "step": state.step,
            "samples": state.samples,
            "loss": result.loss,
            "scale": result.scale,
            "learning_rate": result.learning_rate,
            "gradient_norm": result.gradient_norm,
            "samples_per_second": self.steps * self.config.batch / seconds,
            "data_wait": self.waited / seconds,
            "peak_mib": peak_mib(self.world.device),
            "skipped": state.skipped,
            "clamped": state.clamped,
        }
        if result.accuracy is not None:
            record["accuracy"] = result.accuracy
        if self.step_flops is not None:
            available = self.config.log.peak_tflops * 1e12 * self.world.size
            record["mfu"] = self.step_flops * self.steps / seconds / available
        return record

    def evaluation(self, state: TrainState, values: dict[str, float]) -> None:
        """Record `values`, and do not count the time that they took."""
        if self.world.first:
            short = {name: value for name, value in values.items() if not name.endswith(NOT_PRINTED)}
            self.say(f"step {state.step}: " + ", ".join(f"{name} {value:.4g}" for name, value in short.items()))
            self.write({"step": state.step, "samples": state.samples, **values})
        self.restart_clock()

    def write(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        for writer in self.writers:
            writer.write(record)

    def describe(self, result: StepResult, seconds: float) -> str:
        speed = self.steps * self.config.batch / seconds
        return f"loss {result.loss:.3f}, scale {result.scale:.1f}, accuracy {self.accuracy:.0%}, {speed:,.0f} samples/s"

    def say(self, text: str) -> None:
        if self.world.first:
            self.progress.say(text)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exception: object) -> None:
        for writer in self.writers:
            writer.close()


@contextmanager
def warnings_said(say: Callable[[str], None]) -> Iterator[None]:
    """Inside, Python's warnings (of the data, mostly) are lines like the others, without the code that gave them."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *where, **rest: say(f"warning: {message}")
        yield


class Lines:
    """metrics.jsonl: a record a line, there as soon as it is written."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, record: dict[str, Any]) -> None:
        # JSON has no NaN.
        finite = {name: value if math.isfinite(value) else None for name, value in record.items()}
        self.file.write(json.dumps(finite) + "\n")

    def close(self) -> None:
        self.file.close()


class TensorBoard:
    """Event files; records of a resumed run that lie after `begin` are hidden."""

    def __init__(self, folder: Path, begin: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(folder, purge_step=begin + 1 if begin else None)

    def write(self, record: dict[str, Any]) -> None:
        part = "train" if "loss" in record else "evaluation"
        for name, value in record.items():
            if name != "step":
                self.writer.add_scalar(f"{part}/{name}", value, record["step"])

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """Weights & Biases, with its own settings (WANDB_MODE=offline and so on)."""

    def __init__(self, project: str, folder: Path) -> None:
        import wandb

        self.run = wandb.init(project=project, dir=folder, name=folder.name, resume="allow")

    def write(self, record: dict[str, Any]) -> None:
        self.run.log(record, step=record["step"])

    def close(self) -> None:
        self.run.finish()


def open_writers(config: LogConfig, folder: Path, begin: int) -> list[Any]:
    """What `config` asks for. UserError for a package that is not installed."""
    try:
        writers: list[Any] = [Wandb(config.wandb, folder)] if config.wandb is not None else []
        if config.tensorboard:
            writers.append(TensorBoard(folder / "tensorboard", begin))
        return [Lines(folder / METRICS), *writers]
    except ModuleNotFoundError as error:
        raise UserError(f"the package {error.name} is not installed: install it, or --log.no-tensorboard") from error


def earlier(path: Path, begin: int) -> list[dict[str, Any]]:
    """The records up to step `begin` of the run that is resumed; later ones leave the file, and come anew."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    # A kill may have torn the last line.
    records = [json.loads(line) for line in lines if line.endswith("}\n")]
    kept = [record for record in records if record["step"] <= begin]
    write_atomic(path, lambda file: file.write("".join(json.dumps(record) + "\n" for record in kept).encode()))
    return kept
