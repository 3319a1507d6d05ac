"""Where a checkpoint's tensors and configuration are: files and folders of fastclip, OpenAI, OpenCLIP, transformers.

Nothing here runs what a file holds: safetensors, torch.load with weights_only=True, and archive.py for TorchScript.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastclip.clip.archive import is_torchscript, read_torchscript
from fastclip.clip.config import ClipConfig
from fastclip.clip.convert import FASTCLIP, OPENCLIP, TRANSFORMERS, Layout
from fastclip.clip.convert_config import config_from_shapes, from_openclip, from_transformers

CONFIG, WEIGHTS = "config.json", "model.safetensors"


@dataclass(frozen=True)
class Source:
    """What a checkpoint holds. `stated`: the configuration comes from JSON, and not from the shapes."""

    path: Path
    state: dict[str, torch.Tensor]
    layout: Layout
    config: ClipConfig
    stated: bool


@dataclass(frozen=True)
class _Kind:
    """How a layout shows: in a folder its configuration, whose JSON `is_it`; in a state dict a name it always has."""

    layout: Layout
    config: str
    is_it: Callable[[Mapping[str, Any]], bool]
    parse: Callable[[Mapping[str, Any]], ClipConfig]
    weights: tuple[str, ...]
    name: str


_KINDS = (
    _Kind(FASTCLIP, CONFIG, lambda v: "image" in v, ClipConfig.from_dict, (WEIGHTS,), "log_scale"),
    _Kind(
        OPENCLIP,
        "open_clip_config.json",
        lambda v: "model_cfg" in v,
        lambda v: from_openclip(v["model_cfg"]),
        ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
        "token_embedding.weight",
    ),
    _Kind(
        TRANSFORMERS,
        CONFIG,
        lambda v: "model_type" in v,
        from_transformers,
        (WEIGHTS, "pytorch_model.bin"),
        "text_model.embeddings.token_embedding.weight",
    ),
)


def read(path: Path) -> Source:
    """Tensors, layout and configuration. FileNotFoundError, or ValueError that names the file and the reason."""
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder: {path}")
    return _read_folder(path) if path.is_dir() else _read_file(path)


def _read_folder(folder: Path) -> Source:
    for kind in _KINDS:
        weights = [folder / name for name in kind.weights if (folder / name).is_file()]
        if weights and (config := _stated(kind, folder)):
            return Source(weights[0], read_tensors(weights[0]), kind.layout, config, stated=True)
    known = "; ".join(f"{' or '.join(kind.weights)} with {kind.config} ({kind.layout.name})" for kind in _KINDS)
    raise ValueError(f"{folder} holds no checkpoint in one file: expected {known}")


def _read_file(path: Path) -> Source:
    state = read_tensors(path)
    kind = next((kind for kind in _KINDS if kind.name in state), None)
    if kind is None:
        raise ValueError(f"{path} holds no CLIP model of a known layout; it has {', '.join(list(state)[:6])}, ...")
    if config := _stated(kind, path.parent):
        return Source(path, state, kind.layout, config, stated=True)
    if kind.layout is not OPENCLIP:
        raise ValueError(f"{path} is in {kind.layout.name}'s layout: its {kind.config} must be in the same folder")
    return Source(path, state, kind.layout, config_from_shapes(state, openai=is_torchscript(path)), stated=False)


def _stated(kind: _Kind, folder: Path) -> ClipConfig | None:
    """The configuration beside the weights, if it is of this kind."""
    path = folder / kind.config
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return kind.parse(values) if kind.is_it(values) else None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be used: {error}") from error


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in a file, on the CPU, without what training put round it. ValueError if it cannot be read."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        elif is_torchscript(path):
            state = read_torchscript(path)
        else:
            # A training checkpoint is mostly optimiser state: mapped, that is never read.
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged file makes the readers fail in any way
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{path} cannot be read as a checkpoint: {reason[0]}") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state dict")
    return unwrapped(state)


def unwrapped(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without the prefixes of DistributedDataParallel, torch.compile and OpenCLIP's CustomTextCLIP."""
    for prefix in ("module.", "_orig_mod."):
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    if "text.token_embedding.weight" in state:
        state = {name.removeprefix("text."): tensor for name, tensor in state.items()}
    return dict(state)
