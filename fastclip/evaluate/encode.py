"""Features of many pictures and texts: normalised float32 [N, D] on the CPU. Nothing here builds an N x N matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from fastclip.errors import UserError
from fastclip.evaluate.loaded import LoadedModel
from fastclip.evaluate.progress import progress

if TYPE_CHECKING:
    from PIL import Image

    Picture = str | Path | bytes | Image.Image


@dataclass(frozen=True)
class Reading:
    """How pictures are read: `batch` encoded at a time, `workers` processes that decode (0: this one does).

    More than the share `max_skipped` that cannot be read is an error.
    """

    batch: int = 64
    workers: int = 0
    max_skipped: float = 0.1

    def check(self, reasons: Sequence[str], total: int) -> None:
        """UserError if so many of `total` pictures cannot be used, for these reasons."""
        if len(reasons) > self.max_skipped * total:
            raise UserError(
                f"{len(reasons):,} of {total:,} pictures cannot be used, more than the {self.max_skipped:.0%} that "
                f"--max-skipped allows; the first: {reasons[0]}"
            )


READING = Reading()


@dataclass(frozen=True)
class Encoded:
    """`features` [K, D] of the pictures that could be read; `kept` int64 [K]: which they are; `skipped`: why not."""

    features: torch.Tensor
    kept: torch.Tensor
    skipped: dict[int, str]


class Pictures(Dataset):
    """Picture i as a tensor, or the reason why it cannot be read."""

    def __init__(self, pictures: Sequence[Picture], preprocess: Callable[[Image.Image], torch.Tensor]) -> None:
        self.pictures, self.preprocess = pictures, preprocess

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> torch.Tensor | str:
        from PIL import Image

        from fastclip.data.images import BadImage, read_image

        try:
            picture = self.pictures[index]
            return self.preprocess(picture if isinstance(picture, Image.Image) else read_image(picture))
        except (BadImage, OSError) as error:
            return str(error)


@torch.inference_mode()
def encode(tower: Callable[[torch.Tensor], torch.Tensor], inputs: torch.Tensor, chunk: int = 512) -> torch.Tensor:
    """Normalised features [N, D] of `inputs` [N, ...], a chunk at a time, where the inputs are."""
    return torch.cat([F.normalize(tower(part), dim=1) for part in inputs.split(chunk)])


@torch.inference_mode()
def encode_images(loaded: LoadedModel, pictures: Sequence[Picture], reading: Reading = READING) -> Encoded:
    """Features of `pictures`: paths, bytes of files, or PIL images.

    UserError when too many cannot be read, or when the model's features are not finite.
    """
    data = Pictures(pictures, loaded.preprocess)
    stream = DataLoader(data, reading.batch, collate_fn=list, num_workers=reading.workers)
    features = [torch.zeros(0, loaded.model.config.embed_dim)]
    kept, skipped, position = [], {}, 0
    for part in progress(stream, "pictures"):
        good = []
        for index, tensor in enumerate(part, position):
            if isinstance(tensor, str):
                skipped[index] = tensor
            else:
                good.append(tensor)
                kept.append(index)
        position += len(part)
        if good:
            images = torch.stack(good).to(loaded.device, loaded.dtype)
            features.append(finite(loaded.model.encode_image(images), loaded))
    reading.check(list(skipped.values()), len(pictures))
    return Encoded(torch.cat(features), torch.tensor(kept, dtype=torch.int64), skipped)


@torch.inference_mode()
def encode_texts(loaded: LoadedModel, texts: Sequence[str], *, batch: int = 256) -> torch.Tensor:
    """Features [N, D] of `texts`, at least one. UserError when they are not finite."""
    starts = range(0, len(texts), batch)
    parts = []
    for start in progress(starts, "texts"):
        ids = loaded.tokenizer(list(texts[start : start + batch])).to(loaded.device)
        parts.append(finite(loaded.model.encode_text(ids), loaded))
    return torch.cat(parts)


def finite(features: torch.Tensor, loaded: LoadedModel) -> torch.Tensor:
    """Normalised, float32, on the CPU."""
    features = F.normalize(features.float(), dim=1).cpu()
    if not features.isfinite().all():
        raise UserError(f"the model {loaded.path} gives features that are not finite: its weights are damaged")
    return features
