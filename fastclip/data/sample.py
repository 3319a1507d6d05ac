"""One sample: as a source gives it, and as a batch takes it.

The bytes come from strangers. Only images (through read_image, which looks at the header's size before it decodes) and
text are ever decoded; file and member names are labels.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fastclip.data.report import DataReport

if TYPE_CHECKING:
    from PIL import Image

IMAGE_TYPES = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "avif"})
TEXT_TYPES = frozenset({"txt", "json"})
# More than any image or caption needs, so that a lying size cannot fill the memory. Bytes.
LARGEST_IMAGE = 256 * 2**20
LARGEST_TEXT = 2**20


class BadSample(ValueError):  # noqa: N818
    """A sample that cannot be used: `kind` is one of report.SKIPPED, the message names it."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Sample:
    """`name` for the report; an encoded image, or one that is decoded already; captions, any of which will do."""

    name: str
    image: bytes | Image.Image | None
    captions: Sequence[str | bytes | None]


@dataclass(frozen=True)
class Decoder:
    """Sample -> (image float32 [C, S, S], caption).

    `transform` is called with an RGB PIL image, and with a torch.Generator too if it has a parameter `generator`; if
    not, it may use torch's global generator, which is seeded for it and then put back.
    """

    transform: Callable[..., torch.Tensor]
    takes_generator: bool

    @classmethod
    def of(cls, transform: Callable[..., torch.Tensor]) -> Decoder:
        named = signature(transform).parameters.get("generator")
        by_name = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
        return cls(transform, named is not None and named.kind in by_name)

    def __call__(self, sample: Sample, generator: torch.Generator, report: DataReport) -> tuple[torch.Tensor, str]:
        """BadSample for what cannot be used; what was mended goes into the report."""
        caption = draw_caption(sample, generator, report)
        image = open_image(sample)
        if self.takes_generator:
            return self.transform(image, generator=generator), caption
        # Not torch.manual_seed, which prepares seeds for GPUs too: it takes longer than decoding a small image.
        before = torch.default_generator.get_state()
        torch.default_generator.manual_seed(generator.initial_seed())
        try:
            return self.transform(image), caption
        finally:
            torch.default_generator.set_state(before)


def open_image(sample: Sample) -> Image.Image:
    """The sample's picture in mode RGB. BadSample for one that is missing, damaged or too large."""
    if sample.image is None:
        raise BadSample("missing image", sample.name)
    if not isinstance(sample.image, bytes):
        return sample.image.convert("RGB")
    from fastclip.data.images import BadImage, read_image

    try:
        return read_image(sample.image)
    except BadImage as error:
        raise BadSample("bad image", f"{sample.name}: {error}") from error


def draw_caption(sample: Sample, generator: torch.Generator, report: DataReport) -> str:
    """One of the captions that are not blank, in single spaces; bytes that are not UTF-8 are replaced and counted."""
    captions = [caption for caption in sample.captions if caption is not None]
    if not captions:
        raise BadSample("missing caption", sample.name)
    texts = [text for text in map(to_text, captions) if text[0]]
    if not texts:
        raise BadSample("empty caption", sample.name)
    chosen = int(torch.randint(len(texts), (1,), generator=generator)) if len(texts) > 1 else 0
    text, damaged = texts[chosen]
    if damaged:
        report.add("bad UTF-8", sample.name)
    return text


def to_text(caption: str | bytes) -> tuple[str, bool]:
    """(text in single spaces, whether something in it was not Unicode)."""
    # A str may hold halves of surrogate pairs (JSON's "\\ud800"), which no tokenizer takes.
    encoded = caption.encode("utf-8", "surrogatepass") if isinstance(caption, str) else caption
    try:
        return " ".join(encoded.decode("utf-8-sig").split()), False
    except UnicodeDecodeError:
        return " ".join(encoded.decode("utf-8-sig", "replace").split()), True


def captions_in(extension: str, content: bytes, fields: Sequence[str]) -> list[str | bytes | None]:
    """Captions of a `txt` (the whole text is one) or `json` file: its fields' strings and lists of strings.

    A JSON list or string by itself counts as the field. Nothing usable: an empty list.
    """
    if extension == "txt":
        return [content]
    try:
        # Python refuses integers of very many digits; no number is used. Bad bytes become what to_text counts.
        value = json.loads(content.decode("utf-8-sig", "surrogateescape"), parse_int=float)
    except (ValueError, RecursionError):
        return []
    values = [value.get(field) for field in fields] if isinstance(value, dict) else [value]
    return [text for value in values for text in strings(value)]


def strings(value: object) -> list[str]:
    """A string, or the strings of a list."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return [text for text in values if isinstance(text, str)]


def read_file(path: str | Path, largest: int) -> bytes:
    """The content of a regular file. BadSample for anything else, and for more than `largest` bytes."""
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise BadSample("unreadable file", f"{path}: not a regular file")
            if found.st_size > largest:
                raise BadSample("unreadable file", f"{path}: {found.st_size:,} bytes, at most {largest:,} are read")
            return file.read(largest)
    except (OSError, ValueError) as error:
        if isinstance(error, BadSample):
            raise
        reason = error.strerror if isinstance(error, OSError) else str(error)
        kind = "missing image" if isinstance(error, FileNotFoundError) else "unreadable file"
        raise BadSample(kind, f"{path}: {reason}") from error


def _without_waiting(path: str, flags: int) -> int:
    # A pipe would wait for a writer. Windows has no such flag.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
