"""What a training run is made of, as frozen data: the command line, the TOML file and the checkpoint hold the same."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fastclip.data.config import DataConfig, Kind
from fastclip.errors import UserError


@dataclass(frozen=True)
class ModelConfig:
    """Which model, from which weights, and what of it is trained."""

    name: str | None = None
    """A model of `fastclip.clip.list_models()`, such as ViT-B/32; glyph-conv if neither it nor start_from is given."""
    start_from: Path | None = None
    """Weights to fine-tune: a model folder, or a checkpoint of another project. From scratch if not given."""
    lock_image: bool = False
    """Train the text tower against a frozen image tower in evaluation mode (LiT, arXiv 2111.07991)."""
    recompute: bool = False
    """Gradient checkpointing: keep each block's input only and compute the rest anew in backward."""
    tokenizer: Literal["clip", "learn"] = "clip"
    """Of a new model with CLIP's text tower: CLIP's vocabulary, or one learnt from the captions."""
    vocabulary: int = 2048
    """Ids at most of a learnt tokenizer."""
    context: int | None = None
    """Tokens a caption at most, of a new model; the architecture's own if not given."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW; gains, biases and the logit scale do not decay (Radford et al., arXiv 2103.00020, section 2.5)."""

    learning_rate: float = 5e-4
    """Highest learning rate."""
    weight_decay: float = 0.2
    """Decoupled weight decay, times the learning rate, of matrices and kernels."""
    betas: tuple[float, float] | None = None
    """Decay of the moments; if not given the paper's: (0.9, 0.98) for vision transformers, (0.9, 0.999) for others."""
    eps: float | None = None
    """Added to the root of the second moment; if not given the paper's: 1e-6 for vision transformers, 1e-8."""
    clip_norm: float | None = None
    """Largest norm of the whole gradient; longer ones are shortened to it."""
    scale_rate: float = 1.0
    """The logit scale's learning rate, in learning rates."""
    highest_scale: float = 100.0
    """The logit scale is kept in [1, this] after each step."""
    ema: float | None = None
    """Decay per step of an exponential moving average of the weights, such as 0.9998: it is evaluated and saved too."""
    skips: int = 10
    """How many steps in a row may be skipped for a loss or gradient that is not finite; one more ends the run."""


@dataclass(frozen=True)
class ScheduleConfig:
    """How long, and the learning rate's course: linear warm-up, then half a cosine to zero."""

    steps: int | None = None
    """Optimiser steps. At most one of steps, epochs and samples can be given; one epoch if none is."""
    epochs: float | None = None
    """Passes over the training data."""
    samples: int | None = None
    """Pairs to train on, over all processes."""
    warmup: float = 0.1
    """Of the learning rate: below 1 a share of the steps, from 1 a number of steps."""


@dataclass(frozen=True)
class PrecisionConfig:
    """Number formats and compilation. Weights, optimiser state and the loss stay float32."""

    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the towers' products, through autocast; fp16 scales the loss (GradScaler)."""
    compile: bool = False
    """torch.compile the towers."""
    tf32: bool = True
    """Let NVIDIA GPUs round float32 products' inputs to TF32."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Measured on held-out pairs during training and at its end."""

    every: int = 1000
    """Steps between evaluations; 0 evaluates at the end only."""
    source: str | None = None
    """Held-out pairs, named as --data.source, with the same columns; of the glyphs the held-out faces if not given."""
    kind: Kind = "auto"
    """What the source is, as --data.kind."""
    split: str | None = None
    """Of the source, as --data.split."""
    samples: int = 4096
    """Held-out pairs at most: their loss is that of one batch of them, recall@K is among them."""
    batch: int = 256
    """Pairs a process encodes at a time."""
    zero_shot: str | None = None
    """Classified without training: a folder with a folder of pictures for each class; or `digits` (scikit-learn's)."""
    templates: tuple[str, ...] = ()
    """Prompts of the zero-shot classes, as for `fastclip classify`."""


@dataclass(frozen=True)
class CheckpointConfig:
    """What a run that is stopped can go on from."""

    every: int = 1000
    """Steps between checkpoints; 0 writes one at the end and on SIGTERM or SIGINT only."""
    keep: int = 2
    """How many of the newest are kept."""


