"""Rates of this machine, from short runs of the model's towers and of the loss."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

from fastclip.clip.model import Clip
from fastclip.env import processor
from fastclip.loss import clip_loss
from fastclip.plan.rates import Rates
from fastclip.plan.setting import Setting

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ROUNDS = 3
# A probe should take seconds: FLOPs of one run of the towers, and rows of the loss, on a CPU and on a GPU.
TOWER_FLOPS = {"cpu": 1e11, "cuda": 2e14}
LOSS_ROWS = {"cpu": 4096, "cuda": 32768}


def measure(setting: Setting) -> Rates:
    """Runs on the GPU where there is one, with the setting's model, dtype and (at most) micro-batch."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = probe_rows(setting, device.type)
    torch.manual_seed(0)
    model = Clip(setting.model).to(device)
    model.set_grad_checkpointing(False)
    image, text = setting.model.image, setting.model.text
    images = torch.randn(rows, image.channels, image.image_size, image.image_size, device=device)
    # Captions that fill the context: the last id is the end token's.
    ids = torch.randint(1, text.vocabulary - 1, (rows, text.context), device=device)
    ids[:, -1] = text.vocabulary - 1
    autocast = torch.autocast(device.type, DTYPES[setting.dtype], enabled=setting.dtype != "fp32")

    def forward() -> None:
        with torch.no_grad(), autocast:
            model.encode_image(images), model.encode_text(ids)

    def training() -> None:
        model.zero_grad()
        with autocast:
            features = model.encode_image(images), model.encode_text(ids)
        torch.autograd.backward(features, [torch.ones_like(x) for x in features])

    flops = rows * sum(tower.flops for tower in setting.towers)
    n, width = min(LOSS_ROWS[device.type], setting.batch), setting.model.embed_dim
    sides = [torch.randn(n, width, device=device, dtype=DTYPES[setting.dtype], requires_grad=True) for _ in range(2)]
    where = processor() if device.type == "cpu" else torch.cuda.get_device_name()
    return Rates(
        towers=3 * flops / seconds(training, device),
        forward=flops / seconds(forward, device),
        loss=8 * n * n * width / seconds(lambda: clip_loss(*sides, 10.0).backward(), device),
        source=f"measured here: towers on {rows} pairs, loss on {n:,}, {setting.dtype}, {where}",
    )


def probe_rows(setting: Setting, device: str) -> int:
    """A micro-batch, or what a short run can do of it; two at least, since batch normalisation refuses one."""
    affordable = TOWER_FLOPS[device] / (3 * sum(tower.flops for tower in setting.towers))
    return max(2, min(setting.micro_batch or setting.rows, setting.rows, int(affordable)))


def seconds(call: Callable[[], None], device: torch.device) -> float:
    """Median of a few calls after one that warms up."""
    taken = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return median(taken[1:])
