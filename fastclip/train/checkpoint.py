"""A trained model as a folder: weights in safetensors, configuration and tokenizer in JSON. Never pickle.

model.safetensors is written last: a folder that has it has the rest.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from fastclip.clip.config import ClipConfig
from fastclip.clip.model import Clip
from fastclip.clip.tokenizer import BpeTokenizer
from fastclip.data.cache import write_atomic
from fastclip.errors import UserError

CONFIG, TOKENIZER, WEIGHTS = "config.json", "tokenizer.json", "model.safetensors"


def save_json(path: Path, values: object) -> None:
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    write_atomic(path, lambda file: file.write(text.encode()))


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    from safetensors.torch import save

    data = save({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, metadata)
    write_atomic(path, lambda file: file.write(data))


def save_model(folder: Path, model: Clip, tokenizer: BpeTokenizer) -> None:
    """Write the three files into `folder`, each all or nothing."""
    save_json(folder / CONFIG, model.config.to_dict())
    write_atomic(folder / TOKENIZER, lambda file: file.write(tokenizer.to_json().encode()))
    save_tensors(folder / WEIGHTS, model.state_dict())


def load_model(folder: Path) -> tuple[Clip, BpeTokenizer]:
    """The model in evaluation mode, and its tokenizer. UserError when there is none, or it cannot be read."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    if not (folder / WEIGHTS).is_file():
        raise UserError(
            f"no checkpoint in {folder}: {WEIGHTS} is missing; make one with `fastclip demo --out {folder}`"
        )
    try:
        config = ClipConfig.from_dict(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
        tokenizer = BpeTokenizer.load(folder / TOKENIZER, config.text.context)
        model = Clip(config)
        model.load_state_dict(load_file(folder / WEIGHTS))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"the checkpoint in {folder} cannot be read: {reason}") from error
    return model.eval(), tokenizer
