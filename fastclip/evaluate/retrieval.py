"""Retrieval between pictures and captions, exact and without the similarity matrix (fastclip.metrics).

Legend: N pictures, M captions (one or more a picture), D the features' width; features are normalised float32.
"""

from __future__ import annotations

from typing import Any

import torch

from fastclip.metrics import recall_at_k, retrieval_ranks

RECALLS = (1, 5, 10)


def retrieval_figures(images: torch.Tensor, texts: torch.Tensor, image_of_text: torch.Tensor) -> dict[str, Any]:
    """recall@K and the median rank both ways; images [N, D], texts [M, D], image_of_text int64 [M].

    A picture is found by its best caption, as is usual for COCO and Flickr30k. Rank 1 is the best.
    """
    ranks = retrieval_ranks(images, texts, normalize=False, image_of_text=image_of_text)
    figures: dict[str, Any] = {"images": len(images), "texts": len(texts)}
    for way, rank in zip(("image_to_text", "text_to_image"), ranks, strict=True):
        figures[way] = {f"recall@{k}": recall_at_k(rank, k) for k in RECALLS}
        figures[way]["median rank"] = rank.double().quantile(0.5).item() + 1
    return figures


@torch.inference_mode()
def ties(queries: torch.Tensor, candidates: torch.Tensor, chunk: int = 1024) -> torch.Tensor:
    """int64 [N]: how many other candidates score as candidate i does for query i; [N, D] both.

    Look-alikes tie, and a rank counts only what is strictly higher: rank + ties is the rank with the ties against it.
    """
    counts = []
    for start in range(0, len(queries), chunk):
        scores = queries[start : start + chunk] @ candidates.T
        own = scores.diagonal(start).unsqueeze(1)
        # The order of additions may differ within one product: a few units in the last place are a tie.
        counts.append(((scores - own).abs() <= 1e-6).sum(1) - 1)
    return torch.cat(counts)
