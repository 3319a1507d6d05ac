"""Any source -> tar shards of equal size, with an index of their counts and checksums.

Each sample is looked at first: what cannot be used is left out and counted. An image keeps its bytes, unless a size is
given; one caption becomes a .txt, several a .json. The folder appears under its name when all of it is on the disk.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from fastclip.data.cache import write_atomic
from fastclip.data.chance import order
from fastclip.data.config import DataConfig
from fastclip.data.report import DataReport
from fastclip.data.sample import BadSample, Sample, open_image, to_text
from fastclip.data.shard_files import INDEX
from fastclip.data.walk import walk
from fastclip.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

VERSION = 1
JPEG_QUALITY = 95
# By Pillow's names of formats. MPO: JPEGs of cameras with a second picture inside.
TYPES = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif"}


@dataclass(frozen=True)
class PackConfig:
    """How a source is packed."""

    per_shard: int = 10_000
    """Samples a shard."""
    size: int | None = None
    """Pixels: images with a longer shorter side are resized to it and become JPEG; the others keep their bytes."""
    shuffle: bool = True
    """Mix the samples first, where the source can be read in any order: loading shards mixes neighbours only."""
    seed: int = 0
    """Of the shuffling."""
    workers: int = 0
    """Processes that read, check and resize; 0 does it in this one."""

    def check(self) -> None:
        """UserError for numbers that cannot be."""
        if self.per_shard < 1 or self.workers < 0 or (self.size is not None and self.size < 1):
            raise UserError(
                f"--per-shard and --size must be at least 1 and --workers at least 0, got {self.per_shard}, "
                f"{self.size} and {self.workers}"
            )


@dataclass(frozen=True)
class Packed:
    """The members of one sample: type and content."""

    members: tuple[tuple[str, bytes], ...]


def pack(data: DataConfig, out: Path, config: PackConfig) -> tuple[dict[str, Any], DataReport]:
    """Write `out`; returns its index and what was met.

    UserError for settings that cannot be, a folder that is not empty or cannot be written, and too many bad samples.
    """
    from tqdm import tqdm

    data.check()
    config.check()

    def rows(size: int) -> list[int]:
        return order(size, size, config.seed, 0, shuffle=config.shuffle, resample=False).tolist()

    found = walk(data, partial(packed, size=config.size), config.workers, rows)
    report = DataReport()
    report.merge(found.problems)
    with replacing(out) as folder:
        shards: list[dict[str, Any]] = []
        samples = iter(
            _good(tqdm(found, "samples", found.total, disable=None, dynamic_ncols=True), report, data.max_skipped)
        )
        while (first := next(samples, None)) is not None:
            shards.append(write_shard(folder, len(shards), first, samples, config.per_shard))
        report.check(data.max_skipped, final=True)
        if not shards:
            raise UserError(f"nothing to pack: {report.summary()}")
        index = {"version": VERSION, "samples": report.samples, "shards": shards}
        write_atomic(folder / INDEX, lambda file: file.write(json.dumps(index, indent=1).encode()))
    return index, report


def _good(found: Any, report: DataReport, highest_share: float) -> Iterator[Packed]:
    for seen in found:
        for kind, name in seen.notes:
            report.add(kind, name)
        if seen.result is not None:
            report.samples += 1
            yield seen.result
        report.check(highest_share)


def packed(sample: Sample, size: int | None) -> Packed:
    """BadSample for one without a caption or with an image that cannot be decoded."""
    texts = [text for caption in sample.captions if caption is not None and (text := to_text(caption)[0])]
    if not texts:
        raise BadSample("empty caption" if sample.captions else "missing caption", sample.name)
    image = encoded(sample, open_image(sample), size)
    if len(texts) == 1:
        return Packed((image, ("txt", texts[0].encode())))
    return Packed((image, ("json", json.dumps({"caption": texts}, ensure_ascii=False).encode())))


def encoded(sample: Sample, image: Image.Image, size: int | None) -> tuple[str, bytes]:
    """(type, content): the sample's own bytes where nothing is to be changed, else JPEG; PNG for what has no bytes."""
    from PIL import Image

    large = size is not None and min(image.size) > size
    if large:
        scale = size / min(image.size)
        image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC)
    if isinstance(sample.image, bytes) and not large:
        with Image.open(io.BytesIO(sample.image)) as header:
            return TYPES.get(header.format, header.format.lower()), sample.image
    file = io.BytesIO()
    if isinstance(sample.image, bytes):
        image.save(file, "JPEG", quality=JPEG_QUALITY)
        return "jpg", file.getvalue()
    image.save(file, "PNG", optimize=True)
    return "png", file.getvalue()


class Hashed:
    """A file that is only written to, and hashed on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.hash, self.bytes = file, hashlib.sha256(), 0

    def write(self, content: bytes) -> int:
        self.hash.update(content)
        self.bytes += len(content)
        return self.file.write(content)


def write_shard(folder: Path, number: int, first: Packed, rest: Iterator[Packed], most: int) -> dict[str, Any]:
    """NUMBER.tar of `first` and up to `most` - 1 more; its line of the index. The same samples give the same bytes."""
    name = f"{number:06}.tar"
    written: dict[str, Any] = {}

    def write(file: BinaryIO) -> None:
        out, count = Hashed(file), 0
        with tarfile.open(fileobj=out, mode="w|", format=tarfile.USTAR_FORMAT) as tar:
            sample: Packed | None = first
            while sample is not None:
                for type_, content in sample.members:
                    member = tarfile.TarInfo(f"{number * most + count:09}.{type_}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                count += 1
                sample = next(rest, None) if count < most else None
        written.update(name=name, samples=count, bytes=out.bytes, sha256=out.hash.hexdigest())

    write_atomic(folder / name, write)
    return written


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """A new folder beside `out` that takes its name at the end, or is removed when something fails.

    UserError where `out` exists and is not an empty folder, and for a disk that is full or may not be written.
    """
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out} exists and is not an empty folder")
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
        try:
            yield folder
            os.chmod(folder, 0o755)
            if out.exists():
                out.rmdir()
            os.replace(folder, out)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from error
