"""Zero-shot classification: a class is the mean of its prompts' features (Radford et al., arXiv 2103.00020, 3.1.4).

Legend: N pictures, C classes, D the features' width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F

from fastclip.clip.model import Clip
from fastclip.evaluate.encode import encode
from fastclip.evaluate.progress import progress


@torch.inference_mode()
def class_features(model: Clip, tokenize: Callable, prompts: Sequence[Sequence[str]]) -> torch.Tensor:
    """[C, D] float32 on the CPU: for each class the mean of its prompts' features, normalised."""
    device = model.log_scale.device
    means = [
        encode(model.encode_text, tokenize(list(texts)).to(device)).float().mean(0, keepdim=True)
        for texts in progress(prompts, "classes")
    ]
    return F.normalize(torch.cat(means), dim=1).cpu()


@torch.inference_mode()
def classify(model: Clip, tokenize: Callable, images: torch.Tensor, prompts: Sequence[Sequence[str]]) -> torch.Tensor:
    """int64 [N]: the class of each image, with no training on the classes."""
    return (encode(model.encode_image, images) @ class_features(model, tokenize, prompts).T).argmax(1)


def accuracies(scores: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """top-1, top-5 and the mean over classes of top-1, each in [0, 1]; scores [N, C], labels int64 [N], N at least 1.

    With five classes or fewer top-5 is 1. The mean is over the classes that have pictures.
    """
    best = scores.topk(min(5, scores.shape[1]), dim=1).indices == labels[:, None]
    right = best[:, 0].double()
    count = torch.bincount(labels, minlength=scores.shape[1])
    per_class = torch.bincount(labels, right, minlength=scores.shape[1]) / count
    return {
        "top-1": right.mean().item(),
        "top-5": best.any(1).double().mean().item(),
        "mean per class": per_class[count > 0].mean().item(),
    }


def confusion_matrix(truth: torch.Tensor, guess: torch.Tensor, classes: int) -> torch.Tensor:
    """int64 [C, C]: row = truth, column = guess."""
    return torch.bincount(truth * classes + guess, minlength=classes * classes).view(classes, classes)
