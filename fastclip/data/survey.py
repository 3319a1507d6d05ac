"""What is in a data set: counts, sizes, captions, duplicates, faults; as text, JSON and a contact sheet."""

from __future__ import annotations

import json
import time
from array import array
from collections import Counter
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from fastclip.data.batch import caption_ids
from fastclip.data.cache import write_atomic
from fastclip.data.config import DataConfig
from fastclip.data.report import DataReport
from fastclip.data.sample import BadSample, Sample, open_image, to_text
from fastclip.data.shard_files import changed_shards, expand
from fastclip.data.sheet import contact_sheet, examples
from fastclip.data.sources import kind_of
from fastclip.data.walk import walk
from fastclip.errors import UserError

SHARES = (0, 5, 50, 95, 100)
# Wider or higher than this by the other side.
EXTREME_RATIO = 3.0


@dataclass(frozen=True)
class Looked:
    """Of one sample: pixels, a digest of the image, the captions' digests, lengths, and whether any was damaged."""

    width: int
    height: int
    image: int
    captions: tuple[int, ...]
    characters: tuple[int, ...]
    words: tuple[int, ...]
    damaged: str | None


def look(sample: Sample) -> Looked:
    """BadSample for one that cannot be used."""
    texts = [to_text(caption) for caption in sample.captions if caption is not None]
    kept = [text for text, _ in texts if text]
    if not kept:
        raise BadSample("empty caption" if texts else "missing caption", sample.name)
    image = open_image(sample)
    content = sample.image if isinstance(sample.image, bytes) else image.tobytes()
    return Looked(
        *image.size,
        int.from_bytes(blake2b(content, digest_size=8).digest(), "little", signed=True),
        tuple(caption_ids(kept).tolist()),
        tuple(map(len, kept)),
        tuple(len(text.split()) for text in kept),
        sample.name if any(damaged for _, damaged in texts) else None,
    )


class Survey:
    """Figures that grow sample by sample, in compact arrays: some 50 bytes a sample."""

    def __init__(self) -> None:
        self.report = DataReport()
        self.width, self.height = array("q"), array("q")
        self.characters, self.words = array("q"), array("q")
        self.images, self.captions = array("q"), array("q")
        self.per_image: Counter[int] = Counter()

    def add(self, found: Looked) -> None:
        self.report.samples += 1
        if found.damaged is not None:
            self.report.add("bad UTF-8", found.damaged)
        self.width.append(found.width)
        self.height.append(found.height)
        self.images.append(found.image)
        self.captions.extend(found.captions)
        self.characters.extend(found.characters)
        self.words.extend(found.words)
        self.per_image[len(found.captions)] += 1

    def figures(self, seconds: float, workers: int) -> dict[str, Any]:
        """What report.json holds; lengths in pixels, characters and words."""
        width, height = np.array(self.width), np.array(self.height)
        ratio = width / height
        return {
            "samples": self.report.samples,
            "skipped": self.report.skipped,
            "found": self.report.to_dict()["counts"],
            "names": self.report.to_dict()["names"],
            "width": quantiles(width),
            "height": quantiles(height),
            "aspect_ratio": quantiles(ratio),
            "extreme_aspect_ratios": int(((ratio > EXTREME_RATIO) | (ratio < 1 / EXTREME_RATIO)).sum()),
            "captions": len(self.captions),
            "captions_per_image": {str(count): images for count, images in sorted(self.per_image.items())},
            "caption_characters": quantiles(np.array(self.characters)),
            "caption_words": quantiles(np.array(self.words)),
            "duplicate_captions": repeated(self.captions),
            "duplicate_images": repeated(self.images),
            "decoding": {
                "samples_per_second": (self.report.samples + self.report.skipped) / seconds,
                "seconds": seconds,
                "workers": workers,
            },
        }


