"""The demo's figures: retrieval in a face that was never trained on, and the text printed at the end."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fastclip.data.glyphs import Glyphs
from fastclip.evaluate.glyph_index import GlyphIndex
from fastclip.evaluate.retrieval import ties
from fastclip.metrics import recall_at_k, retrieval_ranks
from fastclip.train.config import DemoConfig


def retrieval(index: GlyphIndex, texts: torch.Tensor, face: str, training: Glyphs) -> dict[str, Any]:
    """Recall among the pictures of `face` and their names, both ways, and what of the face was known before.

    `texts` [K, D]: features of all names. Some faces share drawings with others (arrows, box drawings): the
    figures for new pictures leave out the queries whose picture equals one in `training`, pixel for pixel.
    """
    glyphs = index.glyphs
    rows = np.flatnonzero(glyphs.face_of == glyphs.faces.index(face))
    images, names = index.features[rows], texts[glyphs.name_of[rows]]
    known = {image.tobytes() for image in training.images}
    new = torch.tensor([glyphs.images[row].tobytes() not in known for row in rows])
    image_to_text, text_to_image = retrieval_ranks(images, names, normalize=False)
    return {
        "names": len(rows),
        "names_seen_in_training": int(np.isin(glyphs.name_of[rows], training.name_of).sum()),
        "pictures_equal_to_a_training_picture": int((~new).sum()),
        "text_to_image": recalls(text_to_image, ties(names, images), new),
        "image_to_text": recalls(image_to_text, ties(images, names), new),
    }


def recalls(ranks: torch.Tensor, tied: torch.Tensor, new: torch.Tensor) -> dict[str, float | None]:
    """recall@1 and @5 of `ranks` [N]; with the ties against; and of the `new` queries alone, None without any."""
    result: dict[str, float | None] = {f"recall@{k}": recall_at_k(ranks, k) for k in (1, 5)}
    result["recall@1_ties_against"] = recall_at_k(ranks + tied, 1)
    some = bool(new.any())
    return result | {f"recall@{k}_new_pictures": recall_at_k(ranks[new], k) if some else None for k in (1, 5)}


def summary(results: dict[str, Any], config: DemoConfig) -> str:
    """What is printed at the end, from the contents of metrics.json."""
    digits, memory = results["digits"], results["memory"]
    place = "" if config.out == DemoConfig().out else f" --run {config.out}"
    seconds = ", ".join(f"{part} {seconds:.0f} s" for part, seconds in results["seconds"].items())
    dense = f"{memory['dense_mib']:,.0f} MiB at batch {config.batch:,}"
    dense_large = f"{memory['dense_mib_at_32768']:,.0f} MiB at batch 32,768"
    return "\n".join(
        [
            *retrieval_lines(results["retrieval"]),
            "",
            f"Handwritten digits, zero-shot: {digits['accuracy']:.1%} of {digits['scans']:,} (chance 10%).",
            f"Memory: peak {memory['peak_mib']:,.0f} MiB for the whole process, at most 64 of them similarities.",
            f"  The dense loss would add {dense}, {dense_large}",
            f"  ({memory['dense_counts']}).",
            f"Time: {seconds}.",
            f"Written to {config.out}: loss.png, gallery.png, digits.png, metrics.json and the checkpoint.",
            f'Try: fastclip search "snowman"{place}',
        ]
    )


def retrieval_lines(faces: dict[str, Any]) -> list[str]:
    """A table with a line for each face, and what to know about the first."""
    lines = [
        "",
        "Never trained on             names    text -> image         image -> text",
        "                                      recall@1  recall@5    recall@1  recall@5",
    ]
    for face, r in faces.items():
        recall = [r[way][f"recall@{k}"] for way in ("text_to_image", "image_to_text") for k in (1, 5)]
        lines.append("  {:<22} {:>9,}    {:8.3f}  {:8.3f}    {:8.3f}  {:8.3f}".format(face, r["names"], *recall))
    face, r = next(iter(faces.items()))
    way = r["text_to_image"]
    seen, copies = r["names_seen_in_training"], r["pictures_equal_to_a_training_picture"]
    new = way["recall@1_new_pictures"]
    return [
        *lines,
        f"  Of {face}'s {r['names']:,} names, {seen:,} were seen in training, drawn by other faces.",
        f"  {copies:,} of its pictures equal a training picture, pixel for pixel. Text -> image recall@1:",
        f"  {'-' if new is None else f'{new:.3f}'} without them, {way['recall@1_ties_against']:.3f} with ties between "
        "look-alikes counted as misses.",
    ]
