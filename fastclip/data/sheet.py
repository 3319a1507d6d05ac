"""A contact sheet: some of the pictures of a data set with their captions below."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from fastclip.data.config import DataConfig
from fastclip.data.sample import BadSample, Sample, open_image, to_text
from fastclip.data.shard_files import expand
from fastclip.data.sources import kind_of, open_rows
from fastclip.data.tar import read_shard

if TYPE_CHECKING:
    from PIL import Image

COLUMNS, ROWS = 8, 5
# Pixels.
SIDE, MARGIN, TEXT_SIZE, LINE = 160, 12, 12, 15
TEXT_LINES = 3
INK, PAPER, GROUND = (40, 40, 40), (240, 240, 238), (222, 222, 219)

Example = tuple["Image.Image", str]


def examples(data: DataConfig, most: int = COLUMNS * ROWS) -> list[Example]:
    """(picture of at most SIDE pixels a side, first caption) of samples that can be used, spread over the data."""
    found: list[Example] = []
    for sample in _spread(data, most):
        try:
            texts = [text for caption in sample.captions if caption is not None and (text := to_text(caption)[0])]
            picture = open_image(sample)
        except BadSample:
            continue
        if texts:
            found.append((_thumbnail(picture), texts[0]))
    return found[:most]


def contact_sheet(pictures: Sequence[Example]) -> Image.Image:
    """Up to COLUMNS in a row; each picture whole, on a light ground, its caption in at most TEXT_LINES lines."""
    from PIL import Image, ImageDraw, ImageFont

    from fastclip.data.glyphs import font_path

    font = ImageFont.truetype(font_path("DejaVuSans"), TEXT_SIZE)
    columns = min(COLUMNS, len(pictures))
    rows = -(-len(pictures) // columns)
    across, down = SIDE + MARGIN, SIDE + MARGIN + TEXT_LINES * LINE + 6
    sheet = Image.new("RGB", (columns * across + MARGIN, rows * down + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    for place, (picture, caption) in enumerate(pictures):
        left, top = MARGIN + place % columns * across, MARGIN + place // columns * down
        draw.rectangle((left, top, left + SIDE - 1, top + SIDE - 1), fill=GROUND)
        sheet.paste(picture, (left + (SIDE - picture.width) // 2, top + (SIDE - picture.height) // 2))
        for i, line in enumerate(_lines(caption)):
            draw.text((left, top + SIDE + 4 + i * LINE), line, fill=INK, font=font)
    return sheet


def _spread(data: DataConfig, most: int) -> Iterator[Sample]:
    if kind_of(data) == "shards":
        urls = expand(data.sources)
        chosen = urls[:: max(1, len(urls) // most)][:most]
        for url in chosen:
            # Some more than needed, for those that cannot be used.
            samples = read_shard(url, data.captions, lambda kind, name: None)
            yield from islice(samples, 2 * -(-most // len(chosen)))
        return
    source = open_rows(data)
    for row in range(0, len(source), max(1, len(source) // most)):
        try:
            yield source[row]
        except BadSample:
            continue


def _thumbnail(picture: Image.Image) -> Image.Image:
    """At most SIDE pixels a side; tiny ones enlarged by a whole factor, so that their pixels show."""
    from PIL import Image

    longest = max(picture.size)
    if longest > SIDE:
        picture.thumbnail((SIDE, SIDE))
        return picture
    factor = SIDE // longest
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def _lines(caption: str) -> list[str]:
    # 7 pixels a letter on average; a line break in the middle of a long word is better than none.
    return textwrap.wrap(caption, SIDE // 7, max_lines=TEXT_LINES, placeholder=" …")
