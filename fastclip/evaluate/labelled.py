"""Pictures with a class each: a folder with a folder for each class, or scikit-learn's handwritten digits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fastclip.data.digits import WORDS, load_digit_scans
from fastclip.data.folder import extension
from fastclip.data.sample import IMAGE_TYPES
from fastclip.errors import UserError

if TYPE_CHECKING:
    from fastclip.evaluate.encode import Picture

DIGITS = "digits"
UNKNOWN = -1


@dataclass(frozen=True)
class Labelled:
    """`pictures` and their `names`; `labels` int64 [N] count in `classes`, -1 where the class is not known."""

    pictures: Sequence[Picture]
    names: Sequence[str]
    labels: torch.Tensor
    classes: Sequence[str]

    def take(self, rows: torch.Tensor) -> Labelled:
        pictures, names = ([values[i] for i in rows.tolist()] for values in (self.pictures, self.names))
        return Labelled(pictures, names, self.labels[rows], self.classes)


def open_labelled(source: str | Path, classes: Sequence[str] = ()) -> Labelled:
    """The pictures of `source`: the word "digits", or a folder.

    The class of a picture in a folder is the first folder on its way, "_" read as a space. classes: names of one's
    own; pictures in folders of other names are of unknown class. Without them each folder's name is a class.
    UserError without pictures, or when there are fewer than two classes.
    """
    if str(source) == DIGITS:
        return digits(classes)
    root = Path(source)
    paths = list_pictures(root)
    names = [str(path.relative_to(root)) for path in paths]
    of = [class_name(Path(name).parts[0]) if len(Path(name).parts) > 1 else "" for name in names]
    classes = tuple(classes) or tuple(sorted(set(of) - {""}))
    if len(classes) < 2 or len(set(classes)) < len(classes):
        raise UserError(
            f"{len(set(classes))} different classes in {root}: put each class's pictures into a folder of its name, or "
            "give at least two with --classes"
        )
    number = {class_name(name): i for i, name in enumerate(classes)}
    return Labelled(paths, names, torch.tensor([number.get(name, UNKNOWN) for name in of]), classes)


def class_name(folder: str) -> str:
    """ "black_chess_queen" -> "black chess queen"."""
    return " ".join(folder.replace("_", " ").split())


def list_pictures(root: Path) -> list[Path]:
    """The pictures below `root`, by name; links to folders are not followed. UserError if there are none."""
    if not root.is_dir():
        raise UserError(f"{root} is not a folder of pictures")
    found = sorted(path for path in root.rglob("*") if extension(path) in IMAGE_TYPES and path.is_file())
    if not found:
        raise UserError(f"no pictures in {root} (looked for {', '.join(sorted(IMAGE_TYPES))})")
    return found


def digits(classes: Sequence[str]) -> Labelled:
    """The 1,797 scans, dark on light as on paper, 32 pixels a side."""
    from PIL import Image

    if classes and len(classes) != len(WORDS):
        raise UserError(f"the digits have {len(WORDS)} classes, {WORDS[0]} to {WORDS[-1]}, got {len(classes)}")
    scans, labels = load_digit_scans(32)
    paper = ((1 - scans[:, 0]) * 255).round().to(torch.uint8).numpy()
    names = [f"scan {i}" for i in range(len(paper))]
    return Labelled([Image.fromarray(scan) for scan in paper], names, labels, tuple(classes) or WORDS)


def split(data: Labelled, share: float, seed: int) -> tuple[Labelled, Labelled]:
    """(the rest, `share` of each class drawn with `seed`, at least one picture). UserError for a class of one."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.zeros(len(data.labels), dtype=torch.bool)
    for label, name in enumerate(data.classes):
        rows = (data.labels == label).nonzero().flatten()
        if len(rows) < 2:
            raise UserError(f"the class {name!r} has {len(rows)} pictures: two at least are needed to split them")
        count = min(len(rows) - 1, max(1, round(share * len(rows))))
        drawn[rows[torch.randperm(len(rows), generator=generator)[:count]]] = True
    return data.take((~drawn).nonzero().flatten()), data.take(drawn.nonzero().flatten())
