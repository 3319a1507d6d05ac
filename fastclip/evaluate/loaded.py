"""A model with what goes before it: its tokenizer and its preprocessing."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from fastclip import clip
from fastclip.clip.model import Clip
from fastclip.clip.tokenizer import Tokenizer, load_tokenizer
from fastclip.data.transform import Preprocess, preprocess_for
from fastclip.errors import UserError


@dataclass(frozen=True)
class LoadedModel:
    """`model` in evaluation mode; `tokenizer` and `preprocess` make its inputs; `path`: where it came from."""

    model: Clip
    tokenizer: Tokenizer
    preprocess: Preprocess
    path: Path

    @property
    def device(self) -> torch.device:
        return self.model.log_scale.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the image tower's weights, and so of the images it takes."""
        return next(self.model.image.parameters()).dtype

    def fingerprint(self) -> str:
        """Same weights, preprocessing and numbers of the configuration: same string."""
        seen = hashlib.sha256(repr((self.model.config, sorted(vars(self.preprocess).items()))).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            seen.update(name.encode())
            seen.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return seen.hexdigest()


def open_model(path: str | Path, *, name: str | None = None, device: torch.device | str | None = None) -> LoadedModel:
    """The model in `path`: a folder that fastclip wrote, or any checkpoint that fastclip.clip.load reads.

    name: as in clip.load. device: the GPU if there is one, unless given. The tokenizer is the folder's (the file's
    folder's), else CLIP's. UserError, naming `path`, when there is none, it cannot be read, or they do not fit.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"no checkpoint in {path}: name one of yours, or make one with `fastclip demo --out {path}`")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model = clip.load(path, name=name, device=device)
    except (ValueError, OSError) as error:
        raise UserError(f"the checkpoint {path} cannot be used: {error}") from error
    text = model.config.text
    tokenizer = load_tokenizer(path if path.is_dir() else path.parent, text.context)
    if len(tokenizer) != text.vocabulary:
        raise UserError(f"{path} has {text.vocabulary:,} token embeddings, its tokenizer {len(tokenizer):,} ids")
    return LoadedModel(model, tokenizer, preprocess_for(model.config), path)
