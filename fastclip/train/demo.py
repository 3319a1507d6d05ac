"""The demo: train a small CLIP from scratch on characters and their names, and show what it has learnt."""

from __future__ import annotations

import platform
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from fastclip.clip.config import ClipConfig, ConvConfig, TextConfig
from fastclip.clip.model import Clip
from fastclip.clip.tokenizer import BpeTokenizer
from fastclip.data.augment import Augment
from fastclip.data.batch import Batch
from fastclip.data.digits import WORDS, load_digit_scans
from fastclip.data.glyphs import load_glyphs
from fastclip.data.pairs import UniqueCaptions
from fastclip.env import processor
from fastclip.errors import UserError
from fastclip.evaluate.drawing import draw_confusion
from fastclip.evaluate.encode import encode
from fastclip.evaluate.files import save_json
from fastclip.evaluate.glyph_index import INDEX, GlyphIndex, glyph_gallery
from fastclip.evaluate.zero_shot import classify, confusion_matrix
from fastclip.train import settings
from fastclip.train.config import (
    DemoConfig,
    LogConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)
from fastclip.train.curves import draw_curves
from fastclip.train.files import save_model_folder
from fastclip.train.log import RunLog
from fastclip.train.loop import fit
from fastclip.train.memory import memory
from fastclip.train.parallel import processes
from fastclip.train.progress import Progress
from fastclip.train.schedule import make_schedule
from fastclip.train.step import TrainStep
from fastclip.train.summary import retrieval, summary
from fastclip.train.towers import make_encode
from fastclip.train.trainer import claim, make_state, say

MODEL = ClipConfig(
    embed_dim=256,
    image=ConvConfig(image_size=32, widths=(32, 64, 128), blocks=(0, 0, 0), hidden=512),
    text=TextConfig(vocabulary=2048, context=16, width=128, layers=2, head_width=64),
    init_scale=20.0,
)
PROMPTS = tuple((f"digit {word}",) for word in WORDS)
QUERIES = (
    "black chess queen",
    "snowman",
    "skull and crossbones",
    "white smiling face",
    "rightwards double arrow",
    "greek small letter alpha with tonos",
    "cyrillic capital letter zhe",
    "square root",
    "digit seven",
)


