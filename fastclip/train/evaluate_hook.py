"""Evaluations during training: the model on pairs that it is not trained on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastclip import clip_loss, recall_at_k, retrieval_ranks, siglip_loss
from fastclip.data.batch import Batch
from fastclip.data.loader import Loader
from fastclip.train.config import TrainConfig
from fastclip.train.parallel import World
from fastclip.train.state import TrainState
from fastclip.train.step import autocast

RECALLS = (1, 5, 10)


class Evaluation:
    """Callable: the held-out figures of `state` now, the same in every process.

    `held_out_loss` is the loss of all held-out pairs as one batch; `image_to_text_recall@K` and
    `text_to_image_recall@K` are among them. With an average of the weights, that is what is evaluated.
    """

    def __init__(self, state: TrainState, batches: Loader, config: TrainConfig, world: World) -> None:
        self.state, self.batches, self.config, self.world = state, batches, config, world
        self.beginning = batches.state_dict()

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        model = self.state.model
        model.eval()
        self.world.share(model.buffers())
        with averaged(self.state):
            image, text = self.features()
            if self.config.loss == "siglip":
                loss = siglip_loss(image, text, model.logit_scale, model.logit_bias)
            else:
                loss = clip_loss(image, text, model.logit_scale)
        values = {"held_out_pairs": float(len(image)), "held_out_loss": loss.item()}
        for way, ranks in zip(("image_to_text", "text_to_image"), retrieval_ranks(image, text), strict=True):
            values |= {f"{way}_recall@{k}": recall_at_k(ranks, k) for k in RECALLS}
        return values

    def features(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Features [M, D] float32 of both sides, from all processes."""
        model, images, texts = self.state.model, [], []
        with autocast(self.config, self.world):
            for batch in self.some():
                batch = batch.to(self.world.device, non_blocking=True)
                images.append(model.encode_image(batch.images).float())
                texts.append(model.encode_text(batch.tokens).float())
        return self.world.gather_rows(torch.cat(images)), self.world.gather_rows(torch.cat(texts))

    def some(self) -> Iterator[Batch]:
        """The first batches, until there are `evaluation.samples` of all processes."""
        self.batches.load_state_dict(self.beginning)
        seen = 0
        for batch in self.batches:
            yield batch
            seen += len(batch) * self.world.size
            if seen >= self.config.evaluation.samples:
                return


@contextmanager
def averaged(state: TrainState) -> Iterator[None]:
    """Inside, the model has its averaged weights, if there is an average."""
    if state.average is None:
        yield
        return
    state.average.swap()
    try:
        yield
    finally:
        state.average.swap()
