"""FLOPs of a training step on one GPU, and the bytes that this GPU sends.

Legend: n pairs of this GPU, N of all W, D width of the embedding.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastclip.plan.setting import Setting

FLOAT = 4
SUM_AND_SHIFT = 8  # of a column, float32 each; their gradients are as many


@dataclass(frozen=True)
class Work:
    """FLOPs: the towers' forward and backward passes (backward is twice forward), the forward passes made again (for
    caching and for recomputation), and the loss. Bytes: the loss's messages, and those of weights and gradients."""

    towers: float
    again: float
    loss: float
    loss_bytes: float
    weight_bytes: float

    @property
    def flops(self) -> float:
        return self.towers + self.again + self.loss

    @property
    def bytes_sent(self) -> float:
        return self.loss_bytes + self.weight_bytes


def work(setting: Setting) -> Work:
    forward = setting.rows * sum(tower.flops for tower in setting.towers)
    width = setting.model.embed_dim
    return Work(
        towers=3 * forward,
        again=forward * ((setting.micro_batch is not None) + setting.recompute),
        # Of the floor without the matrix (docs/math.md): S twice, and two products of its gradient.
        loss=8 * setting.rows * setting.batch * width,
        loss_bytes=_loss_bytes(setting),
        weight_bytes=_weight_bytes(setting),
    )


def _loss_bytes(setting: Setting) -> float:
    """Keys to all, their gradients back; and the columns' sums (fastclip/distributed)."""
    others = (setting.gpus - 1) / setting.gpus * setting.batch
    keys = others * setting.model.embed_dim
    sums = 2 * SUM_AND_SHIFT * others
    if setting.loss_mode == "gather":
        return 2 * setting.number * keys + sums
    return (2 * setting.number + FLOAT) * keys + sums  # the keys go round twice, their gradients in float32


def _weight_bytes(setting: Setting) -> float:
    """DDP: one all-reduce of float32 gradients. FSDP2: one reduce-scatter; a gather for each forward and backward."""
    share = (setting.gpus - 1) / setting.gpus * FLOAT * sum(setting.parameters)
    if setting.parallel == "ddp":
        return 2 * share
    passes = 2 if setting.micro_batch is None else 3 * setting.pieces
    return share * (1 + passes)
