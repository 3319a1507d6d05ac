"""The glyphs as a source: black on white as in print, so that they go through the same preprocessing as any image."""

from __future__ import annotations

import numpy as np

from fastclip.data.glyphs import load_glyphs
from fastclip.data.report import DataReport
from fastclip.data.sample import Sample
from fastclip.errors import UserError


class GlyphSource:
    """Pictures of characters and their names; `split` is None (all faces), "train" or "test".

    UserError for an unknown split or face.
    """

    def __init__(self, size: int, split: str | None, held_out: tuple[str, ...]) -> None:
        self.problems = DataReport()
        glyphs = load_glyphs(size)
        if split not in (None, "train", "test"):
            raise UserError(f"the glyphs' splits are train and test, got {split!r}")
        if split is not None:
            try:
                glyphs = glyphs.split(held_out)[split == "test"]
            except ValueError as error:
                raise UserError(str(error)) from error
        self.glyphs = glyphs

    def __len__(self) -> int:
        return len(self.glyphs)

    def __getitem__(self, index: int) -> Sample:
        from PIL import Image

        glyphs = self.glyphs
        name = glyphs.names[glyphs.name_of[index]]
        picture = Image.fromarray(np.uint8(255) - glyphs.images[index])
        return Sample(f"{name} ({glyphs.faces[glyphs.face_of[index]]})", picture, [name])
