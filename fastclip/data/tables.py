"""A table of (path of an image, caption): CSV, TSV or Parquet, through pyarrow.

It stays in Arrow's memory: compact, and shared with worker processes. Rows of the same path are one sample with several
captions; so are several caption columns and lists of strings (in CSV and TSV written as JSON: ["a cat", "one cat"]).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastclip.data.report import DataReport
from fastclip.data.sample import LARGEST_IMAGE, BadSample, Sample, captions_in, read_file, strings, to_text
from fastclip.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa


class TableSource:
    """One sample for each path of the table, in the order of first appearance.

    Paths are relative to `root`, or to the table's folder; absolute ones are kept. UserError for a table that cannot be
    read or lacks a column; rows with a wrong number of cells are counted in `problems`.
    """

    def __init__(self, table: str, image: str, captions: Sequence[str], root: str | None) -> None:
        self.root = Path(root) if root is not None else Path(table).parent
        self.table = Path(table).name
        self.problems = DataReport()
        found = read_table(table, [image, *captions], self.problems)
        if not found.num_rows:
            raise UserError(f"{table} has no rows")
        self.captions = [found.column(name).combine_chunks() for name in captions]
        encoded = found.column(image).combine_chunks().dictionary_encode(null_encoding="encode")
        self.paths = encoded.dictionary
        path_of = encoded.indices.to_numpy(zero_copy_only=False)
        # The rows of path i are rows[first[i] : first[i + 1]].
        self.rows = np.argsort(path_of, kind="stable")
        self.first = np.concatenate([[0], np.bincount(path_of, minlength=len(self.paths)).cumsum()])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        rows = self.rows[self.first[index] : self.first[index + 1]]
        path = self.paths[index].as_py()
        if not path:
            raise BadSample("missing image", f"{self.table}: row {rows[0] + 1} has no path")
        path = os.fsdecode(path)
        captions = [text for row in rows for column in self.captions for text in _captions(column[int(row)].as_py())]
        return Sample(path, read_file(self.root / path, LARGEST_IMAGE), captions)


def read_table(table: str, columns: Sequence[str], problems: DataReport) -> pa.Table:
    """These columns. Text comes as bytes, for it may not be UTF-8."""
    import pyarrow as pa
    import pyarrow.parquet

    try:
        if table.lower().endswith(".parquet"):
            found = pa.parquet.read_schema(table).names
            _require(table, columns, found)
            return _plain(pa.parquet.read_table(table, columns=list(dict.fromkeys(columns))))
        return _read_text(table, columns, problems)
    except (pa.ArrowInvalid, OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the table {table}: {str(error).splitlines()[0]}") from error


def _read_text(table: str, columns: Sequence[str], problems: DataReport) -> pa.Table:
    import pyarrow as pa
    from pyarrow import csv

    def skip(row: csv.InvalidRow) -> str:
        name = f"{Path(table).name}: row {row.number} has {row.actual_columns} cells, not {row.expected_columns}"
        problems.add("bad row", name)
        return "skip"

    delimiter = "\t" if table.lower().endswith(".tsv") else ","
    # One thread, so that bad rows have numbers.
    read = csv.ReadOptions(use_threads=False)
    parse = csv.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=skip)
    with csv.open_csv(table, read_options=read, parse_options=parse) as reader:
        _require(table, columns, reader.schema.names)
    problems.counts.clear()
    problems.names.clear()
    convert = csv.ConvertOptions(
        check_utf8=False,
        include_columns=list(dict.fromkeys(columns)),
        column_types={name: pa.large_binary() for name in columns},
        strings_can_be_null=True,
        quoted_strings_can_be_null=False,
        null_values=[""],
    )
    return csv.read_csv(table, read_options=read, parse_options=parse, convert_options=convert)


def _plain(table: pa.Table) -> pa.Table:
    """Without dictionaries, and with offsets that do not overflow at 2 GB of text."""
    import pyarrow as pa

    def large(type_: pa.DataType) -> pa.DataType:
        type_ = type_.value_type if pa.types.is_dictionary(type_) else type_
        if pa.types.is_string(type_):
            return pa.large_string()
        return pa.large_binary() if pa.types.is_binary(type_) else type_

    return table.cast(pa.schema([(column.name, large(column.type)) for column in table.schema]))


def _require(table: str, columns: Sequence[str], found: Sequence[str]) -> None:
    if missing := [name for name in columns if name not in found]:
        raise UserError(
            f"{table} has no column {missing[0]!r}; it has {', '.join(map(repr, found))} "
            "(choose with --data.image and --data.captions)"
        )


def _captions(cell: object) -> list[str | bytes | None]:
    """The captions of one cell: text, a list, or a list written as JSON."""
    if cell is None:
        return []
    if isinstance(cell, (list, tuple)):
        return list(strings(cell))
    if isinstance(cell, bytes) and cell.startswith(b"["):
        return captions_in("json", cell, ()) or [cell]
    return [cell if isinstance(cell, (str, bytes)) else to_text(str(cell))[0]]