@dataclass(frozen=True)
class LogConfig:
    """metrics.jsonl and the pictures are always written."""

    every: int = 10
    """Steps between records."""
    accuracy_every: int = 50
    """Steps between in-batch accuracies, which cost a pass over the similarities."""
    tensorboard: bool = True
    """Write TensorBoard event files, where the package is installed."""
    wandb: str | None = None
    """Weights & Biases project to log to; needs the package and its own settings."""
    peak_tflops: float | None = None
    """What one device can do in this precision; with it the model FLOPs utilisation (MFU) is logged."""


@dataclass(frozen=True)
class TrainConfig:
    """Train a CLIP model. Under torchrun on many devices and machines: see docs/training.md."""

    out: Path = field(default=Path("runs/train"))
    """Folder of the run: model, checkpoints, config.toml, metrics.jsonl, curves.png."""
    resume: str | None = None
    """`latest` goes on from the newest sound checkpoint in --out, or begins; a checkpoint's folder goes on from it."""
    batch: int = 1024
    """Pairs a step, over all processes: each is compared with all others."""
    micro_batch: int | None = None
    """Pairs a process encodes at a time (gradient caching): memory is that of these, the result that of --batch."""
    loss: Literal["clip", "siglip"] = "clip"
    """CLIP's softmax or SigLIP's sigmoid (with a learnable bias, from -10)."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Under torchrun: each process holds the whole model (DDP), or a shard of it (FSDP2)."""
    loss_mode: Literal["gather", "ring"] = "gather"
    """Under torchrun: every process holds all text features for the loss, or they go round while it computes."""
    workers: int = 0
    """Processes that decode images for each training process; 0 decodes in the training process itself."""
    crop: tuple[float, float] = (0.9, 1.0)
    """Each training image is a random part of the original: the least and greatest share of its area."""
    flip: float = 0.0
    """Share of the training images that are mirrored."""
    device: str | None = None
    """Such as cpu; if not given the GPU of the process, where there is one."""
    threads: int | None = None
    """CPU threads of each process; torch's own choice if not given."""
    seed: int = 0
    """Of the weights, the batches and the distortions."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def check(self) -> None:
        """UserError for numbers that cannot be."""
        lengths = {"steps": self.schedule.steps, "epochs": self.schedule.epochs, "samples": self.schedule.samples}
        given = {name: length for name, length in lengths.items() if length is not None}
        if len(given) > 1:
            raise UserError(f"give one of {' and '.join(f'--schedule.{name}' for name in given)}")
        at_least = {
            **{f"schedule.{name}": (length, 0, False) for name, length in given.items()},
            "batch": (self.batch, 2, True),
            "micro-batch": (self.micro_batch, 1, True),
            "threads": (self.threads, 1, True),
            "optimizer.learning-rate": (self.optimizer.learning_rate, 0, False),
            "optimizer.clip-norm": (self.optimizer.clip_norm, 0, False),
            "optimizer.highest-scale": (self.optimizer.highest_scale, 1, True),
            "optimizer.skips": (self.optimizer.skips, 0, True),
            "schedule.warmup": (self.schedule.warmup, 0, True),
            "evaluation.every": (self.evaluation.every, 0, True),
            "evaluation.samples": (self.evaluation.samples, 2, True),
            "evaluation.batch": (self.evaluation.batch, 1, True),
            "workers": (self.workers, 0, True),
            "model.vocabulary": (self.model.vocabulary, 2, True),
            "model.context": (self.model.context, 2, True),
            "checkpoint.every": (self.checkpoint.every, 0, True),
            "checkpoint.keep": (self.checkpoint.keep, 1, True),
            "log.every": (self.log.every, 1, True),
            "log.accuracy-every": (self.log.accuracy_every, 1, True),
        }
        for name, (value, lowest, inclusive) in at_least.items():
            if value is not None and not (value >= lowest if inclusive else value > lowest):
                raise UserError(f"--{name} must be {'at least' if inclusive else 'more than'} {lowest}, got {value}")
        self.data.check()
        if self.optimizer.ema is not None and not 0 < self.optimizer.ema < 1:
            raise UserError(f"--optimizer.ema must be between 0 and 1, got {self.optimizer.ema}")


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
