"""Ask a model for pictures, in words or with a picture: among the characters of the demo, or in a folder."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fastclip.data.folder import extension
from fastclip.data.glyphs import load_glyphs
from fastclip.data.images import BadImage, read_image
from fastclip.data.sample import IMAGE_TYPES
from fastclip.errors import UserError
from fastclip.evaluate.drawing import Tile, draw_gallery
from fastclip.evaluate.encode import READING, Reading, encode_images, encode_texts
from fastclip.evaluate.files import save_json
from fastclip.evaluate.glyph_index import INDEX, LEGEND, Found, GlyphIndex
from fastclip.evaluate.index import FolderIndex, Hit, open_index
from fastclip.evaluate.loaded import LoadedModel, open_model

SHOWN = 10  # tiles of a gallery
THUMBNAIL = 256  # pixels of a tile's longer side


@dataclass(frozen=True)
class Query:
    """What is asked: `words`, or the picture in the file `picture`."""

    words: str
    picture: Path | None

    @classmethod
    def of(cls, text: str) -> Query:
        """A picture if `text` names a file of a picture's type. UserError if it is empty."""
        if not text.strip():
            raise UserError("the query is empty")
        path = Path(text)
        return cls(text, path if extension(path) in IMAGE_TYPES and path.is_file() else None)

    def features(self, loaded: LoadedModel) -> torch.Tensor:
        """[D], normalised. UserError for a picture that cannot be read."""
        if self.picture is None:
            return encode_texts(loaded, [self.words])[0]
        return encode_images(loaded, [self.picture], Reading(max_skipped=0.0)).features[0]

    def shown(self) -> str | np.ndarray:
        return self.words if self.picture is None else thumbnail(self.picture)

    def slug(self) -> str:
        """For the name of a file."""
        words = self.words if self.picture is None else self.picture.stem
        return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")[:60] or "query"


def search_glyphs(text: str, run: Path, top: int, out: Path | None) -> tuple[list[Found], Path]:
    """The `top` names whose pictures are closest to the query for the model in `run`, and the PNG of them.

    The PNG is `out`, or lies in `run`; a JSON of the same name lies beside it.
    """
    query, run = checked(text, top), Path(run)
    loaded = open_model(run, device="cpu")
    if not (run / INDEX).is_file():
        raise UserError(f"{run} has no gallery of characters ({INDEX}): name a folder of pictures with --images")
    glyphs = load_glyphs(loaded.model.config.image.image_size)
    index = GlyphIndex.load(run / INDEX, glyphs, loaded.model)
    found = index.find(query.features(loaded), top)
    out = out or run / f"search-{query.slug()}.png"
    title = f"fastclip search: {len(index.glyphs):,} pictures of {len(glyphs.names):,} characters"
    draw_gallery([(query.shown(), [hit.tile(query.words) for hit in found[:SHOWN]])], out, title, LEGEND)
    hits = [{"name": hit.name, "face": hit.face, "score": hit.score, "held_out": hit.held_out} for hit in found]
    save_json(out.with_suffix(".json"), {"query": text, "model": str(run), "found": hits})
    return found, out


def search_folder(
    text: str,
    loaded: LoadedModel,
    images: Path,
    top: int,
    out: Path | None,
    place: Path | None = None,
    reading: Reading = READING,
) -> tuple[list[Hit], FolderIndex, Path]:
    """The `top` pictures in the folder `images` that are closest to the query, the index, and the PNG of them.

    A query that is one of the pictures finds its neighbours, not itself. place: as for open_index. The PNG is `out`, or
    search-QUERY.png in runs/search; a JSON of the same name lies beside it.
    """
    query = checked(text, top)
    wanted = query.features(loaded)
    index = open_index(loaded, images, place, reading)
    hits = index.find(wanted, top, without=query.picture)
    out = out or Path("runs/search") / f"search-{query.slug()}.png"
    tiles = [Tile(thumbnail(hit.path), str(hit.path.relative_to(index.folder)), hit.score) for hit in hits[:SHOWN]]
    title = f"fastclip search: {len(index.features):,} pictures in {index.folder.name or index.folder}"
    draw_gallery([(query.shown(), tiles)], out, title, f"model: {loaded.path} · number: cosine")
    found = [{"path": str(hit.path), "score": hit.score} for hit in hits]
    values = {"query": text, "model": str(loaded.path), "images": str(index.folder), "found": found}
    save_json(out.with_suffix(".json"), values | {"skipped": index.skipped})
    return hits, index, out


def checked(text: str, top: int) -> Query:
    if top < 1:
        raise UserError(f"--top must be at least 1, got {top}")
    return Query.of(text)


def thumbnail(path: Path) -> np.ndarray:
    """uint8 [H, W, 3], at most THUMBNAIL pixels a side. UserError if it can no longer be read."""
    try:
        image = read_image(path)
    except BadImage as error:
        raise UserError(str(error)) from error
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return np.asarray(image)
