"""Floating-point operations of a training step, for the model FLOPs utilisation (MFU)."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from fastclip.clip.model import Clip
from fastclip.train.config import TrainConfig

ROWS = 2


@torch.no_grad()
def training_flops(model: Clip, config: TrainConfig) -> int:
    """Of one step of the whole batch: the towers' forward pass, and twice that for backward.

    Captions fill the context. Not counted, as is the custom (Chowdhery et al., arXiv 2204.02311, appendix B): what is
    computed a second time to save memory. Nor is the loss.
    """
    training = model.training
    model.eval()
    image, text = model.config.image, model.config.text
    images = torch.zeros(ROWS, image.channels, image.image_size, image.image_size)
    # The highest id last: where CLIP's text tower reads its features.
    ids = torch.full((ROWS, text.context), 1)
    ids[:, -1] = text.vocabulary - 1
    forward = {}
    for name, encode in (("image", lambda: model.encode_image(images)), ("text", lambda: model.encode_text(ids))):
        with FlopCounterMode(display=False) as counter:
            encode()
        forward[name] = counter.get_total_flops()
    model.train(training)
    image_passes = 1 if config.model.lock_image else 3
    return (image_passes * forward["image"] + 3 * forward["text"]) * config.batch // ROWS
