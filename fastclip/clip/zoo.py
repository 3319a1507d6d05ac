"""The models by name.

RN50 to ViT-L/14@336px are those of Radford et al., arXiv 2103.00020, tables 19 and 20; ViT-H, g and bigG are OpenCLIP's
(Cherti et al., arXiv 2212.07143). The last three fit a CPU. docs/models.md has their sizes.
"""

from __future__ import annotations

import re
from dataclasses import replace

from fastclip.clip.config import (
    CausalTextConfig,
    ClipConfig,
    ConvConfig,
    ResNetConfig,
    TextConfig,
    VitConfig,
    field_names,
)
from fastclip.clip.model import Clip

QUICK_GELU = "-quickgelu"  # OpenCLIP's suffix


def _resnet(embed_dim: int, size: int, width: int, layers: tuple[int, ...], text_width: int) -> ClipConfig:
    image = ResNetConfig(image_size=size, width=width, layers=layers)
    return ClipConfig(embed_dim, image, CausalTextConfig(width=text_width))


def _vit(embed_dim: int, image: VitConfig, text_width: int, text_layers: int = 12) -> ClipConfig:
    return ClipConfig(embed_dim, image, CausalTextConfig(width=text_width, layers=text_layers))


_SMALL_TEXT = CausalTextConfig(width=256, layers=4)

MODELS: dict[str, ClipConfig] = {
    "RN50": _resnet(1024, 224, 64, (3, 4, 6, 3), 512),
    "RN101": _resnet(512, 224, 64, (3, 4, 23, 3), 512),
    "RN50x4": _resnet(640, 288, 80, (4, 6, 10, 6), 640),
    "RN50x16": _resnet(768, 384, 96, (6, 8, 18, 8), 768),
    "RN50x64": _resnet(1024, 448, 128, (3, 15, 36, 10), 1024),
    "ViT-B/32": _vit(512, VitConfig(patch_size=32), 512),
    "ViT-B/16": _vit(512, VitConfig(patch_size=16), 512),
    "ViT-L/14": _vit(768, VitConfig(patch_size=14, width=1024, layers=24), 768),
    "ViT-L/14@336px": _vit(768, VitConfig(image_size=336, patch_size=14, width=1024, layers=24), 768),
    "ViT-H/14": _vit(1024, VitConfig(patch_size=14, width=1280, layers=32, head_width=80), 1024, 24),
    "ViT-g/14": _vit(
        1024, VitConfig(patch_size=14, width=1408, layers=40, head_width=88, mlp_ratio=6144 / 1408), 1024, 24
    ),
    "ViT-bigG/14": _vit(
        1280, VitConfig(patch_size=14, width=1664, layers=48, head_width=104, mlp_ratio=8192 / 1664), 1280, 32
    ),
    # For CPUs and tests. CLIP's vocabulary is most of the first two.
    "ViT-Ti/4@32px": ClipConfig(256, VitConfig(image_size=32, patch_size=4, width=192, layers=6), _SMALL_TEXT),
    "RN-Ti@64px": ClipConfig(256, ResNetConfig(image_size=64, width=16, layers=(1, 1, 1, 1)), _SMALL_TEXT),
    # What `fastclip demo` trains: one plane of ink, and the names of characters.
    "glyph-conv": ClipConfig(256, ConvConfig(), TextConfig()),
}


def list_models() -> list[str]:
    """Names for create_model, in OpenAI's spelling. "-quickgelu" may follow each that has a transformer of CLIP's."""
    return list(MODELS)


def create_model(name: str, **overrides: object) -> Clip:
    """A model with fresh weights, on the CPU in float32, in training mode.

    `name` is OpenAI's spelling or OpenCLIP's: "ViT-B/32" or "ViT-B-32", "ViT-L/14@336px" or "ViT-L-14-336". As in
    OpenCLIP the activation is GELU; "-quickgelu" after the name, or quick_gelu=True, gives the one of OpenAI's weights.
    Overrides are those of model_config. ValueError for an unknown name, TypeError for an unknown override.
    """
    return Clip(model_config(name, **overrides))


def model_config(name: str, **overrides: object) -> ClipConfig:
    """The configuration that create_model(name, **overrides) builds.

    An override is a field of ClipConfig, of the image configuration or of the text configuration; where both towers
    have it, "image_" or "text_" goes before it (image_width=, text_layers=). quick_gelu= alone is for both.
    """
    base = name.removesuffix(QUICK_GELU)
    config = _BY_SPELLING.get(_spelling(base))
    if config is None:
        raise ValueError(f"no model named {name!r}; there are {', '.join(MODELS)}")
    if base != name:
        overrides = {"quick_gelu": True, **overrides}
    return override(config, **overrides)


def override(config: ClipConfig, **values: object) -> ClipConfig:
    """`config` with some fields changed; their names as in model_config."""
    top: dict[str, object] = {name: values[name] for name in field_names(config) if name in values}
    config = replace(config, **top)
    changes: dict[str, dict[str, object]] = {"image": {}, "text": {}}
    for name, value in values.items():
        if name not in top:
            for tower, own in _targets(config, name):
                changes[tower][own] = value
    return replace(
        config, image=replace(config.image, **changes["image"]), text=replace(config.text, **changes["text"])
    )


def _targets(config: ClipConfig, name: str) -> list[tuple[str, str]]:
    """(tower, field) pairs that the override `name` sets."""
    has = {"image": field_names(config.image), "text": field_names(config.text)}
    found = [(tower, name) for tower in has if name in has[tower]]
    if len(found) == 1 or (found and name == "quick_gelu"):
        return found
    tower, _, own = name.partition("_")
    if own in has.get(tower, ()):
        return [(tower, own)]
    if found:
        raise TypeError(f"{name} is a field of both towers: say image_{name} or text_{name}")
    known = [*field_names(config), *has["image"], *has["text"]]
    raise TypeError(f"unknown override {name!r}; there are {', '.join(dict.fromkeys(known))}")


def _spelling(name: str) -> str:
    """ "ViT-L/14@336px" -> "ViT-L-14-336"."""
    return re.sub(r"@(\d+)px$", r"-\1", name.replace("/", "-"))


_BY_SPELLING = {_spelling(name): config for name, config in MODELS.items()}
