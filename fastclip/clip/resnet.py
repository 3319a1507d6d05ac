"""CLIP's modified ResNet: images [N, C, S, S] -> features [N, D] (Radford et al., arXiv 2103.00020, section 2.4).

Three changes to the ResNet of He et al.: a stem of three convolutions and an average pooling; every stride is an
average pooling before a convolution of stride 1, so that nothing aliases (Zhang, arXiv 1904.11486); and the last map is
pooled by attention, with its mean as the query. All maps are channels last.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from fastclip.clip import recompute
from fastclip.clip.config import ResNetConfig
from fastclip.clip.inputs import check_images

EXPANSION = 4  # a bottleneck's last convolution, in its first one's width


class Bottleneck(nn.Module):
    """x + bn(1x1(pool(3x3(1x1(x))))), then ReLU. The stride is in the poolings, here and on the shortcut."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        after = EXPANSION * width
        self.stride = stride
        self.conv1 = nn.Conv2d(before, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, after, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(after)
        changes = stride > 1 or before != after
        self.downsample = (
            nn.Sequential(nn.Conv2d(before, after, 1, bias=False), nn.BatchNorm2d(after)) if changes else None
        )
        # Each block starts as its shortcut (OpenAI's CLIP, `initialize_parameters` of clip/model.py).
        nn.init.zeros_(self.bn3.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = F.relu(self.bn1(self.conv1(x)), inplace=True)
        branch = F.relu(self.bn2(self.conv2(branch)), inplace=True)
        branch = self.bn3(self.conv3(self._pool(branch)))
        shortcut = x if self.downsample is None else self.downsample(self._pool(x))
        return F.relu(branch + shortcut, inplace=True)

    def _pool(self, x: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(x, self.stride) if self.stride > 1 else x


class AttentionPool(nn.Module):
    """[N, W, S, S] -> [N, D]: attention from the mean of the map to the mean and the S^2 places."""

    def __init__(self, side: int, width: int, head_width: int, embed_dim: int) -> None:
        super().__init__()
        self.heads = width // head_width
        std = width**-0.5
        self.positions = nn.Parameter(std * torch.randn(side**2 + 1, width))
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.project = nn.Linear(width, embed_dim)
        for linear in (self.query, self.key, self.value, self.project):
            nn.init.normal_(linear.weight, std=std)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        x = maps.flatten(2).transpose(1, 2)
        x = torch.cat([x.mean(1, keepdim=True), x], dim=1) + self.positions.to(x.dtype)
        query, key, value = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part in (self.query(x[:, :1]), self.key(x), self.value(x))
        )
        return self.project(F.scaled_dot_product_attention(query, key, value).flatten(1))


class ModifiedResNet(nn.Module):
    """Images, normalised as the model was trained -> features before normalisation."""

    def __init__(self, config: ResNetConfig, embed_dim: int) -> None:
        super().__init__()
        self.config = config
        self.recomputed = False
        width = config.width
        self.conv1 = nn.Conv2d(config.channels, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        before = width
        for stage, blocks in enumerate(config.layers):
            inner, stride = width * 2**stage, 1 if stage == 0 else 2
            layer = [
                Bottleneck(before if i == 0 else EXPANSION * inner, inner, stride if i == 0 else 1)
                for i in range(blocks)
            ]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layer))
            before = EXPANSION * inner
        self.pool = AttentionPool(config.image_size // 32, before, config.head_width, embed_dim)
        self.to(memory_format=torch.channels_last)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only each bottleneck's input, and compute the rest again in backward."""
        self.recomputed = enable

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        check_images(images, self.config.channels, self.config.image_size)
        x = images.to(self.conv1.weight.dtype, memory_format=torch.channels_last)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        x = F.relu(self.bn3(self.conv3(x)), inplace=True)
        x = F.avg_pool2d(x, 2)
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in layer:
                x = recompute.call(block, x, recomputed=self.recomputed)
        return self.pool(x)
