"""What defines a model, as frozen data that goes to JSON and back."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class ConvConfig:
    """Convolutional image tower for `channels` planes of `image_size` pixels a side.

    Stage i halves the side, goes to `widths[i]` and adds `blocks[i]` residual blocks; `hidden` units follow.
    """

    image_size: int = 32
    channels: int = 1
    widths: tuple[int, ...] = (32, 64, 128)
    blocks: tuple[int, ...] = (0, 0, 0)
    hidden: int = 512


@dataclass(frozen=True)
class TextConfig:
    """Text transformer for at most `context` tokens; `head_width` divides `width`."""

    vocabulary: int = 2048
    context: int = 16
    width: int = 128
    layers: int = 2
    head_width: int = 64


@dataclass(frozen=True)
class ClipConfig:
    """Both towers, the width of their common space, and the first logit scale (the multiplier)."""

    embed_dim: int = 256
    image: ConvConfig = field(default_factory=ConvConfig)
    text: TextConfig = field(default_factory=TextConfig)
    init_scale: float = 1 / 0.07

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ClipConfig:
        """Inverse of to_dict, lists for tuples allowed (JSON). TypeError for an unknown field."""
        image = {k: tuple(v) if isinstance(v, list) else v for k, v in values["image"].items()}
        return cls(**{**values, "image": ConvConfig(**image), "text": TextConfig(**values["text"])})
