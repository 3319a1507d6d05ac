"""A model's configuration: in OpenCLIP's JSON, in that of transformers, and from the shapes of its tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from fastclip.clip.config import CausalTextConfig, ClipConfig, ResNetConfig, VitConfig
from fastclip.clip.convert import OPENAI_EXTRAS

# Heads leave no trace in the shapes. OpenAI's are all 64 wide; OpenCLIP's largest image towers differ.
HEAD_WIDTH = 64
OPENCLIP_HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104, 1792: 112}


def config_from_shapes(state: Mapping[str, torch.Tensor], *, openai: bool) -> ClipConfig:
    """Of a state dict in OpenAI's and OpenCLIP's layout. QuickGELU if it is OpenAI's, which extra entries tell too.

    ValueError where it is no such state dict.
    """
    quick_gelu = openai or all(name in state for name in OPENAI_EXTRAS)
    try:
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        text = CausalTextConfig(
            vocabulary=shapes["token_embedding.weight"][0],
            context=shapes["positional_embedding"][0],
            width=shapes["ln_final.weight"][0],
            layers=_count(shapes, r"transformer\.resblocks\.(\d+)\."),
            head_width=HEAD_WIDTH,
            mlp_ratio=_ratio(shapes["transformer.resblocks.0.mlp.c_fc.weight"]),
            quick_gelu=quick_gelu,
        )
        image = _vit(shapes, quick_gelu) if "visual.class_embedding" in shapes else _resnet(shapes)
        bias = float(state["logit_bias"]) if "logit_bias" in state else None
        return ClipConfig(shapes["text_projection"][1], image, text, init_bias=bias)
    except (KeyError, IndexError) as error:
        raise ValueError(f"the architecture cannot be read off the weights: no {error}") from error


def _vit(shapes: Mapping[str, tuple[int, ...]], quick_gelu: bool) -> VitConfig:
    width, channels, patch, _ = shapes["visual.conv1.weight"]
    return VitConfig(
        image_size=patch * _side(shapes["visual.positional_embedding"]),
        channels=channels,
        patch_size=patch,
        width=width,
        layers=_count(shapes, r"visual\.transformer\.resblocks\.(\d+)\."),
        head_width=OPENCLIP_HEAD_WIDTHS.get(width, HEAD_WIDTH),
        mlp_ratio=_ratio(shapes["visual.transformer.resblocks.0.mlp.c_fc.weight"]),
        quick_gelu=quick_gelu,
    )


def _resnet(shapes: Mapping[str, tuple[int, ...]]) -> ResNetConfig:
    return ResNetConfig(
        image_size=32 * _side(shapes["visual.attnpool.positional_embedding"]),
        channels=shapes["visual.conv1.weight"][1],
        width=shapes["visual.layer1.0.conv1.weight"][0],
        layers=tuple(_count(shapes, rf"visual\.layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4)),
        head_width=HEAD_WIDTH,
    )


def _count(shapes: Mapping[str, object], pattern: str) -> int:
    return len({match[1] for name in shapes if (match := re.match(pattern, name))})


def _ratio(shape: tuple[int, ...]) -> float:
    hidden, width = shape
    return hidden / width


def _side(positions: tuple[int, ...]) -> int:
    """Of the square of places that come after the class token's."""
    return round((positions[0] - 1) ** 0.5)


# Entries of OpenCLIP's configurations that change no weight and no feature of the models here...
_OPENCLIP_HARMLESS = {
    *("custom_text", "init_logit_scale", "nonscalar_logit_scale", "attn_pooler_queries", "attn_pooler_heads"),
    *("timm_pool", "timm_proj", "hf_tokenizer_name", "hf_model_pretrained", "hf_proj_type", "hf_pooler_type"),
    *("tokenizer_mode", "tokenizer_kwargs", "pad_id", "eos_id"),
}
# ... and the values of the others that mean what is built here. All else is another architecture.
_OPENCLIP_PLAIN = (None, False, 0, "tok", "argmax", "learnable", "linear", "default")


