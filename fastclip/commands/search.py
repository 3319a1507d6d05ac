"""fastclip search."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Search:
    """Find characters by words with the model that the demo trained."""

    query: tyro.conf.Positional[str]
    """What to look for, such as "snowman"."""
    run_folder: Annotated[Path, tyro.conf.arg(name="run")] = Path("runs/demo")
    """Folder that `fastclip demo` wrote."""
    top: int = 10
    """How many names to print."""
    out: Path | None = None
    """The picture to write; RUN/search-QUERY.png if not given."""

    def run(self) -> None:
        from fastclip.train.search import search

        found, picture = search(self.query, self.run_folder, self.top, self.out)
        for place, hit in enumerate(found, 1):
            face = f"{hit.face}, never trained on" if hit.held_out else hit.face
            print(f"{place:>3}  {hit.score:5.2f}  {hit.name}  ({face})")
        print(f"Pictures: {picture}")
