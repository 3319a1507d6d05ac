"""fastclip probe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from fastclip.commands.options import ModelOptions


@dataclass(frozen=True, kw_only=True)
class Probe(ModelOptions):
    """Train a logistic regression on a model's image features, and say how well it tells classes apart."""

    train: tyro.conf.Positional[Path]
    """Folder with a folder of pictures for each class; or `digits`, scikit-learn's handwritten ones."""
    test: Path | None = None
    """The same classes' pictures to be judged on; if not given a part of those to train on."""
    test_share: float = 0.2
    """Without --test: the share of each class that is judged on and not trained on."""
    seed: int = 0
    """Of the parts."""
    out: Path = Path("runs/probe")
    """Folder that gets predictions.json and confusion.png."""

    def run(self) -> None:
        from fastclip.errors import UserError
        from fastclip.evaluate.classify import describe, write_classified
        from fastclip.evaluate.labelled import open_labelled, split
        from fastclip.evaluate.probe import probe

        if not 0 < self.test_share < 1:
            raise UserError(f"--test-share must be between 0 and 1, got {self.test_share}")
        train = open_labelled(self.train)
        if self.test is None:
            train, test = split(train, self.test_share, self.seed)
        else:
            test = open_labelled(self.test, train.classes)
        loaded = self.open_model()
        result, fitted = probe(loaded, train, test, self.reading, seed=self.seed)
        about = {
            "model": str(self.run_folder),
            "train": str(self.train),
            "test": str(self.test or f"{self.test_share} of {self.train}"),
            "c": fitted.c,
            "sweep": [{"c": c, "validation accuracy": accuracy} for c, accuracy in fitted.sweep],
        }
        paths = write_classified(result, self.out, f"{(self.test or self.train).name}, linear probe", about)
        print(f"Trained on {len(train.pictures):,} pictures, C = {fitted.c:.3g}.")
        print(describe(result))
        print(f"Written: {', '.join(map(str, paths))}")
