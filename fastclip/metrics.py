"""Retrieval over galleries of any size, exact, without the similarity matrix.

Legend: image [N, D], text [M, D], query [N, D], gallery [M, D] embeddings, any floating dtype, one device.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip import checks, ops

CHUNK_ELEMENTS = 2**22  # scores of top-k held at once: 16 MiB in float32


def retrieval_ranks(
    image: Tensor,
    text: Tensor,
    *,
    normalize: bool = True,
    image_of_text: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """How many candidates score strictly higher than the best correct one; 0 is a hit at 1 (math.md, eq. 9).

    image_of_text: [M] int64, the image each text belongs to (several captions an image, as in COCO and Flickr30k).
        None: text i belongs to image i, and N must equal M. An image without a text has rank M.
    Returns (image_to_text [N], text_to_image [M]), int64.
    Raises ValueError or TypeError for shapes, dtypes and image numbers that do not fit.
    """
    image, text = checks.features(image, text, "image", "text", paired=image_of_text is None)
    cols = torch.arange(len(text), device=text.device)
    rows = cols
    if image_of_text is not None:
        rows = checks.indices(image_of_text, "image_of_text", len(text), len(image), text)
    return ops.similarity_ranks(image, text, checks.scalar(1.0, "scale", image), rows, cols, normalize, backend)


def recall_at_k(ranks: Tensor, k: int) -> float:
    """The share of ranks below k, in [0, 1]: recall@K of `retrieval_ranks`' output."""
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if ranks.numel() == 0:
        raise ValueError("ranks must hold at least one rank, got none")
    return (ranks < k).double().mean().item()


def topk(query: Tensor, gallery: Tensor, k: int, *, normalize: bool = True) -> tuple[Tensor, Tensor]:
    """The k best of the gallery for each query: (scores [N, k], indices [N, k] int64), best first.

    Scores are cosines (plain dot products with normalize=False), float32 (float64 for float64 embeddings). Of equal
    scores any may come first. Holds a bounded chunk of scores at a time. Raises ValueError unless 1 <= k <= M.
    """
    query, gallery = checks.features(query, gallery, "query", "gallery", paired=False)
    if not 1 <= k <= len(gallery):
        raise ValueError(f"k must be between 1 and the gallery's {len(gallery)} rows, got {k}")
    dtype = checks.accumulation_dtype(query.dtype)
    prepare = (lambda rows: F.normalize(rows.to(dtype), dim=1)) if normalize else (lambda rows: rows.to(dtype))
    gallery = prepare(gallery)
    step = max(1, CHUNK_ELEMENTS // len(gallery))
    with torch.autocast(query.device.type, enabled=False):  # which would round the scores
        best = [torch.topk(prepare(rows) @ gallery.T, k, dim=1) for rows in query.split(step)]
    return torch.cat([b.values for b in best]), torch.cat([b.indices for b in best])
