"""Where pairs come from and in which order, as frozen data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastclip.errors import UserError

Kind = Literal["auto", "shards", "table", "hf", "folder", "glyphs"]


@dataclass(frozen=True)
class DataConfig:
    """Where pairs come from. See docs/data.md."""

    source: str | tuple[str, ...] = "glyphs"
    """`glyphs` (characters and their names); tar shards (`data-{000..099}.tar`, `*.tar`, a folder that `fastclip data
    pack` wrote; local or of any file system of fsspec); a .csv, .tsv or .parquet table; a folder that Hugging Face
    `datasets` saved; a folder of images with .txt or .json captions beside them."""
    kind: Kind = "auto"
    """What `source` is, where its name does not tell."""
    image: str | None = None
    """Column of the images: paths in a table (`path` if not given), images in a Hugging Face data set (`image`)."""
    captions: tuple[str, ...] = ("caption",)
    """Columns of a table, or fields of .json members and files, that hold captions: one of them is drawn each epoch."""
    root: str | None = None
    """Folder that a table's paths are relative to; the table's own if not given."""
    split: str | None = None
    """Of a Hugging Face data set with splits; of the glyphs `train` (without the held-out faces) or `test` (those)."""
    held_out: tuple[str, ...] = ("DejaVuSerif",)
    """Faces of the glyphs that the split `train` leaves out and `test` keeps."""
    glyph_size: int = 32
    """Pixels a side that glyphs are drawn with."""
    shuffle: bool = True
    """New order each epoch, from the seed."""
    resample: bool = False
    """Draw samples (from tar shards: shards) with replacement."""
    buffer: int = 1000
    """Samples of tar shards that each worker holds and mixes."""
    epoch_samples: int | None = None
    """Length of an epoch over all processes, where it is not, or is not to be, that of the data."""
    last: Literal["drop", "wrap", "keep"] = "drop"
    """Samples that do not fill a batch at an epoch's end: left out, filled up from its beginning, or a smaller batch
    (one process only; then samples that cannot be used are not replaced either: for evaluation)."""
    pair_ids: bool = False
    """Give equal captions of a batch equal ids, so that the loss does not take them for negatives of each other."""
    max_skipped: float = 0.1
    """Stop when more than this share of the samples cannot be used."""

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,) if isinstance(self.source, str) else tuple(self.source)

    def check(self) -> None:
        """UserError for settings that cannot be."""
        if not self.sources or not all(self.sources):
            raise UserError("--data.source is empty")
        if not self.captions:
            raise UserError("--data.captions needs at least one column or field")
        for name, value in {
            "glyph-size": self.glyph_size,
            "buffer": self.buffer,
            "epoch-samples": self.epoch_samples,
        }.items():
            if value is not None and value < 1:
                raise UserError(f"--data.{name} must be at least 1, got {value}")
        if not 0 <= self.max_skipped <= 1:
            raise UserError(f"--data.max-skipped is a share between 0 and 1, got {self.max_skipped}")
        if self.last == "keep" and self.resample:
            raise UserError("--data.last keep takes each sample once; it does not go with --data.resample")
