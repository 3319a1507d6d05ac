"""The preprocessing beside torchvision's, which OpenAI and OpenCLIP use."""

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("PIL")

from PIL import Image
from torchvision import transforms

from fastclip.data.transform import OPENAI_MEAN, OPENAI_STD, Preprocess


@pytest.mark.parametrize("size", [32, 224, 336])
def test_preprocess_equals_torchvisions(size):
    bicubic = transforms.InterpolationMode.BICUBIC
    theirs = transforms.Compose(
        [
            transforms.Resize(size, interpolation=bicubic),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize(OPENAI_MEAN, OPENAI_STD),
        ]
    )
    ours, rng = Preprocess(size), np.random.default_rng(size)
    # Random sizes from 1 to 1,000 a side, evenly over the orders of magnitude, up to 8 times as long as wide.
    for width, height in (10 ** rng.uniform(0, 3, (60, 2))).astype(int):
        if max(width, height) <= 8 * min(width, height):
            image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
            torch.testing.assert_close(ours(image), theirs(image), atol=1e-5, rtol=0)
