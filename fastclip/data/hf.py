"""A data set that Hugging Face `datasets` saved with save_to_disk.

Its columns are read as Arrow values: the library's own decoders are not used, nor is any column that was not asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastclip.data.report import DataReport
from fastclip.data.sample import LARGEST_IMAGE, BadSample, Sample, read_file, strings
from fastclip.errors import UserError


class SavedSource:
    """One sample a row, in the order of the rows.

    image: a column of encoded images (the `Image` feature, or bytes) or of paths. captions: columns of strings or lists
    of them. UserError for a folder that cannot be read, a split or a column that it lacks.
    """

    def __init__(self, folder: str, split: str | None, image: str, captions: Sequence[str]) -> None:
        from datasets import DatasetDict, load_from_disk

        self.folder, self.image, self.captions = Path(folder), image, tuple(captions)
        self.problems = DataReport()
        try:
            found = load_from_disk(folder)
        # Damaged JSON, Arrow files that are missing or cut off: each has its own kind of error.
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"cannot read the data set in {folder}: {str(error).splitlines()[0]}") from error
        if isinstance(found, DatasetDict):
            if split not in found:
                raise UserError(f"choose one of the splits of {folder} with --data.split: {', '.join(found)}")
            found = found[split]
        elif split is not None:
            raise UserError(f"{folder} has no splits, so no {split!r}")
        if missing := [name for name in (image, *captions) if name not in found.column_names]:
            raise UserError(
                f"{folder} has no column {missing[0]!r}; it has {', '.join(map(repr, found.column_names))} "
                "(choose with --data.image and --data.captions)"
            )
        self.rows = found.select_columns(list(dict.fromkeys((image, *captions)))).with_format("arrow")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        name = f"row {index}"
        row = self.rows[index].to_pylist()[0]
        captions = [text for column in self.captions for text in strings(row[column])]
        return Sample(name, self._encoded(row[self.image], name), captions)

    def _encoded(self, cell: object, name: str) -> bytes | None:
        if isinstance(cell, dict):
            cell = cell.get("bytes") or cell.get("path")
        if cell is None or isinstance(cell, bytes):
            return cell
        if isinstance(cell, str):
            return read_file(self.folder / cell, LARGEST_IMAGE)
        raise BadSample("missing image", f"{name}: neither bytes nor a path but {type(cell).__name__}")
