"""fastclip classify."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from fastclip.commands.options import ModelOptions


@dataclass(frozen=True, kw_only=True)
class Classify(ModelOptions):
    """Classify pictures by the names of classes, with no training on them (zero-shot)."""

    images: tyro.conf.Positional[Path]
    """Folder of pictures, best with a folder for each class; or `digits`, scikit-learn's handwritten ones."""
    classes: tuple[str, ...] = ()
    """Names of the classes; those of the folders if not given."""
    templates: tuple[str, ...] = ()
    """Sentences with {} for the class, or sets of them: imagenet (80), imagenet-7, photo, plain. If not given photo, or
    plain (the name alone) for models of characters."""
    out: Path = Path("runs/classify")
    """Folder that gets predictions.json and, where the pictures' classes are known, confusion.png."""

    def run(self) -> None:
        from fastclip.evaluate.classify import describe, templates_for, write_classified, zero_shot
        from fastclip.evaluate.labelled import open_labelled

        data = open_labelled(self.images, self.classes)
        loaded = self.open_model()
        templates = templates_for(loaded, self.templates)
        result = zero_shot(loaded, data, templates, self.reading)
        about = {"model": str(self.run_folder), "images": str(self.images), "templates": templates}
        paths = write_classified(result, self.out, f"{self.images.name}, zero-shot", about)
        print(describe(result))
        print(f"Written: {', '.join(map(str, paths))}")
