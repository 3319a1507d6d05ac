"""A folder of images, each with its captions beside it: cat.jpg and cat.txt (one caption) or cat.json."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from fastclip.data.report import DataReport
from fastclip.data.sample import (
    IMAGE_TYPES,
    LARGEST_IMAGE,
    LARGEST_TEXT,
    TEXT_TYPES,
    Sample,
    captions_in,
    read_file,
)
from fastclip.errors import UserError


class FolderSource:
    """Every image below `root`, by path; links to folders are not followed. UserError if there is none."""

    def __init__(self, root: str, fields: Sequence[str]) -> None:
        self.root, self.fields = Path(root), tuple(fields)
        self.problems = DataReport()
        try:
            walk = list(os.walk(root, onerror=_raise))
        except OSError as error:
            raise UserError(f"cannot list {root}: {error.strerror}") from error
        files = [Path(folder, name).relative_to(root) for folder, _, names in walk for name in names]
        self.images = sorted(str(path) for path in files if extension(path) in IMAGE_TYPES)
        texts = {str(path) for path in files if extension(path) in TEXT_TYPES}
        self.texts = [
            [text for kind in sorted(TEXT_TYPES) if (text := str(Path(image).with_suffix(f".{kind}"))) in texts]
            for image in self.images
        ]
        if not self.images:
            raise UserError(f"no images in {root} (looked for {', '.join(sorted(IMAGE_TYPES))})")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        captions = [caption for text in self.texts[index] for caption in self._captions(text)]
        return Sample(self.images[index], read_file(self.root / self.images[index], LARGEST_IMAGE), captions)

    def _captions(self, text: str) -> list[str | bytes | None]:
        return captions_in(extension(text), read_file(self.root / text, LARGEST_TEXT), self.fields)


def extension(path: str | Path) -> str:
    return Path(path).suffix[1:].lower()


def _raise(error: OSError) -> None:
    raise error
