"""Pictures of characters and their Unicode names: real image-text pairs that need no download.

The fonts are those inside matplotlib's wheel (DejaVu and STIX; their free licences lie beside them). Each
character that a face draws is a picture; its caption is its Unicode name in lower case: "black chess queen".

Shapes: M pictures, K distinct names, F faces, S pixels a side.
"""

from __future__ import annotations

import hashlib
import unicodedata
import zipfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from fastclip.data.cache import cache_dir, write_atomic

# The text faces and their bold and oblique cuts. Left out: the STIX size variants and non-Unicode faces,
# TeX's cm* (their code points are not Unicode's) and the last-resort font (boxes).
FACES = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSans-BoldOblique",
    "DejaVuSansDisplay",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSansMono-Oblique",
    "DejaVuSansMono-BoldOblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-Italic",
    "DejaVuSerif-BoldItalic",
    "DejaVuSerifDisplay",
    "STIXGeneral",
    "STIXGeneralBol",
    "STIXGeneralItalic",
    "STIXGeneralBolIta",
)

# Part of the cache's key: raise it when render_face changes what it draws.
RENDERING = 1


@dataclass(frozen=True)
class Glyphs:
    """`images` uint8 [M, S, S], ink 255 on 0; `name_of`, `face_of` int64 [M] count in `names`, `faces`."""

    images: np.ndarray
    name_of: np.ndarray
    face_of: np.ndarray
    names: tuple[str, ...]
    faces: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    def fingerprint(self) -> str:
        """Same pictures with the same names in the same order: same string."""
        parts = (self.images, self.name_of, self.face_of, "\n".join((*self.names, *self.faces)).encode())
        return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()

    def only(self, faces: Iterable[str]) -> Glyphs:
        """The pictures drawn by `faces`; names and faces keep their numbers."""
        return self.take(self.drawn_by(faces))

    def gallery(self, faces: Iterable[str]) -> Glyphs:
        """All pictures of `faces`, and one by another face of each name that they lack."""
        first = np.unique(self.name_of, return_index=True)[1]
        chosen = self.drawn_by(faces)
        chosen[first[~np.isin(self.name_of[first], self.name_of[chosen])]] = True
        return self.take(chosen)

    def drawn_by(self, faces: Iterable[str]) -> np.ndarray:
        """bool [M]: the pictures of `faces`."""
        return np.isin(self.face_of, [self.faces.index(face) for face in faces])

    def take(self, rows: np.ndarray) -> Glyphs:
        """The pictures at `rows`; names and faces keep their numbers."""
        return Glyphs(self.images[rows], self.name_of[rows], self.face_of[rows], self.names, self.faces)

    def split(self, held_out: Iterable[str]) -> tuple[Glyphs, Glyphs]:
        """(pictures of all other faces, pictures of the `held_out` faces). ValueError for an unknown face."""
        held_out = tuple(held_out)
        if unknown := [face for face in held_out if face not in self.faces]:
            raise ValueError(f"unknown face {unknown[0]!r}; the faces are {', '.join(self.faces)}")
        return self.only(face for face in self.faces if face not in held_out), self.only(held_out)


def font_path(face: str) -> Path:
    """The font file of `face` in the installed matplotlib."""
    from matplotlib import get_data_path

    return Path(get_data_path(), "fonts", "ttf", f"{face}.ttf")


def render_face(path: Path, size: int) -> tuple[np.ndarray, list[str]]:
    """(uint8 [G, size, size], names [G]) of every named character that the font draws with some ink.

    All glyphs of a face share one scale and one baseline, so that "small" and "capital", "superscript" and
    "subscript" stay visible; a glyph too large for the square is shrunk until it fits.
    """
    from fontTools.ttLib import TTFont
    from PIL import Image, ImageDraw, ImageFont

    with TTFont(path, lazy=True) as font:
        characters = [chr(code) for code in sorted(font.getBestCmap())]
    em = round(size * 0.72)
    fonts = {em: ImageFont.truetype(path, em, layout_engine=ImageFont.Layout.BASIC)}
    images, names = [], []
    for character in characters:
        name = unicodedata.name(character, "")
        left, top, right, bottom = fonts[em].getbbox(character, anchor="ls")
        if not name or right <= left or bottom <= top:
            continue
        shrunk = max(4, int(em * min(1.0, size / max(right - left, bottom - top))))
        if shrunk not in fonts:
            fonts[shrunk] = ImageFont.truetype(path, shrunk, layout_engine=ImageFont.Layout.BASIC)
        left, top, right, bottom = fonts[shrunk].getbbox(character, anchor="ls")
        # Centred across; on the baseline at 3/4 of the height unless that would cut the glyph.
        x = (size - (right - left)) // 2 - left
        y = min(max(round(size * 0.74), -top), max(size - bottom, -top))
        canvas = Image.new("L", (size, size))
        ImageDraw.Draw(canvas).text((x, y), character, fill=255, font=fonts[shrunk], anchor="ls")
        image = np.asarray(canvas)
        if image.any():
            images.append(image)
            names.append(name.lower())
    return np.stack(images), names


def load_glyphs(size: int = 32, faces: Iterable[str] = FACES, cache: Path | None = None) -> Glyphs:
    """All glyphs of `faces`, `size` pixels a side: from the cache, or rendered (seconds) and put there.

    The cache key holds the versions that decide what is drawn. A file that cannot be read is rendered anew; a
    cache that cannot be written is done without.
    """
    faces = tuple(faces)
    versions = [f"{package}={version(package)}" for package in ("matplotlib", "pillow", "fonttools")]
    key = "|".join([f"rendering={RENDERING}", f"unicode={unicodedata.unidata_version}", *versions, str(size), *faces])
    path = (cache or cache_dir()) / f"glyphs-{size}px-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
    unreadable = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)
    with suppress(*unreadable), path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
        arrays = stored["images"], stored["name_of"], stored["face_of"]
        if len({len(array) for array in arrays}) == 1:
            return Glyphs(*arrays, tuple(stored["names"].tolist()), faces)
    glyphs = _render(faces, size)
    arrays = {"images": glyphs.images, "name_of": glyphs.name_of, "face_of": glyphs.face_of}
    with suppress(OSError):
        write_atomic(path, lambda file: np.savez(file, names=np.array(glyphs.names), **arrays))
    return glyphs


def _render(faces: tuple[str, ...], size: int) -> Glyphs:
    rendered = [render_face(font_path(face), size) for face in faces]
    names = sorted({name for _, face_names in rendered for name in face_names})
    number = {name: i for i, name in enumerate(names)}
    return Glyphs(
        images=np.concatenate([images for images, _ in rendered]),
        name_of=np.array([number[name] for _, face_names in rendered for name in face_names], dtype=np.int64),
        face_of=np.repeat(np.arange(len(faces)), [len(images) for images, _ in rendered]),
        names=tuple(names),
        faces=faces,
    )
