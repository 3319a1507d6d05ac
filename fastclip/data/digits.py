"""scikit-learn's handwritten digits: 1,797 scans of 8 x 8 pixels, a test set that is never trained on."""

from __future__ import annotations

import torch
from torch.nn import functional as F

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def load_digit_scans(size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """(images float32 [1797, 1, size, size] in [0, 1], labels int64 [1797]).

    The scans are ink 16 on 0, like the glyphs; each is enlarged and stood on the glyphs' baseline, 5/8 of the
    square high, a little taller than a printed digit.
    """
    from sklearn.datasets import load_digits

    scans = load_digits()
    height, baseline = round(size * 20 / 32), round(size * 24 / 32)
    images = torch.tensor(scans.images, dtype=torch.float32)[:, None] / 16
    images = F.interpolate(images, (height, height), mode="bicubic", align_corners=False).clamp(0, 1)
    left, top = (size - height) // 2, baseline - height
    images = F.pad(images, (left, size - height - left, top, size - baseline))
    return images, torch.tensor(scans.target, dtype=torch.int64)
