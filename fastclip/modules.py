"""nn.Modules that take the place of OpenCLIP's losses: same constructor, same forward, same results.

Legend: image_features, text_features [N, D], as the model returns them (OpenCLIP's models normalise themselves).
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastclip.distill import distill_loss
from fastclip.distributed import Sharded
from fastclip.distributed.open_clip import MODE_OF_DIST_IMPL, default_group, no_horovod, warn_of_local_loss
from fastclip.loss import clip_loss, info_nce, siglip_loss


class ClipLoss(nn.Module):
    """OpenCLIP's ClipLoss (3.3 and newer) without the N x N logits.

    world_size > 1: the batch is spread over the ranks of torch.distributed's default group. Whatever local_loss and
    gather_with_grad say, the value is the whole batch's on every rank, and gradients averaged over the ranks, as DDP
    and FSDP do, are the whole batch's; OpenCLIP's are those only with gather_with_grad (docs/distributed.md).
    cache_labels changes nothing here. Horovod is not supported. backend: as in `clip_loss`; mode: as in
    `fastclip.distributed.Sharded`.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        backend: str | None = None,
        mode: str = "gather",
    ) -> None:
        super().__init__()
        no_horovod(use_horovod, world_size)
        if world_size > 1 and local_loss and not gather_with_grad:
            warn_of_local_loss()
        self.sharded = Sharded(mode=mode)
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod
        self.backend = backend

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, 0-d, or {"contrastive_loss": loss} with output_dict. logit_scale is already exponentiated."""
        if type(self).get_logits is not ClipLoss.get_logits:
            _one_process("a ClipLoss whose subclass makes its own logits", self.world_size)
            loss = self._dense_loss(*self.get_logits(image_features, text_features, logit_scale, logit_bias))
            return {"contrastive_loss": loss} if output_dict else loss
        group = default_group(self.rank, self.world_size, self.sharded)
        loss = clip_loss(image_features, text_features, logit_scale, normalize=False, group=group, backend=self.backend)
        if logit_bias is not None:
            # A constant on every logit cancels in a softmax: it changes no value, and its gradient is exactly 0.
            loss = loss + 0.0 * torch.as_tensor(logit_bias, dtype=loss.dtype, device=loss.device).reshape(())
        return {"contrastive_loss": loss} if output_dict else loss

    def get_ground_truth(self, device: torch.device, num_logits: int) -> Tensor:
        """[num_logits] int64: the column of each row's positive, for subclasses that build their own logits."""
        return torch.arange(num_logits, device=device)

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Dense [N, N] logits of both directions; the loss calls this only where a subclass overrides it."""
        _one_process("ClipLoss.get_logits", self.world_size)
        logits = logit_scale * image_features @ text_features.T
        if logit_bias is not None:
            logits = logits + logit_bias
        return logits, logits.T

    def _dense_loss(self, per_image: Tensor, per_text: Tensor) -> Tensor:
        """OpenCLIP's formula on the logits that a subclass makes."""
        labels = self.get_ground_truth(per_image.device, len(per_image))
        return (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2


class SigLipLoss(nn.Module):
    """OpenCLIP's SigLipLoss (3.3 and newer) without the N x N logits, nor chunks of them kept for autograd.

    world_size > 1: the batch is spread over the ranks of torch.distributed's default group; value and averaged
    gradients are the whole batch's. dist_impl "bidir" (the default) and "shift" pass the texts round a ring, "reduce"
    and "gather" gather them first. cache_labels, chunk_size and bidir change nothing here. Horovod is not supported.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int | None = None,
        bidir: bool = True,
        use_horovod: bool = False,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        no_horovod(use_horovod, world_size)
        if dist_impl not in MODE_OF_DIST_IMPL:
            raise ValueError(f"dist_impl must be one of {list(MODE_OF_DIST_IMPL)}, got {dist_impl!r}")
        self.sharded = Sharded(mode=MODE_OF_DIST_IMPL[dist_impl])
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl
        self.chunk_size = chunk_size
        self.bidir = bidir
        self.use_horovod = use_horovod
        self.backend = backend

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, 0-d, or {"contrastive_loss": loss} with output_dict."""
        group = default_group(self.rank, self.world_size, self.sharded)
        loss = siglip_loss(
            image_features, text_features, logit_scale, logit_bias, normalize=False, group=group, backend=self.backend
        )
        return {"contrastive_loss": loss} if output_dict else loss

    def get_ground_truth(
        self, device: torch.device, dtype: torch.dtype, num_logits: int, negative_only: bool = False
    ) -> Tensor:
        """[num_logits, num_logits]: 1 on the diagonal unless negative_only, -1 elsewhere; for subclasses."""
        labels = -torch.ones((num_logits, num_logits), device=device, dtype=dtype)
        return labels if negative_only else labels + 2 * torch.eye(num_logits, device=device, dtype=dtype)

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
    ) -> Tensor:
        """Dense [N, N] logits, for OpenCLIP's subclasses; the loss itself never calls this."""
        logits = logit_scale * image_features @ text_features.T
        return logits if logit_bias is None else logits + logit_bias


