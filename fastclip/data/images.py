"""Reading pictures that may be anything: RGB, or an error with the reason.

What becomes of the unusual: a palette, grey and CMYK are converted; alpha is laid on white; 16 bits keep their upper
8; EXIF's orientation is applied; of an animation the first frame counts; colour profiles are ignored, as by OpenAI.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

# Pillow can open more: some start other programs (EPS), some are rare and their decoders little used.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
# 3 bytes each once decoded: 192 MB. A file of 12 KB can claim any size; Pillow itself refuses above 178,956,970.
MAX_PIXELS = 64_000_000
# EXIF's tag, and what to do for each of its values; 1 is upright.
ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(ValueError):  # noqa: N818 - the reason, not the mistake, is the news
    """The picture cannot be used; the message says why."""


def read_image(source: str | Path | bytes | BinaryIO, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture in `source`: a path, the bytes of a file, or an open file; mode RGB, decoded, upright.

    The size is read from the header and refused above `max_pixels` before anything is decoded.
    BadImage for what is truncated, no picture, too large or of a kind without a defined RGB; OSError for a path that
    cannot be opened.
    """
    if isinstance(source, (str, Path)):
        with open(source, "rb") as file:
            try:
                return decode(file, max_pixels)
            except BadImage as error:
                raise BadImage(f"{source}: {error}") from error.__cause__
    return decode(io.BytesIO(source) if isinstance(source, bytes) else source, max_pixels)


def decode(file: BinaryIO, max_pixels: int) -> Image.Image:
    try:
        with Image.open(file, formats=known_formats()) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise BadImage(f"{width} x {height} is more than {max_pixels:,} pixels")
            return to_rgb(upright(image))
    except (BadImage, MemoryError):
        raise
    except Image.UnidentifiedImageError as error:
        raise BadImage("not a picture in any known format") from error
    except Exception as error:  # Pillow's decoders raise almost anything on damaged files
        raise BadImage(f"{type(error).__name__}: {error}") from error


def known_formats() -> list[str]:
    """Those of FORMATS that this Pillow was built with."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def upright(image: Image.Image) -> Image.Image:
    """Decoded, and turned as EXIF says; damaged EXIF says nothing."""
    image.load()
    try:
        orientation = image.getexif().get(ORIENTATION)
    except Exception:  # as above: a damaged tag raises almost anything, and the picture is whole
        return image
    return image.transpose(TURNS[orientation]) if orientation in TURNS else image


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode with a defined range -> a copy in RGB. BadImage for floats and for integers above 16 bits."""
    if image.mode == "F" or image.mode.startswith("I"):
        image = eight_bits(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        picture = image.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return image.convert("RGB") if image.mode != "RGB" else image.copy()


def eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits -> mode L, where convert("RGB") would clip all above 255 to white."""
    values = np.asarray(image)
    if values.dtype.kind == "f" or values.min() < 0 or values.max() > 0xFFFF:
        raise BadImage(f"mode {image.mode} with values beyond 16 bits has no defined RGB")
    return Image.fromarray((values >> 8).astype(np.uint8))
