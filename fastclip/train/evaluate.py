"""What a model knows: features, look-alikes, zero-shot classification. Ranks and recall are fastclip.metrics'.

Features are normalised [N, D] float32; nothing here builds an N x N matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F

from fastclip.clip.model import Clip


@torch.inference_mode()
def encode(tower: Callable[[torch.Tensor], torch.Tensor], inputs: torch.Tensor, chunk: int = 512) -> torch.Tensor:
    """Normalised features [N, D] of `inputs` [N, ...], a chunk at a time."""
    return torch.cat([F.normalize(tower(part), dim=1) for part in inputs.split(chunk)])


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


@torch.inference_mode()
def class_features(model: Clip, tokenize: Callable, prompts: Sequence[Sequence[str]]) -> torch.Tensor:
    """[C, D]: for each class the mean of its prompts' features, normalised (CLIP, section 3.1.4)."""
    return torch.cat([F.normalize(encode(model.encode_text, tokenize(p)).mean(0, keepdim=True)) for p in prompts])


@torch.inference_mode()
def classify(model: Clip, tokenize: Callable, images: torch.Tensor, prompts: Sequence[Sequence[str]]) -> torch.Tensor:
    """int64 [N]: the class of each image, with no training on the classes."""
    return (encode(model.encode_image, images) @ class_features(model, tokenize, prompts).T).argmax(1)


def confusion_matrix(truth: torch.Tensor, guess: torch.Tensor, classes: int) -> torch.Tensor:
    """int64 [C, C]: row = truth, column = guess."""
    return torch.bincount(truth * classes + guess, minlength=classes * classes).view(classes, classes)
