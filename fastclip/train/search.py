"""Ask a trained model for pictures in words."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fastclip.clip.model import Clip
from fastclip.data.glyphs import Glyphs, load_glyphs
from fastclip.data.pairs import to_float
from fastclip.errors import UserError
from fastclip.train.checkpoint import load_model, save_tensors
from fastclip.train.evaluate import encode
from fastclip.train.report import Found, gallery

INDEX = "index.safetensors"


@dataclass(frozen=True)
class Index:
    """`features` float32 [M, D], normalised, of `glyphs`' pictures; `trained` bool [F]: faces trained on.

    The pictures are those of the faces never trained on, and one of each character that they lack.
    """

    glyphs: Glyphs
    features: torch.Tensor
    trained: np.ndarray

    @classmethod
    def build(cls, model: Clip, glyphs: Glyphs, held_out: Iterable[str]) -> Index:
        held_out = tuple(held_out)
        shown = glyphs.gallery(held_out)
        features = encode(model.encode_image, to_float(shown.images))
        return cls(shown, features, np.array([face not in held_out for face in glyphs.faces]))

    def save(self, path: Path) -> None:
        """Features in float16; the pictures themselves stay in the cache, named by their fingerprint."""
        tensors = {"features": self.features.half(), "trained": torch.from_numpy(self.trained)}
        save_tensors(path, tensors, {"glyphs": self.glyphs.fingerprint()})

    @classmethod
    def load(cls, path: Path, glyphs: Glyphs, model: Clip) -> Index:
        """From `path`; if it was made from other pictures than `glyphs`, those are encoded anew."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as stored:
                trained = stored.get_tensor("trained").numpy()
                features = stored.get_tensor("features").float()
                made_from = stored.metadata()["glyphs"]
        except (OSError, SafetensorError) as error:
            raise UserError(f"the index {path} cannot be read: {error}") from error
        held_out = [face for face, seen in zip(glyphs.faces, trained, strict=True) if not seen]
        shown = glyphs.gallery(held_out)
        if made_from != shown.fingerprint():
            return cls.build(model, glyphs, held_out)
        return cls(shown, features, trained)

    def find(self, query: torch.Tensor, top: int) -> list[Found]:
        """The `top` best names for `query` [D], each with its best picture."""
        scores = self.features @ query
        found: dict[int, Found] = {}
        for i in scores.argsort(descending=True, stable=True).tolist():
            name, face = int(self.glyphs.name_of[i]), int(self.glyphs.face_of[i])
            if name not in found:
                found[name] = Found(
                    self.glyphs.names[name],
                    self.glyphs.faces[face],
                    scores[i].item(),
                    self.glyphs.images[i],
                    not self.trained[face],
                )
            if len(found) == top:
                break
        return list(found.values())


def search(query: str, run: Path, top: int, out: Path | None) -> tuple[list[Found], Path]:
    """The `top` names whose pictures are closest to `query` for the model in `run`, and the PNG of them."""
    if not query.strip():
        raise UserError("the query is empty")
    if top < 1:
        raise UserError(f"--top must be at least 1, got {top}")
    model, tokenizer = load_model(run)
    glyphs = load_glyphs(model.config.image.image_size)
    index = Index.load(Path(run) / INDEX, glyphs, model)
    found = index.find(encode(model.encode_text, tokenizer(query))[0], top)
    slug = re.sub(r"[^a-z0-9]+", "-", query.lower()).strip("-")[:60] or "query"
    out = out or Path(run) / f"search-{slug}.png"
    gallery(
        [(query, found[:10])],
        out,
        f"fastclip search: {len(glyphs):,} pictures of {len(glyphs.names):,} characters",
    )
    return found, out
