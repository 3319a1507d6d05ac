"""The losses over a process group: one batch, its rows spread over the ranks (docs/distributed.md).

    loss = clip_loss(image_features, text_features, logit_scale, group=torch.distributed.group.WORLD)
    loss = clip_loss(image_features, text_features, logit_scale, group=Sharded(mode="ring"))

shards.py: what the ranks tell each other first. exchange.py: messages with their gradients. sums.py: the one quadratic
operator, over all ranks, ring.py how keys go round. positives.py: whose key is whose. gaps.py: what the softmax losses
are made of. softmax.py, sigmoid.py and distill.py: the losses around it.
"""

from fastclip.distributed.distill import distill_loss
from fastclip.distributed.ring_sigmoid import SigmoidOptions
from fastclip.distributed.shards import Sharded
from fastclip.distributed.sigmoid import SigmoidInputs, siglip_loss
from fastclip.distributed.softmax import InfoNCEForm, clip_loss, info_nce

__all__ = [
    "InfoNCEForm",
    "Sharded",
    "SigmoidInputs",
    "SigmoidOptions",
    "clip_loss",
    "distill_loss",
    "info_nce",
    "siglip_loss",
]