class DistillClipLoss(ClipLoss):
    """OpenCLIP's DistillClipLoss: ClipLoss, and beside it the cross-entropy against a teacher's distributions."""

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        dist_image_features: Tensor,
        dist_text_features: Tensor,
        dist_logit_scale: Tensor | float,
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """(contrastive loss, distillation loss), or a dict of both; the teacher's arguments begin with dist_."""
        loss = super().forward(image_features, text_features, logit_scale)
        distill = distill_loss(
            image_features,
            text_features,
            logit_scale,
            dist_image_features,
            dist_text_features,
            dist_logit_scale,
            normalize=False,
            group=default_group(self.rank, self.world_size, self.sharded),
            backend=self.backend,
        )
        return {"contrastive_loss": loss, "distill_loss": distill} if output_dict else (loss, distill)


class MatryoshkaLoss(nn.Module):
    """A loss over leading widths of the embeddings (Kusupati et al. 2022): sum_w weight_w loss(x[:, :w], y[:, :w]).

    loss: a fastclip module or function whose first two arguments are features [N, D]. widths: each at most D.
    weights: one per width, 1 each by default. Slices are read in place, not copied.
    """

    def __init__(
        self, loss: Callable[..., Tensor], widths: Sequence[int], weights: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        if not widths or min(widths) < 1:
            raise ValueError(f"widths must be positive integers, got {list(widths)}")
        weights = [1.0] * len(widths) if weights is None else list(weights)
        if len(weights) != len(widths):
            raise ValueError(f"weights must be one per width, got {len(weights)} for {len(widths)} widths")
        self.loss, self.widths, self.weights = loss, list(widths), weights

    def forward(self, x: Tensor, y: Tensor, *args: object, **kwargs: object) -> Tensor:
        if max(self.widths) > x.shape[1]:
            raise ValueError(f"widths must be at most D = {x.shape[1]}, got {max(self.widths)}")
        losses = [
            weight * self.loss(x[:, :width], y[:, :width], *args, **kwargs)
            for width, weight in zip(self.widths, self.weights, strict=True)
        ]
        return torch.stack(losses).sum(0)


class InfoNCELoss(nn.Module):
    """info_nce as a module with a learnable temperature (or a fixed one).

    temperature: the initial value; scale = 1 / temperature = exp(self.log_scale), clamped to at most max_scale in the
    forward pass. options: keyword arguments of `info_nce`, fixed for all calls.
    """

    def __init__(
        self, temperature: float = 0.07, *, learnable: bool = True, max_scale: float = 100.0, **options: object
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.log_scale = nn.Parameter(torch.tensor(1.0 / temperature).log(), requires_grad=learnable)
        self.max_scale = max_scale
        self.options = options

    def forward(self, query: Tensor, key: Tensor, **options: object) -> Tensor:
        """info_nce(query [N, D], key [M, D]) at the module's temperature; options override the constructor's."""
        scale = self.log_scale.exp().clamp(max=self.max_scale)
        return info_nce(query, key, scale, **{**self.options, **options})


def _one_process(what: str, world_size: int) -> None:
    if world_size > 1:
        raise NotImplementedError(f"{what} runs in one process only, got world_size={world_size}")