def survey(data: DataConfig, workers: int = 0, most: int | None = None, verify: bool = False) -> dict[str, Any]:
    """Look at every sample, or at `most` spread over those that can be read in any order, else the first ones.

    verify: compare tar shards with the checksums of their index.
    UserError for a source that cannot be opened, or of which nothing can be used.
    """
    from tqdm import tqdm

    data.check()
    if workers < 0 or (most is not None and most < 1):
        raise UserError(f"--workers must be at least 0 and --samples at least 1, got {workers} and {most}")
    found = walk(data, look, workers, partial(spread, most=most))
    figures = Survey()
    figures.report.merge(found.problems)
    began = time.perf_counter()
    total = found.total if most is None or found.total is None else min(most, found.total)
    for seen in tqdm(found, "samples", total, disable=None, dynamic_ncols=True):
        for kind, name in seen.notes:
            figures.report.add(kind, name)
        if seen.result is not None:
            figures.add(seen.result)
        if figures.report.samples + figures.report.skipped == most:
            break
    seconds = time.perf_counter() - began
    if verify and kind_of(data) == "shards":
        for name in changed_shards(expand(data.sources)):
            figures.report.add("changed shard", name)
    if not figures.report.samples:
        raise UserError(f"no sample can be used: {figures.report.summary()}")
    return figures.figures(seconds, workers)


def spread(size: int, most: int | None) -> range:
    """At most `most` of `size` rows, evenly spaced."""
    return range(0, size, 1 if most is None else max(1, -(-size // most)))


def quantiles(values: np.ndarray) -> dict[str, float]:
    """{"0%": smallest, "5%": ..., "100%": largest}."""
    return {f"{share}%": float(value) for share, value in zip(SHARES, np.percentile(values, SHARES), strict=True)}


def repeated(digests: array) -> int:
    """How many equal one before them."""
    return len(digests) - len(np.unique(np.array(digests)))


def describe(source: str, figures: dict[str, Any]) -> str:
    """Lines to print."""

    def line(name: str, values: dict[str, float], form: str = ",.0f") -> str:
        return f"  {name:<22}" + "".join(f"{values[f'{share}%']:>10{form}}" for share in SHARES)

    captions, samples = figures["captions"], figures["samples"]
    heads = "".join(f"{name:>10}" for name in ("least", "5%", "median", "95%", "most"))
    lines = [
        f"{samples:,} samples of {source} can be used, {figures['skipped']:,} cannot",
        f"  {'':<22}{heads}",
        line("width, pixels", figures["width"]),
        line("height, pixels", figures["height"]),
        line("width / height", figures["aspect_ratio"], ".2f"),
        line("caption, characters", figures["caption_characters"]),
        line("caption, words", figures["caption_words"]),
        f"  {captions:,} captions, {captions / samples:.2f} an image; "
        f"{figures['duplicate_captions']:,} captions and {figures['duplicate_images']:,} images occur again",
        f"  {figures['extreme_aspect_ratios']:,} images are more than {EXTREME_RATIO:.0f} times as long as wide",
        f"  read and decoded {figures['decoding']['samples_per_second']:,.0f} samples/s "
        f"with {figures['decoding']['workers'] or 'no'} workers",
    ]
    for kind, count in sorted(figures["found"].items(), key=lambda item: -item[1]):
        lines.append(f"  {kind}: {count:,}")
        lines += [f"    {name}" for name in figures["names"][kind]]
    return "\n".join(lines)


def write_report(data: DataConfig, figures: dict[str, Any], out: Path) -> None:
    """report.json and sheet.png into `out`. UserError where it cannot be written."""
    content = json.dumps({"source": data.source, **figures}, indent=1, ensure_ascii=False)
    try:
        write_atomic(out / "report.json", lambda file: file.write(content.encode()))
        sheet = contact_sheet(examples(data))
        write_atomic(out / "sheet.png", lambda file: sheet.save(file, "PNG"))
    except OSError as error:
        raise UserError(f"cannot write into {out}: {error.strerror}") from error
