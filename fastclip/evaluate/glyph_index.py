"""Search among the pictures of characters: the gallery of the demo."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fastclip.clip.model import Clip
from fastclip.data.glyphs import Glyphs
from fastclip.data.pairs import to_float
from fastclip.errors import UserError
from fastclip.evaluate.drawing import Tile, draw_gallery
from fastclip.evaluate.encode import encode
from fastclip.evaluate.files import save_tensors

INDEX = "index.safetensors"
LEGEND = "green: the name asked for · solid: a face never trained on · dashed: a trained one · number: cosine"


@dataclass(frozen=True)
class Found:
    """One picture that a search found: `image` uint8 [S, S], ink 255 on 0; `score` is the cosine."""

    name: str
    face: str
    score: float
    image: np.ndarray
    held_out: bool

    def tile(self, query: str) -> Tile:
        """As ink on paper, green where it is what the query names."""
        right = self.name == query.strip().lower()
        return Tile(255 - self.image, self.name, self.score, right=right, dashed=not self.held_out)


@dataclass(frozen=True)
class GlyphIndex:
    """`features` float32 [M, D], normalised, of `glyphs`' pictures; `trained` bool [F]: faces trained on.

    The pictures are those of the faces never trained on, and one of each character that they lack.
    """

    glyphs: Glyphs
    features: torch.Tensor
    trained: np.ndarray

    @classmethod
    def build(cls, model: Clip, glyphs: Glyphs, held_out: Iterable[str]) -> GlyphIndex:
        held_out = tuple(held_out)
        shown = glyphs.gallery(held_out)
        features = encode(model.encode_image, to_float(shown.images))
        return cls(shown, features, np.array([face not in held_out for face in glyphs.faces]))

    def save(self, path: Path) -> None:
        """Features in float16; the pictures themselves stay in the cache, named by their fingerprint."""
        tensors = {"features": self.features.half(), "trained": torch.from_numpy(self.trained)}
        save_tensors(path, tensors, {"glyphs": self.glyphs.fingerprint()})

    @classmethod
    def load(cls, path: Path, glyphs: Glyphs, model: Clip) -> GlyphIndex:
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


def glyph_gallery(answers: Sequence[tuple[str, Sequence[Found]]], path: Path, title: str) -> None:
    """One row of characters for each query, as a PNG."""
    rows = [(query, [hit.tile(query) for hit in found]) for query, found in answers]
    draw_gallery(rows, path, title, LEGEND)
