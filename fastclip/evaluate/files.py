"""JSON and tensors, written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

import torch

from fastclip.data.cache import write_atomic


def save_json(path: Path, values: object) -> None:
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    # Names of files may hold halves of surrogate pairs, which are not UTF-8.
    write_atomic(path, lambda file: file.write(text.encode("utf-8", "backslashreplace")))


def printable(text: object) -> str:
    """For a terminal or a picture: "?" for control characters and for bytes of a file's name that are no text."""
    return "".join(c if c.isprintable() else "?" for c in str(text))


def left_out(skipped: Collection[str]) -> str:
    """A sentence about pictures, by name, that could not be read; at least one."""
    return f"Not readable, and left out: {len(skipped):,} (such as {printable(next(iter(skipped)))})."


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    from safetensors.torch import save

    data = save({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, metadata)
    write_atomic(path, lambda file: file.write(data))
