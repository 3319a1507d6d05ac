"""What the towers accept."""

from __future__ import annotations

import torch


def check_images(images: torch.Tensor, channels: int, size: int) -> None:
    """ValueError unless [N, channels, size, size]; TypeError unless floating point."""
    if not images.is_floating_point():
        raise TypeError(f"images must be floating point, got {images.dtype}")
    if images.ndim != 4 or images.shape[1:] != (channels, size, size):
        raise ValueError(f"images must be [N, {channels}, {size}, {size}], got {list(images.shape)}")


def check_ids(ids: torch.Tensor, context: int) -> None:
    """ValueError unless [N, L] with 1 <= L <= context; TypeError unless int64 or int32."""
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"token ids must be int64 or int32, got {ids.dtype}")
    if ids.ndim != 2 or not 1 <= ids.shape[1] <= context:
        raise ValueError(f"token ids must be [N, L] with 1 <= L <= {context}, got {list(ids.shape)}")
