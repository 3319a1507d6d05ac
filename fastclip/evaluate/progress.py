"""Progress of long work: a bar on a terminal, nothing in a log file."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm


def progress(items: Iterable[Any] | None, what: str, total: int | None = None) -> tqdm:
    """`items`, counted on stderr while they are taken; without items a bar to update. It goes away at the end."""
    from tqdm import tqdm

    # disable=None: only where stderr is a terminal.
    return tqdm(items, desc=what, total=total, disable=None, leave=False, dynamic_ncols=True)
