"""A training run, from its configuration to its folder."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from fastclip.clip.model import Clip
from fastclip.clip.tokenizer import Tokenizer
from fastclip.data.cache import write_atomic
from fastclip.data.loader import Loader
from fastclip.data.report import merged_over_ranks
from fastclip.errors import UserError
from fastclip.train import checkpoint, parts, settings
from fastclip.train.config import TrainConfig
from fastclip.train.curves import draw_curves
from fastclip.train.evaluate_hook import make_evaluation
from fastclip.train.files import describe_model, save_model_folder
from fastclip.train.flops import training_flops
from fastclip.train.log import METRICS, RunLog, warnings_said
from fastclip.train.loop import fit
from fastclip.train.memory import out_of_memory_explained
from fastclip.train.optimizer import Average, make_optimizer
from fastclip.train.parallel import World, full_tensor, processes, restarted
from fastclip.train.progress import Progress
from fastclip.train.schedule import make_schedule
from fastclip.train.state import TrainState, seed_everything
from fastclip.train.step import TrainStep
from fastclip.train.towers import make_encode, prepare

CONFIG, CURVES, AVERAGE = "config.toml", "curves.png", "ema"


def train(config: TrainConfig) -> int:
    """Run `config`. Returns 0, or the number of the signal that stopped it after writing a checkpoint.

    UserError for what the user can put right: settings, data, checkpoints, folders, memory.
    """
    config.check()
    with processes(config.device) as world:
        set_up(config, world)
        begin_from = world.decided(lambda: claim_run(config))

        seed_everything(config.seed, 0)  # the same weights in every process
        model, tokenizer = parts.make_model(config, begin_from)
        batches = parts.training_batches(config, model, tokenizer, world)
        flops = training_flops(model, config) if config.log.peak_tflops is not None else None
        state = make_state(model, config, world)
        evaluate = make_evaluation(state, tokenizer, config, world)
        schedule = make_schedule(config.schedule, config.batch, batches.steps_per_epoch)
        seed_everything(config.seed, world.rank)  # other dropout in each

        run = Run(config, world, state, batches, tokenizer)
        if begin_from is not None:
            run.resume(begin_from)
        weights = sum(weight.numel() for weight in model.parameters())
        world.say(f"Training {weights:,} weights, {schedule.steps - state.step} steps of {config.batch:,} pairs.")
        with (
            Progress(schedule.steps, state.step, shown=world.first) as progress,
            RunLog(config, world, progress, config.out, flops) as log,
            out_of_memory_explained(config, config.batch // world.size),
            warnings_said(progress.say),
        ):
            step = TrainStep(state, make_encode(model, config, world), schedule, config, world)
            stopped = fit(step, batches, config, log, evaluate=evaluate, save=run.save)
        found = merged_over_ranks(batches.report)
        if found.counts:
            world.say(f"Data: {found.summary()}.")
        if found.duplicates:
            world.say(f"Captions that came more than once in a batch: {found.duplicates:,}.")
        if stopped:
            world.say(f"Stopped by a signal after step {state.step}; --resume latest goes on from there.")
        else:
            run.finish(log)
        return stopped


def set_up(config: TrainConfig, world: World) -> None:
    """Threads and number formats. UserError for a batch that the processes cannot share."""
    if config.batch % world.size:
        raise UserError(f"--batch {config.batch} cannot be shared evenly by {world.size} processes")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if world.device.type == "cuda" and config.precision.tf32:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        torch.backends.cudnn.conv.fp32_precision = "tf32"


def claim_run(config: TrainConfig) -> Path | None:
    """The checkpoint to go on from, None to begin; makes the folder. UserError if it holds a run that would be lost."""
    claim(config.out)
    if config.resume == "latest" or restarted():
        found = checkpoint.newest(config.out, say)
        if found is not None:
            return checkpoint.only_up_to(config.out, found)
        if config.resume in (None, "latest"):
            say(f"No checkpoint in {config.out} yet: beginning.")
            return None
    named = None if config.resume is None else Path(config.resume)
    if named is not None:
        checkpoint.verify(named)
        if named.resolve().parent == (config.out / checkpoint.FOLDER).resolve():
            return checkpoint.only_up_to(config.out, named)
    if (config.out / METRICS).exists():
        raise UserError(f"{config.out} holds a run: --resume latest goes on with it, another --out begins a new one")
    return named


def make_state(model: Clip, config: TrainConfig, world: World) -> TrainState:
    """The model where and how it is trained, with its optimiser."""
    prepare(model, config, world)
    return TrainState(
        model,
        make_optimizer(model, config.optimizer),
        torch.amp.GradScaler(world.device.type, enabled=config.precision.dtype == "fp16"),
        None if config.optimizer.ema is None else Average(model, config.optimizer.ema),
    )


class Run:
    """What reads and writes the run's folder."""

    def __init__(
        self, config: TrainConfig, world: World, state: TrainState, batches: Loader, tokenizer: Tokenizer
    ) -> None:
        self.config, self.world, self.state, self.batches, self.tokenizer = config, world, state, batches, tokenizer
        self.settings = settings.to_dict(config)
        self.settings.pop("config", None)  # the command's: the file that some of the settings came from
        if world.first:
            text = settings.to_toml(self.settings)
            write_atomic(config.out / CONFIG, lambda file: file.write(text.encode()))

    def resume(self, folder: Path) -> None:
        """Go on from `folder`; say what is not as it was."""
        inexact = checkpoint.read(folder, self.state, self.batches, self.world)
        self.world.say(f"Resumed from {folder}, after step {self.state.step}.")
        if inexact:
            self.world.say(f"The run goes on, but not bit for bit: {'; '.join(inexact)}.")
        before = checkpoint.stored_settings(folder)
        changed = [
            text for text in settings.differences(before, self.settings) if not text.startswith(("out ", "resume "))
        ]
        if changed:
            self.world.say(f"Settings that have changed: {'; '.join(changed)}.")

    def save(self) -> None:
        """A checkpoint of now."""
        keep = self.config.checkpoint.keep
        checkpoint.write(self.config.out, self.state, self.batches, self.world, self.settings, self.describe, keep)

    def describe(self, folder: Path) -> None:
        """What makes the folder of weights a model folder."""
        describe_model(folder, self.state.model.config, self.tokenizer)

    def finish(self, log: RunLog) -> None:
        """The trained model, its averaged weights and the curves."""
        out, model = self.config.out, self.state.model
        weights = {name: full_tensor(tensor) for name, tensor in model.state_dict().items()}
        averages = self.state.average.weights if self.state.average else {}
        averaged = {name: full_tensor(tensor) for name, tensor in averages.items()}
        if self.world.first:
            save_model_folder(out, model.config, self.tokenizer, weights)
            if averaged:
                save_model_folder(out / AVERAGE, model.config, self.tokenizer, weights | averaged)
            name = self.config.model.name or self.config.model.start_from or "glyph-conv"
            chance = None if self.config.loss == "clip" else math.nan
            title = f"{name}: {self.state.step:,} steps"
            draw_curves(log.records, self.config.batch, out / CURVES, title, chance=chance)
        self.world.say(f"Written to {out}: the model, checkpoints, {CONFIG}, {METRICS} and {CURVES}.")


def claim(folder: Path) -> None:
    """Make `folder` and prove that it can be written, before minutes are spent."""
    probe = folder / ".fastclip-probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror}") from error


def say(text: str) -> None:
    print(text, flush=True)
