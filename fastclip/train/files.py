"""Files of a run: a model folder, and what makes files durable and checkable."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch

from fastclip.clip.config import ClipConfig
from fastclip.clip.sources import CONFIG, WEIGHTS
from fastclip.clip.tokenizer import FILE as TOKENIZER
from fastclip.clip.tokenizer import Tokenizer
from fastclip.data.cache import write_atomic
from fastclip.evaluate.files import save_json


def save_model_folder(folder: Path, config: ClipConfig, tokenizer: Tokenizer, weights: dict[str, torch.Tensor]) -> None:
    """A model folder: configuration, tokenizer and, last, the weights, each all or nothing."""
    describe_model(folder, config, tokenizer)
    growing = folder / f".{WEIGHTS}"
    try:
        save_weights(growing, weights)
        flush(growing)
        os.replace(growing, folder / WEIGHTS)
    except BaseException:
        growing.unlink(missing_ok=True)
        raise


def describe_model(folder: Path, config: ClipConfig, tokenizer: Tokenizer) -> None:
    """config.json and tokenizer.json, each all or nothing."""
    save_json(folder / CONFIG, config.to_dict())
    write_atomic(folder / TOKENIZER, lambda file: file.write(tokenizer.to_json().encode()))


def save_weights(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A safetensors file, written from where the tensors are: no copy of them all. OSError if it cannot be."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        # transformers reads no file without this entry.
        save_file(contiguous(tensors), path, {"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error


def contiguous(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def load_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def seal(path: Path) -> dict[str, int | str]:
    """Flush a file to the disk; its size in bytes and SHA-256, as a manifest has them."""
    flush(path)
    return {"bytes": path.stat().st_size, "sha256": digest(path)}


def flush(path: Path) -> None:
    """Make a file's content durable."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def digest(path: Path) -> str:
    """SHA-256 of a file, a piece at a time."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**22):
            total.update(piece)
    return total.hexdigest()


def flush_folder(folder: Path) -> None:
    """Make a folder's new and renamed entries durable (POSIX; elsewhere folders cannot be opened)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
