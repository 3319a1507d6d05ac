"""What the commands that use a model have in common."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

if TYPE_CHECKING:
    from fastclip.evaluate.encode import Reading
    from fastclip.evaluate.loaded import LoadedModel


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, and how its pictures are read."""

    run_folder: Annotated[Path, tyro.conf.arg(name="run")] = Path("runs/demo")
    """The model: a folder that `fastclip demo` or `fastclip train` wrote, or any CLIP checkpoint."""
    model: str | None = None
    """Its name, such as ViT-B/32, where the checkpoint does not tell; it must fit."""
    device: str | None = None
    """Such as cpu; if not given the GPU, where there is one."""
    batch: int = 64
    """Pictures encoded at a time."""
    workers: int = 0
    """Processes that decode pictures; 0 decodes in this one."""
    max_skipped: float = 0.1
    """Stop when more than this share of the pictures cannot be read."""

    def open_model(self) -> LoadedModel:
        """UserError for a model that cannot be used."""
        from fastclip.evaluate.loaded import open_model

        return open_model(self.run_folder, name=self.model, device=self.device)

    @property
    def reading(self) -> Reading:
        """UserError for numbers that cannot be."""
        from fastclip.errors import UserError
        from fastclip.evaluate.encode import Reading

        if self.batch < 1 or self.workers < 0:
            raise UserError(f"--batch must be at least 1, --workers at least 0, got {self.batch} and {self.workers}")
        return Reading(self.batch, self.workers, self.max_skipped)
