"""Small models of every kind, and batches for them.

Two layers (the last one is special), two heads, sides of 64 pixels (two places a side in the ResNet's pooling, four
patches a side in the ViT), a text context that is not a power of two.
"""

from dataclasses import replace

import torch
from torch import nn

from fastclip.clip import (
    CausalTextConfig,
    CbowConfig,
    Clip,
    ClipConfig,
    ConvConfig,
    ResNetConfig,
    TextConfig,
    VitConfig,
)

VIT = VitConfig(image_size=64, patch_size=16, width=128, layers=2)
RESNET = ResNetConfig(image_size=64, width=16, layers=(2, 1, 1, 1))
CONV = ConvConfig(image_size=20, widths=(4, 8), blocks=(0, 1), hidden=16)
CAUSAL = CausalTextConfig(vocabulary=60, context=11, width=128, layers=2)
CBOW = CbowConfig(vocabulary=60, context=11, width=24)
MEAN = TextConfig(vocabulary=60, context=11, width=16, layers=2, head_width=8)

CONFIGS = {
    "vit": ClipConfig(24, VIT, CAUSAL),
    "vit-quickgelu": ClipConfig(24, replace(VIT, quick_gelu=True), replace(CAUSAL, quick_gelu=True)),
    "resnet": ClipConfig(24, RESNET, CAUSAL),
    "cbow": ClipConfig(24, VIT, CBOW),
    "glyph": ClipConfig(24, CONV, MEAN),
}
END = 59  # the highest id of 60: the end token


def small(kind: str, seed: int = 0) -> Clip:
    """Random weights, and none of the zeros and ones that fresh models have and that hide mistakes."""
    torch.manual_seed(seed)
    return scrambled(Clip(CONFIGS[kind]))


@torch.no_grad()
def scrambled(model: nn.Module) -> nn.Module:
    """Every bias, every gain and every running statistic becomes random, in place."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 1.5)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.uniform_(0.5, 1.5) if name.endswith("weight") else parameter.normal_(std=0.2)
    return model


def batch(config: ClipConfig, n: int = 3, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Images, and captions of all lengths: each ends in the highest id, then padding; the first fills the context."""
    generator = torch.Generator().manual_seed(seed)
    size, context = config.image.image_size, config.text.context
    images = torch.randn(n, config.image.channels, size, size, generator=generator)
    end = config.text.vocabulary - 1
    ids = torch.randint(1, end, (n, context), generator=generator)
    for row, length in enumerate(torch.linspace(context, 2, n).int().tolist()):
        ids[row, length - 1] = end
        ids[row, length:] = 0
    return images, ids