def demo(config: DemoConfig) -> dict[str, Any]:
    """Train, evaluate, print, and write everything into `config.out`. Returns what metrics.json holds.

    UserError for settings that cannot be, or a folder that cannot be written.
    """
    began = time.perf_counter()
    config.check()
    claim(config.out)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)

    say("Rendering the characters of the fonts in matplotlib (from the cache after the first time) ...")
    glyphs = load_glyphs(MODEL.image.image_size)
    try:
        training, _ = glyphs.split(config.faces_held_out)
        batches = UniqueCaptions(training, config.batch, config.seed)
    except ValueError as error:
        raise UserError(str(error)) from error
    names = [glyphs.names[i] for i in np.unique(training.name_of)]
    tokenizer = BpeTokenizer.train(names, MODEL.text.vocabulary, MODEL.text.context)
    model = Clip(replace(MODEL, text=replace(MODEL.text, vocabulary=len(tokenizer))))
    say(
        f"{len(training):,} pictures of {len(names):,} names in {len(np.unique(training.face_of))} faces to "
        f"train on; never trained on: {', '.join(config.faces_held_out)}."
    )

    ids = tokenizer(glyphs.names)
    distorted = Distorted(batches, ids, config.seed)
    training_config = TrainConfig(
        batch=config.batch,
        seed=config.seed,
        optimizer=OptimizerConfig(learning_rate=2.5e-3, weight_decay=0.05, betas=(0.9, 0.98), scale_rate=10.0, skips=0),
        schedule=ScheduleConfig(steps=config.steps, warmup=0.1),
        log=LogConfig(every=1, accuracy_every=5),
    )
    weights = sum(weight.numel() for weight in model.parameters())
    say(f"Training {weights:,} weights, {config.steps} steps of {config.batch:,} pairs. Ctrl-C stops early.")
    prepared = time.perf_counter()
    log, stopped = fit_model(model, distorted, training_config)
    trained = time.perf_counter()
    steps = len(log.records)
    if stopped:
        say(f"Stopped by Ctrl-C after {steps} steps; evaluating what is there.")

    model.eval()
    save_model_folder(config.out, model.config, tokenizer, model.state_dict())
    say("Evaluating ...")
    index = GlyphIndex.build(model, glyphs, config.faces_held_out)
    index.save(config.out / INDEX)
    texts = encode(model.encode_text, ids)
    faces = {face: retrieval(index, texts, face, training) for face in config.faces_held_out}
    scans, digits = load_digit_scans(MODEL.image.image_size)
    matrix = confusion_matrix(digits, classify(model, tokenizer, scans, PROMPTS), len(WORDS)).numpy()
    accuracy = matrix.trace() / matrix.sum()

    title = f"Pictures of characters and their names: {steps} steps in {trained - prepared:.0f} s"
    draw_curves(log.records, config.batch, config.out / "loss.png", title + stopped * ", stopped by Ctrl-C")
    answers = [(query, index.find(encode(model.encode_text, tokenizer(query))[0], 8)) for query in QUERIES]
    among = f"{len(index.glyphs):,} pictures of {len(glyphs.names):,} characters"
    glyph_gallery(answers, config.out / "gallery.png", f"Asked in words, found among {among}")
    title = f"Handwritten digits, never trained on: {accuracy:.1%} right"
    draw_confusion(matrix, WORDS, config.out / "digits.png", title)
    ended = time.perf_counter()

    results = {
        "steps": steps,
        "interrupted": stopped,
        "faces_held_out": list(config.faces_held_out),
        "training": {"pictures": len(training), "names": len(names)},
        "retrieval": faces,
        "digits": {
            "accuracy": accuracy,
            "scans": len(scans),
            "prompts": PROMPTS,
            "confusion": matrix.tolist(),
        },
        "memory": memory(config.batch),
        "seconds": {
            "prepare": prepared - began,
            "train": trained - prepared,
            "evaluate": ended - trained,
            "total": ended - began,
        },
        "settings": {
            "demo": {**asdict(config), "out": str(config.out)},
            "train": settings.to_dict(training_config),
            "model": model.config.to_dict(),
            "augment": asdict(distorted.augment),
        },
        "machine": {
            "processor": processor(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "history": {
            "loss": [record["loss"] for record in log.records],
            "scale": [record["scale"] for record in log.records],
            "accuracy": [(i, record["accuracy"]) for i, record in enumerate(log.records) if "accuracy" in record],
        },
    }
    save_json(config.out / "metrics.json", results)
    say(summary(results, config))
    return results


class Distorted:
    """Batches of pairs with different captions, their pictures distorted at random; an epoch never ends."""

    def __init__(self, pairs: UniqueCaptions, ids: torch.Tensor, seed: int) -> None:
        self.pairs, self.ids, self.augment = pairs, ids, Augment()
        self.noise = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            images, numbers = self.pairs.draw()
            yield Batch(self.augment(images, self.noise), self.ids[numbers])


def fit_model(model: Clip, batches: Distorted, config: TrainConfig) -> tuple[RunLog, bool]:
    """Train with the trainer's own loop, on the CPU and without checkpoints; whether Ctrl-C ended it early.

    SystemExit(143) after SIGTERM.
    """
    with processes("cpu") as world:
        state = make_state(model, config, world)
        schedule = make_schedule(config.schedule, config.batch, None)
        step = TrainStep(state, make_encode(model, config, world), schedule, config, world)
        with Progress(schedule.steps) as progress:
            log = RunLog(config, world, progress)
            stopped = fit(step, batches, config, log)
    if stopped == signal.SIGTERM:
        sys.exit(128 + stopped)
    return log, bool(stopped)
