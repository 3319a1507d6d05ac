"""fastclip search."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from fastclip.commands.options import ModelOptions


@dataclass(frozen=True, kw_only=True)
class Search(ModelOptions):
    """Find pictures, in words or with a picture: in a folder of yours, or among the characters of the demo."""

    query: tyro.conf.Positional[str]
    """What to look for, such as "snowman"; or a file with a picture, to find similar ones."""
    images: Path | None = None
    """Folder of pictures to search; without it the characters that the demo kept."""
    top: int = 10
    """How many to print."""
    out: Path | None = None
    """The picture to write, with a .json beside it; search-QUERY.png in the run's folder, with --images in runs/search,
    if not given."""
    index: Path | None = None
    """With --images: where the features are kept for the next search; a folder of the cache if not given."""

    def run(self) -> None:
        if self.images is not None:
            self.search_folder(self.images)
        else:
            self.search_glyphs()

    def search_glyphs(self) -> None:
        from fastclip.evaluate.search import search_glyphs

        found, picture = search_glyphs(self.query, self.run_folder, self.top, self.out)
        for place, hit in enumerate(found, 1):
            face = f"{hit.face}, never trained on" if hit.held_out else hit.face
            print(f"{place:>3}  {hit.score:5.2f}  {hit.name}  ({face})")
        print(f"Pictures: {picture}")

    def search_folder(self, images: Path) -> None:
        from fastclip.evaluate.files import left_out, printable
        from fastclip.evaluate.search import search_folder

        hits, index, picture = search_folder(
            self.query, self.open_model(), images, self.top, self.out, self.index, self.reading
        )
        for place, hit in enumerate(hits, 1):
            print(f"{place:>3}  {hit.score:5.2f}  {printable(hit.path.relative_to(index.folder))}")
        if index.skipped:
            print(left_out(index.skipped))
        print(f"Pictures: {picture}")