def from_openclip(values: Mapping[str, Any]) -> ClipConfig:
    """From OpenCLIP's `model_cfg`. ValueError for what fastclip has no tower for, naming the entry."""
    top, vision, text = dict(values), dict(values["vision_cfg"]), dict(values["text_cfg"])
    del top["vision_cfg"], top["text_cfg"]
    quick_gelu = top.pop("quick_gelu", False)
    width, layers = vision.pop("width", 768), vision.pop("layers", 12)
    size, head_width = vision.pop("image_size", 224), vision.pop("head_width", HEAD_WIDTH)
    patch, dropout, ratio = vision.pop("patch_size", 16), vision.pop("patch_dropout", 0.0), vision.pop("mlp_ratio", 4.0)
    if isinstance(layers, list):
        image = ResNetConfig(size, width=width, layers=tuple(layers), head_width=head_width)
    else:
        image = VitConfig(size, 3, patch, width, layers, head_width, ratio, quick_gelu, dropout)
    width = text.pop("width", 512)
    config = ClipConfig(
        top.pop("embed_dim"),
        image,
        CausalTextConfig(
            text.pop("vocab_size", 49408),
            text.pop("context_length", 77),
            width,
            text.pop("layers", 12),
            width // text.pop("heads", 8),
            text.pop("mlp_ratio", 4.0),
            quick_gelu,
        ),
        init_bias=top.pop("init_logit_bias", None),
    )
    for where, rest in (("model_cfg", top), ("vision_cfg", vision), ("text_cfg", text)):
        for name, value in rest.items():
            if name not in _OPENCLIP_HARMLESS and value not in _OPENCLIP_PLAIN:
                raise ValueError(f"{where}.{name} = {value!r} is an architecture that fastclip does not have")
    return config


def to_openclip(config: ClipConfig) -> dict[str, Any]:
    """OpenCLIP's `model_cfg`: open_clip.CLIP(**to_openclip(config)) is the same model.

    ValueError for a model that OpenCLIP cannot build.
    """
    image, text = config.image, config.text
    if not isinstance(image, (ResNetConfig, VitConfig)) or not isinstance(text, CausalTextConfig):
        raise ValueError(f"OpenCLIP has no {type(image).__name__} with {type(text).__name__}")
    if image.channels != 3:
        raise ValueError(f"OpenCLIP's image towers take 3 channels, this one {image.channels}")
    if text.end_token not in (None, text.vocabulary - 1):
        raise ValueError(f"OpenCLIP's end token is the highest id, this model's is {text.end_token}")
    vision: dict[str, Any] = {"image_size": image.image_size, "width": image.width, "head_width": image.head_width}
    if isinstance(image, ResNetConfig):
        vision |= {"layers": list(image.layers), "patch_size": None}
    elif image.quick_gelu != text.quick_gelu:
        raise ValueError("OpenCLIP has one quick_gelu for both towers, this model's differ")
    else:
        vision |= {"layers": image.layers, "patch_size": image.patch_size, "mlp_ratio": image.mlp_ratio}
        vision["patch_dropout"] = image.patch_dropout
    bias = {} if config.init_bias is None else {"init_logit_bias": config.init_bias}
    return {
        "embed_dim": config.embed_dim,
        "quick_gelu": text.quick_gelu,
        "vision_cfg": vision,
        "text_cfg": {
            "context_length": text.context,
            "vocab_size": text.vocabulary,
            "width": text.width,
            "heads": text.width // text.head_width,
            "layers": text.layers,
            "mlp_ratio": text.mlp_ratio,
        },
        **bias,
    }


_ACTIVATIONS = {"quick_gelu": True, "gelu": False}


