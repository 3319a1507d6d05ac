"""Contrastive losses over a whole batch, exact, without ever holding the N x N similarity matrix."""

from fastclip.backends import available_backends, set_backend
from fastclip.distill import distill_loss
from fastclip.loss import LossStats, clip_loss, info_nce, siglip_loss
from fastclip.metrics import recall_at_k, retrieval_ranks, topk
from fastclip.modules import ClipLoss, DistillClipLoss, InfoNCELoss, MatryoshkaLoss, SigLipLoss

__version__ = "0.1.0"
__all__ = [
    "ClipLoss",
    "DistillClipLoss",
    "InfoNCELoss",
    "LossStats",
    "MatryoshkaLoss",
    "SigLipLoss",
    "available_backends",
    "clip_loss",
    "distill_loss",
    "info_nce",
    "recall_at_k",
    "retrieval_ranks",
    "set_backend",
    "siglip_loss",
    "topk",
]
