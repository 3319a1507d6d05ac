"""fastclip tune."""

from __future__ import annotations

from dataclasses import dataclass

from fastclip.errors import UserError
from fastclip.tune import TuneConfig, tune


@dataclass(frozen=True)
class Tune(TuneConfig):
    """Measure the Triton kernels' tiles on this GPU and keep the fastest in ~/.config/fastclip/tiles.json."""

    def run(self) -> None:
        from fastclip import backends

        reason = backends.why_not("triton")
        if reason is not None:
            raise UserError(f"tune measures on a GPU: {reason}")
        print(f"Tiles: {tune(self)}")
