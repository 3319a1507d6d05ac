"""Models from checkpoints, of fastclip and of others, and back to files."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch.nn import functional as F

from fastclip.clip.config import ClipConfig, ConvConfig
from fastclip.clip.convert import OPENCLIP, TRANSFORMERS
from fastclip.clip.convert_config import to_openclip, to_transformers
from fastclip.clip.model import Clip
from fastclip.clip.sources import CONFIG, WEIGHTS, Source, read
from fastclip.clip.zoo import QUICK_GELU, model_config, override
from fastclip.data.cache import write_atomic

POSITIONS = ("image.positions", "image.pool.positions")


def load(
    path_or_dir: str | Path,
    *,
    name: str | None = None,
    quick_gelu: bool | None = None,
    image_size: int | None = None,
    patch_dropout: float | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Clip:
    """A model in evaluation mode from a checkpoint; the layout is recognised.

    - a folder of `save`, of OpenCLIP (open_clip_config.json) or of transformers (config.json), in one file of weights
    - a file: OpenAI's TorchScript archive or its state dict; OpenCLIP's .pt, .bin or .safetensors, with or without
      its optimiser; a .safetensors or .bin of the folders above, if its configuration is beside it

    name: what it must be, as in create_model; None accepts what the configuration or the shapes say.
    quick_gelu: the activation of both transformers. None: as the configuration says; without one, QuickGELU for
      OpenAI's checkpoints and names with -quickgelu, GELU for the rest, whose files do not tell.
    image_size: another resolution than the checkpoint's; the learnt positions are interpolated.
    patch_dropout: of a ViT that is to be trained on; None: as the configuration says.
    device, dtype: of the result, the CPU and float32 if None. The logit scale and bias are always float32.

    No code from the file is run: pickles are read with weights_only=True, and of a TorchScript archive only the
    tensors, never its program (archive.py). CheckpointMismatchError (a ValueError) lists missing and unexpected names
    and wrong shapes; ValueError for a file that cannot be read; FileNotFoundError for none.
    """
    source = read(Path(path_or_dir))
    config = _config(source, name, quick_gelu)
    state = _fitted(source, config)
    if image_size not in (None, config.image.image_size):
        config, state = _resized(config, state, image_size)
    if patch_dropout is not None:
        config = override(config, patch_dropout=patch_dropout)
    model = _on_meta(config).to(dtype or torch.float32)
    for scalar in (model.log_scale, model.logit_bias):
        if scalar is not None:
            scalar.data = scalar.data.float()
    model.to_empty(device=device or "cpu")
    model.load_state_dict(state)
    return model.eval()


def save(model: Clip, folder: str | Path) -> None:
    """config.json and model.safetensors into `folder`, each all or nothing; the weights last. `load` reads them."""
    _write(Path(folder), model.config.to_dict(), model.state_dict())


def export_openclip(model: Clip) -> dict[str, torch.Tensor]:
    """A copy of the weights under OpenCLIP's names, for load_state_dict(strict=True) of the same model there.

    open_clip.create_model("ViT-B-32") is the model of create_model("ViT-B/32"); "-quickgelu" goes with quick_gelu. Any
    other is open_clip.CLIP(**openclip_config(model.config)). ValueError for a model that OpenCLIP cannot build.
    """
    to_openclip(model.config)
    state = OPENCLIP.to(model.state_dict())
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}


def export_transformers(model: Clip, folder: str | Path) -> None:
    """config.json and model.safetensors for transformers.CLIPModel.from_pretrained(folder).

    ValueError for a model that transformers cannot build: it has no ResNets, and no other text tower than CLIP's.
    """
    _write(Path(folder), to_transformers(model.config), TRANSFORMERS.to(model.state_dict()))


def _write(folder: Path, config: dict[str, object], state: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import save as to_bytes

    text = json.dumps(config, indent=2) + "\n"
    # transformers reads no file without this entry.
    data = to_bytes({name: tensor.contiguous() for name, tensor in state.items()}, {"format": "pt"})
    write_atomic(folder / CONFIG, lambda file: file.write(text.encode()))
    write_atomic(folder / WEIGHTS, lambda file: file.write(data))


def _on_meta(config: ClipConfig) -> Clip:
    with torch.device("meta"):
        return Clip(config)


def _fitted(source: Source, config: ClipConfig) -> dict[str, torch.Tensor]:
    """The weights under fastclip's names. CheckpointMismatchError unless they are exactly those of `config`."""
    # OpenCLIP's logit scale is [1] in some files.
    scalars = {n: t.reshape(()) for n, t in source.state.items() if n in ("logit_scale", "logit_bias")}
    return source.layout.back({**source.state, **scalars}, _on_meta(config).state_dict(), str(source.path))


def _config(source: Source, name: str | None, quick_gelu: bool | None) -> ClipConfig:
    config = source.config
    if name is not None:
        named = model_config(name, init_bias=config.init_bias)
        _fitted(source, named)
        if not source.stated:
            # The shapes do not tell the heads, the name does; neither tells all about the activation.
            quick = getattr(config.text, "quick_gelu", False) or name.endswith(QUICK_GELU)
            config = override(named, quick_gelu=quick)
    return config if quick_gelu is None else override(config, quick_gelu=quick_gelu)


def _resized(
    config: ClipConfig, state: dict[str, torch.Tensor], image_size: int
) -> tuple[ClipConfig, dict[str, torch.Tensor]]:
    """Both for images of another size: the learnt positions are interpolated, as OpenCLIP does it for its ViTs."""
    if isinstance(config.image, ConvConfig):
        raise ValueError(f"this image tower is for {config.image.image_size} pixels only, got image_size={image_size}")
    config = override(config, image_size=image_size)
    shapes = _on_meta(config).state_dict()
    name = next(name for name in POSITIONS if name in state)
    side = round((len(shapes[name]) - 1) ** 0.5)
    return config, {**state, name: resize_positions(state[name], side)}


def resize_positions(positions: torch.Tensor, side: int) -> torch.Tensor:
    """[1 + s^2, W] -> [1 + side^2, W] float32, bicubic with antialiasing; the first, the class token's, stays."""
    positions = positions.float()
    first, grid = positions[:1], positions[1:]
    before = round(len(grid) ** 0.5)
    grid = grid.T.unflatten(1, (before, before)).unsqueeze(0)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([first, grid[0].flatten(1).T])
