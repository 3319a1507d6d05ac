"""CLIP models: towers, the pair, models by name, and checkpoints. Nothing here imports the trainer."""

from fastclip.clip.config import (
    CausalTextConfig,
    CbowConfig,
    ClipConfig,
    ConvConfig,
    ResNetConfig,
    TextConfig,
    VitConfig,
)
from fastclip.clip.model import Clip
from fastclip.clip.zoo import create_model, list_models, model_config

__all__ = [
    "CausalTextConfig",
    "CbowConfig",
    "Clip",
    "ClipConfig",
    "ConvConfig",
    "ResNetConfig",
    "TextConfig",
    "VitConfig",
    "create_model",
    "list_models",
    "model_config",
]
