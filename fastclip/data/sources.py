"""Which kind of source a name means, and how it is opened."""

from __future__ import annotations

from pathlib import Path

from fastclip.data.config import DataConfig, Kind
from fastclip.data.rows import Source
from fastclip.data.shard_files import refuse_pipe
from fastclip.errors import UserError

SHARDS = (".tar", ".tar.gz", ".tgz")
TABLES = (".csv", ".tsv", ".parquet")
SAVED = ("dataset_info.json", "dataset_dict.json")


def kind_of(config: DataConfig) -> Kind:
    """The kind that `config` names, or that its sources' names and files tell. UserError if they do not."""
    for source in config.sources:
        refuse_pipe(source)
    if config.kind != "auto":
        return config.kind
    kinds = {_kind_of(source) for source in config.sources}
    if len(kinds) > 1:
        raise UserError(f"--data.source mixes {' and '.join(sorted(kinds))}")
    return kinds.pop()


def open_rows(config: DataConfig) -> Source:
    """The source of `config`, which is not shards. UserError for one that cannot be read."""
    kind = kind_of(config)
    if len(config.sources) > 1:
        raise UserError(f"several sources can be given for tar shards only, not for a {kind}")
    (source,) = config.sources
    if kind == "table":
        from fastclip.data.tables import TableSource

        return TableSource(source, config.image or "path", config.captions, config.root)
    if kind == "hf":
        from fastclip.data.hf import SavedSource

        return SavedSource(source, config.split, config.image or "image", config.captions)
    if kind == "folder":
        from fastclip.data.folder import FolderSource

        return FolderSource(source, config.captions)
    from fastclip.data.characters import GlyphSource

    return GlyphSource(config.glyph_size, config.split, config.held_out)


def _kind_of(source: str) -> Kind:
    if source == "glyphs":
        return "glyphs"
    if source.lower().endswith(SHARDS):
        return "shards"
    if source.lower().endswith(TABLES):
        return "table"
    folder = Path(source)
    if not folder.is_dir():
        known = ", ".join((*SHARDS, *TABLES))
        raise UserError(f"cannot read {source!r}: it is no folder, not `glyphs`, and ends in none of {known}")
    if any((folder / name).is_file() for name in SAVED):
        return "hf"
    return "shards" if any(folder.glob("*.tar")) else "folder"
