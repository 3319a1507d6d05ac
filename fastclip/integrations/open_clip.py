"""OpenCLIP's losses without the N x N logits: the same classes by name, constructor, forward and result.

`patch()` puts them where OpenCLIP's `create_loss`, its training code and `open_clip.ClipLoss` find them. Each class is
fastclip's loss first and OpenCLIP's second, so that isinstance and subclasses keep working.

Legend: image_features, text_features [N, D], as OpenCLIP's models return them (already of length 1).
"""

import torch
from torch import Tensor

import fastclip

try:
    import open_clip
    import open_clip.factory
    import open_clip.loss
except ModuleNotFoundError as error:
    if error.name != "open_clip":
        raise
    raise ModuleNotFoundError("fastclip.integrations.open_clip needs OpenCLIP: pip install open_clip_torch") from error

__all__ = ["ClipLoss", "CoCaLoss", "DistillClipLoss", "SigLipLoss", "patch", "unpatch"]


class ClipLoss(fastclip.ClipLoss, open_clip.loss.ClipLoss):
    """open_clip.loss.ClipLoss without the N x N logits."""


class CoCaLoss(open_clip.loss.CoCaLoss, ClipLoss):
    """open_clip.loss.CoCaLoss: its contrastive part without the N x N logits, its caption part as it is."""


class DistillClipLoss(fastclip.DistillClipLoss, ClipLoss, open_clip.loss.DistillClipLoss):
    """open_clip.loss.DistillClipLoss with neither the student's nor the teacher's N x N logits."""


class SigLipLoss(fastclip.SigLipLoss, open_clip.loss.SigLipLoss):
    """open_clip.loss.SigLipLoss without the N x N logits."""

    def _loss(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        negative_only: bool = False,
    ) -> Tensor:
        """What OpenCLIP's subclasses and tests call: the loss of one block of texts, 0-d."""
        args = (image_features, text_features, logit_scale, logit_bias)
        loss = fastclip.siglip_loss(*args, normalize=False, backend=self.backend)
        if not negative_only:
            return loss
        # softplus(s) - softplus(-s) = s makes a negative of each positive.
        own = logit_scale * (image_features * text_features).sum(1)
        return loss + (own if logit_bias is None else own + logit_bias).mean().to(loss.dtype)


_REPLACED = {
    name: (getattr(open_clip.loss, name), ours)
    for name, ours in {
        "ClipLoss": ClipLoss,
        "CoCaLoss": CoCaLoss,
        "DistillClipLoss": DistillClipLoss,
        "SigLipLoss": SigLipLoss,
    }.items()
}
_HOLDERS = (open_clip, open_clip.loss, open_clip.factory)


def patch() -> None:
    """Replace OpenCLIP's losses, in place and for the whole process. Calling it again changes nothing.

    A name that was imported earlier (`from open_clip import ClipLoss`) keeps the class it had: patch first.
    """
    for name, (theirs, ours) in _REPLACED.items():
        _swap(name, theirs, ours)


def unpatch() -> None:
    """Put OpenCLIP's own losses back. Losses that were built meanwhile stay what they are."""
    for name, (theirs, ours) in _REPLACED.items():
        _swap(name, ours, theirs)


def _swap(name: str, old: type[torch.nn.Module], new: type[torch.nn.Module]) -> None:
    for module in _HOLDERS:
        if getattr(module, name, None) is old:
            setattr(module, name, new)
