"""Evaluations during training: the model on pairs that it is not trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from fastclip import clip_loss, recall_at_k, retrieval_ranks, siglip_loss
from fastclip.clip.model import Clip
from fastclip.clip.tokenizer import Tokenizer
from fastclip.data.batch import Batch
from fastclip.data.loader import Loader
from fastclip.data.transform import preprocess_for
from fastclip.evaluate import LoadedModel, Reading, classify, open_labelled, templates_for
from fastclip.evaluate.labelled import DIGITS
from fastclip.train.config import TrainConfig
from fastclip.train.parallel import World
from fastclip.train.parts import held_out_batches
from fastclip.train.state import TrainState
from fastclip.train.step import autocast

RECALLS = (1, 5, 10)


class Evaluation:
    """Callable: figures of `state` now, in evaluation mode, the same in every process.

    `batches` is this process's share of the held-out pairs, None for none; `zero_shot` gives figures of the model. With
    an average of the weights, that is what is evaluated.
    """

    def __init__(
        self,
        state: TrainState,
        batches: Loader | None,
        zero_shot: Callable[[Clip], dict[str, float]] | None,
        config: TrainConfig,
        world: World,
    ) -> None:
        self.state, self.batches, self.zero_shot, self.config, self.world = state, batches, zero_shot, config, world
        self.beginning = None if batches is None else batches.state_dict()

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        self.state.model.eval()
        self.world.share(self.state.model.buffers())
        with averaged(self.state):
            values = {} if self.batches is None else self.held_out()
            if self.zero_shot is not None:
                with autocast(self.config, self.world):
                    values |= self.zero_shot(self.state.model)
        return values

    def held_out(self) -> dict[str, float]:
        """Loss of all held-out pairs as one batch, and recall@K among them, both ways."""
        model = self.state.model
        image, text = self.features()
        if self.config.loss == "siglip":
            loss = siglip_loss(image, text, model.logit_scale, model.logit_bias)
        else:
            loss = clip_loss(image, text, model.logit_scale)
        values = {"held_out_pairs": len(image), "held_out_loss": loss.item()}
        for way, ranks in zip(("image_to_text", "text_to_image"), retrieval_ranks(image, text), strict=True):
            values |= {f"{way}_recall@{k}": recall_at_k(ranks, k) for k in RECALLS}
        return values

    def features(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Features [M, D] float32 of both sides, from all processes."""
        model, images, texts = self.state.model, [], []
        for batch in self.some():
            batch = batch.to(self.world.device, non_blocking=True)
            with autocast(self.config, self.world):
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


def make_evaluation(state: TrainState, tokenizer: Tokenizer, config: TrainConfig, world: World) -> Evaluation | None:
    """What the configuration asks for, None for nothing. UserError for data that cannot be read."""
    batches = held_out_batches(config, state.model, tokenizer, world)
    zero_shot = make_zero_shot(config, tokenizer)
    if batches is None and zero_shot is None:
        return None
    return Evaluation(state, batches, zero_shot, config, world)


def make_zero_shot(config: TrainConfig, tokenizer: Tokenizer) -> Callable[[Clip], dict[str, float]] | None:
    """Classifies the labelled pictures of the configuration, all of them in every process; None without any.

    UserError for a source that cannot be read.
    """
    source, wanted = config.evaluation.zero_shot, config.evaluation.templates
    if source is None:
        return None
    labelled, reading = open_labelled(source), Reading(config.evaluation.batch, config.workers)

    def figures(model: Clip) -> dict[str, float]:
        loaded = LoadedModel(model, tokenizer, preprocess_for(model.config), config.out)
        characters = source == DIGITS and loaded.preprocess.channels == 1
        templates = templates_for(loaded, wanted or (("digit {}",) if characters else ()))
        found = classify.zero_shot(loaded, labelled, templates, reading).figures or {}
        return {f"zero_shot_{name.replace(' ', '_')}": value for name, value in found.items()}

    return figures


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
