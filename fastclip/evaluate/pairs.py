"""Retrieval on pairs of pictures and captions: a table, a folder, a Hugging Face data set or the glyphs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from fastclip.data.config import DataConfig
from fastclip.data.images import BadImage
from fastclip.data.rows import Source
from fastclip.data.sample import BadSample, to_text
from fastclip.data.sources import kind_of, open_rows
from fastclip.errors import UserError
from fastclip.evaluate.encode import READING, Reading, encode_images, encode_texts
from fastclip.evaluate.loaded import LoadedModel
from fastclip.evaluate.progress import progress
from fastclip.evaluate.retrieval import retrieval_figures

if TYPE_CHECKING:
    from fastclip.evaluate.encode import Picture


class SamplePictures(Sequence):
    """The pictures of a source's samples at `rows`, each read when it is asked for. Indexing raises BadImage."""

    def __init__(self, source: Source, rows: Sequence[int]) -> None:
        self.source, self.rows = source, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Picture:
        try:
            image = self.source[self.rows[index]].image
        except BadSample as error:
            raise BadImage(str(error)) from error
        if image is None:
            raise BadImage("the picture is missing")
        return image


def evaluate_pairs(
    loaded: LoadedModel, data: DataConfig, reading: Reading = READING, *, limit: int | None = None
) -> dict[str, Any]:
    """retrieval_figures of the samples of `data`, all their captions counted, and how many could not be used.

    limit: at most so many samples, spread over all. UserError for a source that cannot be read in any order (tar
    shards), or of which too many samples cannot be used.
    """
    if kind_of(data) == "shards":
        raise UserError("retrieval is measured on a table, a folder, a saved data set or the glyphs, not on tar shards")
    source = open_rows(data)
    rows, texts = [], []
    wanted = range(0, len(source), max(1, -(-len(source) // (limit or len(source)))))
    for row in progress(wanted, "captions"):
        if found := captions_of(source, row):
            rows.append(row)
            texts.append(found)
    encoded = encode_images(loaded, SamplePictures(source, rows), replace(reading, max_skipped=1.0))
    reasons = [*encoded.skipped.values(), *["no caption"] * (len(wanted) - len(rows))]
    reading.check(reasons, len(wanted))
    if not len(encoded.kept):
        raise UserError(f"none of the {len(wanted):,} samples can be used; the first: {reasons[0]}")
    kept = [texts[i] for i in encoded.kept.tolist()]
    owner = torch.repeat_interleave(torch.tensor([len(found) for found in kept]))
    features = encode_texts(loaded, [text for found in kept for text in found])
    return retrieval_figures(encoded.features, features, owner) | {"skipped": len(reasons)}


def captions_of(source: Source, row: int) -> list[str]:
    """The captions of a sample that say something; none if it cannot be read."""
    try:
        return [text for caption in source[row].captions if caption is not None and (text := to_text(caption)[0])]
    except BadSample:
        return []


def describe(figures: dict[str, Any], source: str) -> str:
    """Lines to print."""
    lines = [f"{figures['images']:,} pictures and {figures['texts']:,} captions of {source}:"]
    for way in ("text_to_image", "image_to_text"):
        values = figures[way]
        recalls = ", ".join(f"{name} {value:.3f}" for name, value in values.items() if name.startswith("recall"))
        lines.append(f"  {way.replace('_', ' ')}  {recalls}, median rank {values['median rank']:,.0f}")
    if figures["skipped"]:
        lines.append(f"  Not usable, and left out: {figures['skipped']:,}")
    return "\n".join(lines)
