"""What defines a model, as frozen data that goes to JSON and back."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeAlias


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
class ResNetConfig:
    """CLIP's modified ResNet: `layers[i]` bottlenecks in stage i, 32 `width` channels at the end (resnet.py)."""

    image_size: int = 224
    channels: int = 3
    width: int = 64
    layers: tuple[int, int, int, int] = (3, 4, 6, 3)
    head_width: int = 64  # of the attention pooling

    def __post_init__(self) -> None:
        _check_divides("image_size", self.image_size, "the ResNet's stride", 32)
        _check_divides("32 * width", 32 * self.width, "head_width", self.head_width)


@dataclass(frozen=True)
class VitConfig:
    """Vision transformer on patches of `patch_size` pixels a side (vit.py)."""

    image_size: int = 224
    channels: int = 3
    patch_size: int = 32
    width: int = 768
    layers: int = 12
    head_width: int = 64
    mlp_ratio: float = 4.0  # hidden units of the MLP, in widths
    quick_gelu: bool = False
    patch_dropout: float = 0.0  # share of the patches left out of each training image

    def __post_init__(self) -> None:
        _check_divides("image_size", self.image_size, "patch_size", self.patch_size)
        _check_divides("width", self.width, "head_width", self.head_width)
        if not 0 <= self.patch_dropout < 1:
            raise ValueError(f"patch_dropout must be in [0, 1), got {self.patch_dropout}")


@dataclass(frozen=True)
class TextConfig:
    """Bidirectional text transformer, averaged over its tokens (text.py); `head_width` divides `width`."""

    vocabulary: int = 2048
    context: int = 16
    width: int = 128
    layers: int = 2
    head_width: int = 64


@dataclass(frozen=True)
class CausalTextConfig:
    """CLIP's text transformer: causal, and the features are the end token's (causal.py).

    The end token is the highest id of each caption, as in CLIP, unless `end_token` names another.
    """

    vocabulary: int = 49408
    context: int = 77
    width: int = 512
    layers: int = 12
    head_width: int = 64
    mlp_ratio: float = 4.0
    quick_gelu: bool = False
    end_token: int | None = None

    def __post_init__(self) -> None:
        _check_divides("width", self.width, "head_width", self.head_width)


@dataclass(frozen=True)
class CbowConfig:
    """Continuous bag of words: the mean of the tokens' embeddings (cbow.py)."""

    vocabulary: int = 49408
    context: int = 77
    width: int = 512


ImageConfig: TypeAlias = ConvConfig | ResNetConfig | VitConfig
AnyTextConfig: TypeAlias = TextConfig | CausalTextConfig | CbowConfig

# The tag in JSON. Files written before there were several kinds have none: they hold the first of each.
IMAGE_KINDS: dict[str, type[ImageConfig]] = {"conv": ConvConfig, "resnet": ResNetConfig, "vit": VitConfig}
TEXT_KINDS: dict[str, type[AnyTextConfig]] = {"mean": TextConfig, "causal": CausalTextConfig, "cbow": CbowConfig}


@dataclass(frozen=True)
class ClipConfig:
    """Both towers, the width of their common space, and the first logit scale (the multiplier).

    `init_bias`: the first logit bias of a model for siglip_loss; None, as in CLIP, for a model without one.
    """

    embed_dim: int = 256
    image: ImageConfig = field(default_factory=ConvConfig)
    text: AnyTextConfig = field(default_factory=TextConfig)
    init_scale: float = 1 / 0.07
    init_bias: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "image": {"kind": _kind(self.image, IMAGE_KINDS), **asdict(self.image)},
            "text": {"kind": _kind(self.text, TEXT_KINDS), **asdict(self.text)},
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ClipConfig:
        """Inverse of to_dict, lists for tuples allowed (JSON).

        TypeError for an unknown field, ValueError for an unknown kind, KeyError for a missing tower.
        """
        image = _from_dict("image", values["image"], IMAGE_KINDS)
        text = _from_dict("text", values["text"], TEXT_KINDS)
        return cls(**{**values, "image": image, "text": text})


def field_names(config: object) -> list[str]:
    """Names of a configuration's fields, in order."""
    return [entry.name for entry in fields(config)]


def _kind(config: object, kinds: dict[str, type]) -> str:
    return next(name for name, kind in kinds.items() if kind is type(config))


def _from_dict(tower: str, values: dict[str, Any], kinds: dict[str, type]):
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    kind = values.pop("kind", next(iter(kinds)))
    if kind not in kinds:
        raise ValueError(f"{tower} tower of kind {kind!r}: expected one of {', '.join(kinds)}")
    return kinds[kind](**values)


def _check_divides(name: str, value: int, divisor_name: str, divisor: int) -> None:
    if value < 1 or divisor < 1 or value % divisor:
        raise ValueError(f"{name} must be a positive multiple of {divisor_name}, got {value} and {divisor}")
