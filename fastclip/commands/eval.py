"""fastclip eval."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastclip.commands.options import ModelOptions


@dataclass(frozen=True, kw_only=True)
class Eval(ModelOptions):
    """Measure a model: retrieval on pairs of pictures and captions, zero-shot classification on labelled pictures.

    With neither --pairs nor --labelled: on the glyphs' held-out face and on scikit-learn's handwritten digits.
    """

    pairs: str | None = None
    """Pairs: a .csv, .tsv or .parquet table, a folder of pictures with captions beside them, a folder that Hugging Face
    `datasets` saved, or `glyphs`."""
    image: str | None = None
    """Column of the pictures: paths in a table (`path` if not given), pictures in a saved data set (`image`)."""
    captions: tuple[str, ...] = ("caption",)
    """Columns or fields of the captions; all captions of a picture count."""
    split: str | None = None
    """Of a saved data set; of the glyphs `test` (the face DejaVuSerif) if not given."""
    limit: int | None = None
    """At most so many pairs, spread over all."""
    labelled: Path | None = None
    """Folder with a folder of pictures for each class; or `digits`."""
    classes: tuple[str, ...] = ()
    """Names of the classes; those of the folders if not given."""
    templates: tuple[str, ...] = ()
    """As for `fastclip classify`; for the digits and models of characters "digit {}" if not given."""
    out: Path = Path("runs/eval")
    """Folder that gets metrics.json and confusion.png."""

    def run(self) -> None:
        from fastclip.errors import UserError
        from fastclip.evaluate.files import save_json

        if self.limit is not None and self.limit < 1:
            raise UserError(f"--limit must be at least 1, got {self.limit}")
        both = self.pairs is None and self.labelled is None
        loaded = self.open_model()
        results: dict[str, Any] = {"model": str(self.run_folder)}
        if self.pairs is not None or both:
            results["retrieval"] = self.retrieval(loaded, self.pairs or "glyphs")
        if self.labelled is not None or both:
            results["zero-shot"] = self.zero_shot(loaded, self.labelled or Path("digits"))
        save_json(self.out / "metrics.json", results)
        print(f"Written: {self.out / 'metrics.json'}")

    def retrieval(self, loaded: Any, source: str) -> dict[str, Any]:
        from fastclip.data.config import DataConfig
        from fastclip.evaluate.pairs import describe, evaluate_pairs

        split = self.split or ("test" if source == "glyphs" else None)
        data = DataConfig(source=source, image=self.image, captions=self.captions, split=split)
        figures = evaluate_pairs(loaded, data, self.reading, limit=self.limit)
        print(describe(figures, source))
        return {"pairs": source, "split": split, **figures}

    def zero_shot(self, loaded: Any, source: Path) -> dict[str, Any]:
        from fastclip.evaluate.classify import describe, templates_for, write_classified, zero_shot
        from fastclip.evaluate.labelled import DIGITS, open_labelled

        characters = str(source) == DIGITS and loaded.preprocess.channels == 1
        templates = templates_for(loaded, self.templates or (("digit {}",) if characters else ()))
        data = open_labelled(source, self.classes)
        result = zero_shot(loaded, data, templates, self.reading)
        about = {"model": str(self.run_folder), "images": str(source), "templates": templates}
        write_classified(result, self.out, f"{source.name}, zero-shot", about)
        print(describe(result))
        return {
            "labelled": str(source),
            "templates": templates,
            "pictures": len(result.scores),
            **(result.figures or {}),
        }
