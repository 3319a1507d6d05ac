"""Memory of one GPU at the peak of a training step, in bytes, part by part.

Legend: n pairs of this GPU, N of all W, P weights, D width of the embedding, b bytes of a feature.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from fastclip.plan.setting import Setting

ADAMW = 8  # two float32 moments a weight
FLOAT, INT64 = 4, 8
GPU_WORKSPACE = 512 * 2**20  # of the Triton kernels, at most (kernels/configs.py)
CPU_WORKSPACE = 16 * 2**20  # of the C++ kernels (backends/cpu.py)
CPU_SMALL, CPU_KEPT = 2**21, 2**24  # similarities they keep: all of a small batch, and at most
CPU_VECTORS = 4 * 8  # sums, shifts and gaps of a row or column, float64


@dataclass(frozen=True)
class Memory:
    """Bytes. `peak` counts activations and the loss's workspace once where they are never there together."""

    weights: float
    gradients: float
    optimizer: float
    rounded_weights: float
    batch: float
    features: float
    activations: float
    loss: float
    together: bool

    @property
    def fixed(self) -> float:
        """What is there throughout the step."""
        return self.weights + self.gradients + self.optimizer + self.rounded_weights + self.batch + self.features

    @property
    def peak(self) -> float:
        both = (self.activations, self.loss)
        return self.fixed + (sum(both) if self.together else max(both))

    def parts(self) -> dict[str, float]:
        """Name -> bytes, in order."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "together"}


def memory(setting: Setting) -> Memory:
    """Weights, gradients and AdamW's moments are float32; 16-bit copies of the weights are autocast's."""
    total, largest = sum(setting.parameters), max(setting.parameters)
    shards = setting.gpus if setting.parallel == "fsdp" else 1
    gathered = FLOAT * largest if shards > 1 else 0  # FSDP2: one tower's whole weights, or gradients, at a time
    image, text = setting.model.image, setting.model.text
    sample = FLOAT * image.channels * image.image_size**2 + INT64 * text.context
    cached = setting.micro_batch is not None
    return Memory(
        weights=FLOAT * total / shards + gathered,
        gradients=FLOAT * total / shards + gathered,
        optimizer=ADAMW * total / shards,
        rounded_weights=setting.number * (largest if cached else total) if setting.number < FLOAT else 0,
        batch=setting.rows * sample,
        # Of both sides, and the gradients of both.
        features=4 * setting.number * setting.rows * setting.model.embed_dim,
        activations=_activations(setting),
        loss=_loss(setting),
        together=not cached,
    )


def _activations(setting: Setting) -> float:
    """Of the whole batch in both towers, of which one is in backward and recomputes; with gradient caching those of a
    micro-batch, in one tower at a time."""
    if setting.micro_batch is None:
        kept = sum(tower.kept for tower in setting.towers)
        return setting.rows * (kept + max(tower.recomputed for tower in setting.towers))
    return min(setting.micro_batch, setting.rows) * max(tower.kept + tower.recomputed for tower in setting.towers)


def _loss(setting: Setting) -> float:
    """Above the features and their gradients. Nothing here grows with N^2 for long."""
    n, world, width, b = setting.rows, setting.gpus, setting.model.embed_dim, setting.number
    columns = setting.batch if setting.loss_mode == "gather" else n
    if setting.on_cpu:
        # Both sides packed; the gradients are made in place.
        kept = min(n**2, CPU_KEPT, max(CPU_SMALL, 4 * n * width)) if world == 1 else 0
        kept *= 16 * kept >= n**2  # not worth the room otherwise
        return FLOAT * (width * (n + columns) + kept) + CPU_VECTORS * (n + columns) + CPU_WORKSPACE
    # Normalised copies of both sides, and dy in float32 before it is rounded.
    bytes_ = b * width * (n + columns) + FLOAT * width * columns
    if world > 1 and setting.loss_mode == "gather":
        bytes_ += 2 * b * width * columns  # all keys, and their gradients
    if world > 1 and setting.loss_mode == "ring":
        bytes_ += 2 * (b + FLOAT) * width * n + FLOAT * width * n  # keys and gradients on their way; dx in float32
    return bytes_ + min(GPU_WORKSPACE, b * n * setting.batch)


def largest_micro_batch(setting: Setting, available: float) -> int:
    """The largest power of two whose peak is under 0.9 of the memory: some is lost between blocks. At least 1."""
    size = 1
    while size < setting.rows and memory(replace(setting, micro_batch=2 * size)).peak < 0.9 * available:
        size *= 2
    return size