def from_transformers(values: Mapping[str, Any]) -> ClipConfig:
    """From the config.json of a CLIPModel, with transformers' defaults for what it leaves out.

    ValueError for anything but a CLIPModel, and for settings that fastclip's towers do not have.
    """
    if values.get("model_type") != "clip":
        raise ValueError(f"model_type {values.get('model_type')!r} is not clip")
    # Files of 2021 and 2022 have the towers under these names too, and they win.
    text = {**(values.get("text_config") or {}), **(values.get("text_config_dict") or {})}
    vision = {**(values.get("vision_config") or {}), **(values.get("vision_config_dict") or {})}
    image_width, text_width = vision.get("hidden_size", 768), text.get("hidden_size", 512)
    vocabulary = text.get("vocab_size", 49408)
    # 2 was written by mistake in early files: transformers takes the highest id there, as CLIP does.
    end = text.get("eos_token_id", 49407)
    return ClipConfig(
        values.get("projection_dim", 512),
        VitConfig(
            image_size=vision.get("image_size", 224),
            channels=vision.get("num_channels", 3),
            patch_size=vision.get("patch_size", 32),
            width=image_width,
            layers=vision.get("num_hidden_layers", 12),
            head_width=image_width // vision.get("num_attention_heads", 12),
            mlp_ratio=vision.get("intermediate_size", 3072) / image_width,
            quick_gelu=_checked_activation("vision_config", vision),
        ),
        CausalTextConfig(
            vocabulary=vocabulary,
            context=text.get("max_position_embeddings", 77),
            width=text_width,
            layers=text.get("num_hidden_layers", 12),
            head_width=text_width // text.get("num_attention_heads", 8),
            mlp_ratio=text.get("intermediate_size", 2048) / text_width,
            quick_gelu=_checked_activation("text_config", text),
            end_token=None if end in (2, vocabulary - 1) else end,
        ),
    )


def _checked_activation(where: str, values: Mapping[str, Any]) -> bool:
    """Whether it is QuickGELU, once what the towers have fixed is as it must be."""
    for name, only in (("layer_norm_eps", 1e-5), ("attention_dropout", 0.0)):
        if values.get(name, only) != only:
            raise ValueError(f"{where}.{name} = {values[name]!r}: fastclip has {only} only")
    activation = values.get("hidden_act", "quick_gelu")
    if activation not in _ACTIVATIONS:
        raise ValueError(f"{where}.hidden_act = {activation!r}: fastclip has {', '.join(_ACTIVATIONS)} only")
    return _ACTIVATIONS[activation]


def to_transformers(config: ClipConfig) -> dict[str, Any]:
    """The config.json of the same CLIPModel. ValueError for a model that transformers cannot build."""
    image, text = config.image, config.text
    if not isinstance(image, VitConfig) or not isinstance(text, CausalTextConfig):
        raise ValueError(f"transformers' CLIPModel has no {type(image).__name__} with {type(text).__name__}")
    if config.init_bias is not None:
        raise ValueError("transformers' CLIPModel has no logit bias")

    def tower(values: VitConfig | CausalTextConfig) -> dict[str, Any]:
        return {
            "hidden_size": values.width,
            "intermediate_size": round(values.mlp_ratio * values.width),
            "num_hidden_layers": values.layers,
            "num_attention_heads": values.width // values.head_width,
            "hidden_act": "quick_gelu" if values.quick_gelu else "gelu",
            "projection_dim": config.embed_dim,
        }

    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.embed_dim,
        "text_config": {
            **tower(text),
            "model_type": "clip_text_model",
            "vocab_size": text.vocabulary,
            "max_position_embeddings": text.context,
            "bos_token_id": text.vocabulary - 2,
            "eos_token_id": text.vocabulary - 1 if text.end_token is None else text.end_token,
            "pad_token_id": 0,
        },
        "vision_config": {
            **tower(image),
            "model_type": "clip_vision_model",
            "image_size": image.image_size,
            "patch_size": image.patch_size,
            "num_channels": image.channels,
        },
    }
