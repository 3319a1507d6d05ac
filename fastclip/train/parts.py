"""What a run is put together from: tokenizer, model and data, as the configuration names them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from fastclip import clip
from fastclip.clip.config import ClipConfig, TextConfig
from fastclip.clip.model import Clip
from fastclip.clip.tokenizer import FILE, BpeTokenizer, ClipTokenizer, Tokenizer, load_tokenizer
from fastclip.data.config import DataConfig
from fastclip.data.loader import Loader, make_loader
from fastclip.data.sample import BadSample, to_text
from fastclip.data.sources import kind_of, open_rows
from fastclip.data.transform import TrainTransform, preprocess_for
from fastclip.errors import UserError
from fastclip.train.config import TrainConfig
from fastclip.train.parallel import World

# SigLIP, arXiv 2303.15343, section 3.
SIGLIP_BIAS = -10.0
CAPTIONS_TO_LEARN_FROM = 50_000


def make_model(config: TrainConfig, resumed: Path | None = None) -> tuple[Clip, Tokenizer]:
    """The model in training mode with its tokenizer, on the CPU. UserError for names and files that do not fit.

    `resumed`: a checkpoint whose tokenizer is taken: one learnt anew, from other data perhaps, would not be the same.
    """
    try:
        known = None if resumed is None else load_tokenizer(resumed)
        if config.model.start_from is not None:
            model = clip.load(config.model.start_from, name=config.model.name)
            if config.loss == "siglip" and model.logit_bias is None:
                model.config = replace(model.config, init_bias=SIGLIP_BIAS)
                model.logit_bias = nn.Parameter(torch.tensor(SIGLIP_BIAS))
            return model.train(), known or tokenizer_of_checkpoint(config, model.config)
        described = clip.model_config(
            config.model.name or "glyph-conv", init_bias=SIGLIP_BIAS if config.loss == "siglip" else None
        )
        if config.model.context is not None:
            described = replace(described, text=replace(described.text, context=config.model.context))
        tokenizer = known or new_tokenizer(config, described)
        return clip.Clip(replace(described, text=replace(described.text, vocabulary=len(tokenizer)))), tokenizer
    except (ValueError, TypeError, FileNotFoundError) as error:
        raise UserError(str(error)) from error


def tokenizer_of_checkpoint(config: TrainConfig, described: ClipConfig) -> Tokenizer:
    """The one in the checkpoint's folder, else CLIP's. UserError if it has not the model's vocabulary."""
    start, context = config.model.start_from, described.text.context
    folder = start if start.is_dir() else start.parent
    tokenizer = load_tokenizer(folder, context) if (folder / FILE).is_file() else ClipTokenizer.load(context=context)
    if len(tokenizer) != described.text.vocabulary:
        raise UserError(f"{start} has {described.text.vocabulary} token embeddings, its tokenizer {len(tokenizer)} ids")
    return tokenizer


def new_tokenizer(config: TrainConfig, described: ClipConfig) -> Tokenizer:
    """CLIP's for CLIP's text towers, else one learnt from the captions; learnt too where the configuration says so."""
    context = described.text.context
    if isinstance(described.text, TextConfig):
        return BpeTokenizer.train(captions(training_data(config)), config.model.vocabulary, context)
    if config.model.tokenizer == "learn":
        return ClipTokenizer.train(captions(training_data(config)), config.model.vocabulary, context)
    return ClipTokenizer.load(context=context)


def captions(data: DataConfig) -> list[str]:
    """Captions of the data, each once, of at most CAPTIONS_TO_LEARN_FROM samples spread over it."""
    if kind_of(data) == "shards":
        raise UserError("a tokenizer cannot be learnt from tar shards: start from a folder that has one")
    source = open_rows(data)
    found: dict[str, None] = {}
    for row in range(0, len(source), max(1, len(source) // CAPTIONS_TO_LEARN_FROM)):
        try:
            found |= dict.fromkeys(to_text(caption)[0] for caption in source[row].captions if caption is not None)
        except BadSample:
            continue
    return list(found)


def training_data(config: TrainConfig) -> DataConfig:
    """The data to train on: of the glyphs, by default, the faces that are not held out."""
    glyphs = kind_of(config.data) == "glyphs" and config.data.split is None
    return replace(config.data, split="train") if glyphs else config.data


def held_out_data(config: TrainConfig) -> DataConfig | None:
    """The data to evaluate on, None without any: of the glyphs, by default, the faces held out."""
    source = config.evaluation.source
    data = replace(config.data, shuffle=False, resample=False, epoch_samples=None, pair_ids=False)
    if source is not None:
        return replace(data, source=source, kind=config.evaluation.kind, split=config.evaluation.split)
    if kind_of(config.data) == "glyphs" and config.data.split is None:
        return replace(data, split="test")
    return None


def training_batches(config: TrainConfig, model: Clip, tokenizer: Tokenizer, world: World) -> Loader:
    """This process's share of each batch, distorted at random. UserError where the data does not fill one."""
    plain = preprocess_for(model.config)
    transform = TrainTransform(
        plain.size, plain.channels, plain.mean, plain.std, plain.invert, scale=config.crop, flip=config.flip
    )
    return make_loader(
        training_data(config),
        tokenizer,
        transform,
        config.batch // world.size,
        world.rank,
        world.size,
        workers=config.workers,
        seed=config.seed,
        pin_memory=world.device.type == "cuda",
    )


def held_out_batches(config: TrainConfig, model: Clip, tokenizer: Tokenizer, world: World) -> Loader | None:
    """This process's share of the held-out pairs, in order, None without any.

    Of several processes each gets as many: what does not fill the last batch is left out.
    """
    data = held_out_data(config)
    if data is None:
        return None
    data = replace(data, last="keep" if world.size == 1 else "drop")
    batch = min(config.evaluation.batch, config.evaluation.samples // world.size)
    transform = preprocess_for(model.config)
    return make_loader(data, tokenizer, transform, batch, world.rank, world.size, workers=config.workers)
