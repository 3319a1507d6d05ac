"""What a training run is made of, as frozen data."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fastclip.errors import UserError


@dataclass(frozen=True)
class TrainConfig:
    """One run of the optimiser (AdamW, linear warm-up, cosine to zero)."""

    steps: int
    batch: int
    learning_rate: float = 2.5e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    warmup: float = 0.1  # share of the steps
    scale_rate: float = 10.0  # the logit scale's learning rate, in learning rates
    highest_scale: float = 100.0
    stats_every: int = 5  # steps between in-batch accuracies, which cost a pass over the similarities
    seed: int = 0


# A whole family: upright, bold and italic are all unseen, so that none is a slanted copy of a trained face.
SERIF = (
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-Italic",
    "DejaVuSerif-BoldItalic",
    "DejaVuSerifDisplay",
)


@dataclass(frozen=True)
class DemoConfig:
    """Train a small CLIP on the pictures and names of characters, and show what it has learnt."""

    steps: int = 150
    """Optimiser steps."""
    batch: int = 2048
    """Pairs a step, all with different captions."""
    out: Path = field(default=Path("runs/demo"))
    """Folder that gets the pictures, metrics.json and the checkpoint."""
    seed: int = 0
    """Of the weights, the batches and the distortions."""
    threads: int | None = None
    """CPU threads; torch's own choice if not given."""
    faces_held_out: tuple[str, ...] = SERIF
    """Faces that are never trained on; the results of the first one are the headline."""

    def check(self) -> None:
        """UserError for numbers that cannot be."""
        if self.steps < 1 or self.batch < 2:
            raise UserError(f"--steps must be at least 1 and --batch at least 2, got {self.steps} and {self.batch}")
        if self.threads is not None and self.threads < 1:
            raise UserError(f"--threads must be at least 1, got {self.threads}")
        if not self.faces_held_out:
            raise UserError("--faces-held-out needs at least one face: the results are measured on it")
