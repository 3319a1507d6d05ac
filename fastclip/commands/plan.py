"""fastclip plan."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fastclip.errors import UserError


@dataclass(frozen=True)
class Plan:
    """Memory, FLOPs, messages and time of a training step, with and without gradient caching.

    Times come from measured rates only: --measure takes some here, --rates reads a file. See docs/scaling.md.
    """

    model: str = "ViT-B/32"
    """A model of `fastclip.clip.list_models()`, such as ViT-L/14."""
    batch: int = 32768
    """Pairs a step, over all GPUs."""
    gpus: int = 1
    """Processes, one GPU each."""
    dim: int | None = None
    """Width of the embeddings; the model's own if not given."""
    dtype: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Of the towers' products, through autocast."""
    micro_batch: int | None = None
    """Pairs encoded at a time with gradient caching; if not given the largest power of two that fits --gpu, or 256."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """As in `fastclip train`."""
    loss_mode: Literal["gather", "ring"] = "gather"
    """How text features reach the other GPUs (fastclip.distributed.Sharded)."""
    gpu: str | None = None
    """b200, h200, h100, a100, a100-40gb or l40s: whether it fits, and the time at the datasheet's peak."""
    rates: Path | None = None
    """Measured rates: a file of --save-rates, or of `fastclip bench` (the loss's rate)."""
    measure: bool = False
    """Measure the rates of towers and loss here, in a minute or so."""
    save_rates: Path | None = None
    """Where to keep what --measure found."""
    network: Annotated[float | None, tyro.conf.arg(metavar="GB/S")] = None
    """What one GPU sends, GB/s, for the time of messages."""

    def run(self) -> None:
        from fastclip.clip.zoo import model_config
        from fastclip.plan import rates as measured
        from fastclip.plan.gpus import GPUS
        from fastclip.plan.memory import largest_micro_batch
        from fastclip.plan.report import report
        from fastclip.plan.setting import Setting

        self.check()
        if self.gpu is not None and self.gpu not in GPUS:
            raise UserError(f"--gpu takes {', '.join(GPUS)}; got {self.gpu}")
        gpu = None if self.gpu is None else GPUS[self.gpu]
        try:
            model = model_config(self.model, **({} if self.dim is None else {"embed_dim": self.dim}))
        except ValueError as error:
            raise UserError(str(error)) from error
        setting = Setting(
            model,
            self.batch,
            self.gpus,
            self.dtype,
            self.micro_batch,
            parallel=self.parallel,
            loss_mode=self.loss_mode,
        )
        if self.micro_batch is None:
            setting = replace(setting, micro_batch=256 if gpu is None else largest_micro_batch(setting, gpu.memory))
        rates = measured.Rates()
        if self.rates is not None:
            rates = measured.read(self.rates, self.dtype)
        elif self.measure:
            from fastclip.plan.measure import measure

            rates = measure(setting)
            if self.save_rates is not None:
                measured.save(self.save_rates, rates, self.dtype)
        print(report(self.model, setting, gpu, measured.with_network(rates, self.network)))

    def check(self) -> None:
        """UserError for numbers and combinations that cannot be."""
        for flag, value, least in (
            ("gpus", self.gpus, 1),
            ("batch", self.batch, self.gpus),
            ("dim", self.dim, 1),
            ("micro-batch", self.micro_batch, 1),
        ):
            if value is not None and value < least:
                raise UserError(f"--{flag} must be at least {least}, got {value}")
        if self.network is not None and self.network <= 0:
            raise UserError(f"--network must be positive, got {self.network}")
        if self.rates is not None and self.measure:
            raise UserError("--rates and --measure exclude each other")
        if self.save_rates is not None and not self.measure:
            raise UserError("--save-rates keeps what --measure finds: give both")
