"""Zero-shot classification of a folder, and what is written about it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastclip.evaluate.drawing import draw_confusion
from fastclip.evaluate.encode import READING, Reading, encode_images
from fastclip.evaluate.files import left_out, save_json
from fastclip.evaluate.labelled import UNKNOWN, Labelled
from fastclip.evaluate.loaded import LoadedModel
from fastclip.evaluate.templates import prompts_for, resolve_templates
from fastclip.evaluate.zero_shot import accuracies, class_features, confusion_matrix

PREDICTIONS, CONFUSION = "predictions.json", "confusion.png"
LISTED = 5  # best classes of each picture in the JSON


@dataclass(frozen=True)
class Classified:
    """`scores` [K, C] of the pictures that could be read, `kept` int64 [K] of `data`; `skipped`: why, by name.

    Probabilities are softmax(scale * scores): the scores are cosines, or log-probabilities with scale 1.
    """

    data: Labelled
    scores: torch.Tensor
    kept: torch.Tensor
    skipped: dict[str, str]
    scale: float

    @property
    def labels(self) -> torch.Tensor:
        """int64 [K], -1 where the class is not known."""
        return self.data.labels[self.kept]

    @property
    def figures(self) -> dict[str, float] | None:
        """top-1, top-5 and the mean per class in [0, 1]; None where no label is known."""
        known = self.labels != UNKNOWN
        return accuracies(self.scores[known], self.labels[known]) if known.any() else None

    def predictions(self) -> list[dict[str, Any]]:
        """Of each picture its name, label if known, and best classes with their scores and probabilities."""
        chances = (self.scale * self.scores).softmax(1)
        best = self.scores.topk(min(LISTED, self.scores.shape[1]), dim=1)
        found = []
        for row, (i, label) in enumerate(zip(self.kept.tolist(), self.labels.tolist(), strict=True)):
            top = [
                {"class": self.data.classes[c], "score": score, "probability": chances[row, c].item()}
                for score, c in zip(best.values[row].tolist(), best.indices[row].tolist(), strict=True)
                if score > -math.inf
            ]
            known = None if label == UNKNOWN else self.data.classes[label]
            found.append({"image": self.data.names[i], "label": known, "top": top})
        return found


def templates_for(loaded: LoadedModel, wanted: Sequence[str] = ()) -> tuple[str, ...]:
    """resolve_templates(wanted); of nothing "a photo of a {}.", or the name alone for a model of one channel.

    The latter know characters and no photos.
    """
    return resolve_templates(wanted or (("plain",) if loaded.preprocess.channels == 1 else ("photo",)))


def zero_shot(loaded: LoadedModel, data: Labelled, templates: Sequence[str], reading: Reading = READING) -> Classified:
    """Score every picture of `data` by its cosine to each class's prompts.

    templates: sentences with {}, from templates_for. UserError as from encode_images.
    """
    classes = class_features(loaded.model, loaded.tokenizer, prompts_for(data.classes, templates))
    encoded = encode_images(loaded, data.pictures, reading)
    skipped = {data.names[i]: reason for i, reason in encoded.skipped.items()}
    scores = encoded.features @ classes.T
    return Classified(data, scores, encoded.kept, skipped, loaded.model.logit_scale.item())


def write_classified(result: Classified, out: Path, title: str, about: dict[str, Any]) -> list[Path]:
    """predictions.json, and confusion.png where labels are known, into the folder `out`; returns their paths.

    title: of the PNG; top-1 is added. about: what else the JSON is to say.
    """
    values = {
        **about,
        "classes": list(result.data.classes),
        "figures": result.figures,
        "skipped": result.skipped,
        "predictions": result.predictions(),
    }
    save_json(out / PREDICTIONS, values)
    if result.figures is None:
        return [out / PREDICTIONS]
    known = result.labels != UNKNOWN
    matrix = confusion_matrix(result.labels[known], result.scores[known].argmax(1), len(result.data.classes))
    heading = f"{title}: {result.figures['top-1']:.1%} right"
    draw_confusion(matrix.numpy(), result.data.classes, out / CONFUSION, heading)
    return [out / PREDICTIONS, out / CONFUSION]


def describe(result: Classified) -> str:
    """Lines to print: what could not be read, and the figures."""
    pictures, classes = len(result.scores), len(result.data.classes)
    lines = []
    if result.skipped:
        lines.append(left_out(result.skipped))
    known = int((result.labels != UNKNOWN).sum())
    if result.figures is None:
        lines.append(f"{pictures:,} pictures, {classes:,} classes; no picture's class is known to compare with.")
    else:
        shares = ", ".join(f"{name} {share:.1%}" for name, share in result.figures.items())
        lines.append(f"{known:,} pictures of {classes:,} classes: {shares} (chance {1 / classes:.1%}).")
    return "\n".join(lines)
