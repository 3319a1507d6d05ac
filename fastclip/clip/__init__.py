"""CLIP models: towers, the pair, models by name, and checkpoints. Nothing here imports the trainer."""

from fastclip.clip.checkpoint import export_openclip, export_transformers, load, save
from fastclip.clip.config import (
    CausalTextConfig,
    CbowConfig,
    ClipConfig,
    ConvConfig,
    ResNetConfig,
    TextConfig,
    VitConfig,
)
from fastclip.clip.convert import CheckpointMismatchError
from fastclip.clip.convert_config import to_openclip as openclip_config
from fastclip.clip.model import Clip
from fastclip.clip.zoo import create_model, list_models, model_config

__all__ = [
    "CausalTextConfig",
    "CbowConfig",
    "CheckpointMismatchError",
    "Clip",
    "ClipConfig",
    "ConvConfig",
    "ResNetConfig",
    "TextConfig",
    "VitConfig",
    "create_model",
    "export_openclip",
    "export_transformers",
    "list_models",
    "load",
    "model_config",
    "openclip_config",
    "save",
]
