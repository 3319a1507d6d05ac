"""Search in a folder of pictures by words or by a picture, through an index that is kept and brought up to date.

An index is two files: features.safetensors (float16 [M, D], normalised) and pictures.json (the paths, sizes and times).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastclip.data.cache import cache_dir
from fastclip.errors import UserError
from fastclip.evaluate.encode import READING, Reading, encode_images
from fastclip.evaluate.files import save_json, save_tensors
from fastclip.evaluate.labelled import list_pictures
from fastclip.evaluate.loaded import LoadedModel
from fastclip.metrics import topk

FEATURES, PICTURES = "features.safetensors", "pictures.json"


@dataclass(frozen=True)
class Entry:
    """A picture: path below the folder, bytes, time of its last change in ns, and row of the features.

    `row` is None where the picture cannot be read; `problem` says why.
    """

    path: str
    size: int
    time: int
    row: int | None
    problem: str | None = None


@dataclass(frozen=True)
class Hit:
    """A picture found: `score` is the cosine to the query."""

    path: Path
    score: float


@dataclass(frozen=True)
class FolderIndex:
    """`features` float32 [M, D] of the pictures in `folder` that can be read, `entries` of all of them."""

    folder: Path
    model: str
    features: torch.Tensor
    entries: tuple[Entry, ...]

    @property
    def skipped(self) -> dict[str, str]:
        """Why a picture is not in the index, by path."""
        return {entry.path: entry.problem for entry in self.entries if entry.problem is not None}

    def find(self, query: torch.Tensor, top: int, without: Path | None = None) -> list[Hit]:
        """The `top` pictures closest to `query` [D], best first; `without` leaves out one path."""
        paths = {entry.row: self.folder / entry.path for entry in self.entries if entry.row is not None}
        scores, rows = topk(query[None], self.features, min(top + (without is not None), len(self.features)))
        hits = [Hit(paths[row], score) for score, row in zip(scores[0].tolist(), rows[0].tolist(), strict=True)]
        return [hit for hit in hits if without is None or hit.path.resolve() != without.resolve()][:top]

    def save(self, place: Path) -> None:
        """Both files into `place`; each names the other, so that halves of two indexes are not taken for one."""
        values = {
            "folder": str(self.folder),
            "model": self.model,
            "pictures": [asdict(entry) for entry in self.entries],
        }
        save_tensors(place / FEATURES, {"features": self.features.half()}, {"pictures": digest(values)})
        save_json(place / PICTURES, values)


def digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def open_index(
    loaded: LoadedModel, folder: str | Path, place: Path | None = None, reading: Reading = READING
) -> FolderIndex:
    """The index of `folder`, kept in `place`; only pictures that are new or have changed since are encoded.

    place: None is a folder of the cache, one for each model and folder. An index there of another model or folder, or
    one that is damaged, is made anew. UserError
    when too many pictures cannot be read, or none can.
    """
    folder, model = Path(folder).resolve(), loaded.fingerprint()
    place = place or cache_dir() / "search" / hashlib.sha256(f"{model} {folder}".encode()).hexdigest()[:16]
    before = read_index(place, folder, model)
    known = {(entry.path, entry.size, entry.time): entry for entry in before.entries} if before else {}
    now = []
    for path in list_pictures(folder):
        stat = path.stat()
        now.append((str(path.relative_to(folder)), stat.st_size, stat.st_mtime_ns))
    new = [key for key in now if key not in known]
    if before is not None and not new and len(now) == len(known):
        return judged(before, reading)
    # What cannot be read is remembered, and not tried again.
    encoded = encode_images(loaded, [folder / path for path, *_ in new], replace(reading, max_skipped=1.0))
    # As they will be read from the file, so that the first search finds what the second does.
    fresh = dict(zip((new[i] for i in encoded.kept.tolist()), encoded.features.half().float(), strict=True))
    problems = {new[i]: reason for i, reason in encoded.skipped.items()}
    features, entries = [], []
    for key in now:
        old = known.get(key)
        problem = old.problem if old else problems.get(key)
        if problem is None:
            features.append(before.features[old.row] if old else fresh[key])
        entries.append(Entry(*key, None if problem is not None else len(features) - 1, problem))
    if not features:
        raise UserError(f"none of the {len(now):,} pictures in {folder} can be read; the first: {entries[0].problem}")
    index = FolderIndex(folder, model, torch.stack(features), tuple(entries))
    index.save(place)
    return judged(index, reading)


def judged(index: FolderIndex, reading: Reading) -> FolderIndex:
    """`index`, unless too many of its pictures cannot be read."""
    reading.check(list(index.skipped.values()), len(index.entries))
    return index


def read_index(place: Path, folder: Path, model: str) -> FolderIndex | None:
    """The index in `place`, None unless it is whole and of this folder and model."""
    from safetensors import SafetensorError, safe_open

    try:
        values = json.loads((place / PICTURES).read_text(encoding="utf-8"))
        with safe_open(place / FEATURES, framework="pt") as stored:
            features, made_with = stored.get_tensor("features").float(), stored.metadata()["pictures"]
        entries = tuple(Entry(**entry) for entry in values["pictures"])
        if made_with == digest(values) and (values["folder"], values["model"]) == (str(folder), model):
            return FolderIndex(folder, model, features, entries)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None
    return None
