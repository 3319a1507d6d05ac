"""Contrastive losses over a whole batch, exact, without ever holding the N x N similarity matrix."""

from fastclip.backends import available_backends, set_backend
from fastclip.loss import clip_loss
from fastclip.modules import ClipLoss

__version__ = "0.1.0"
__all__ = ["ClipLoss", "available_backends", "clip_loss", "set_backend"]
