"""The demo: train a small CLIP from scratch on characters and their names, and show what it has learnt."""

from __future__ import annotations

import platform
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastclip.clip.config import ClipConfig, ConvConfig, TextConfig
from fastclip.clip.model import Clip
from fastclip.clip.tokenizer import BpeTokenizer
from fastclip.data.augment import Augment
from fastclip.data.digits import WORDS, load_digit_scans
from fastclip.data.glyphs import load_glyphs
from fastclip.data.pairs import UniqueCaptions
from fastclip.env import processor
from fastclip.errors import UserError
from fastclip.train import report
from fastclip.train.checkpoint import save_json, save_model
from fastclip.train.config import DemoConfig, TrainConfig
from fastclip.train.evaluate import classify, confusion_matrix, encode
from fastclip.train.memory import memory
from fastclip.train.progress import Progress
from fastclip.train.search import INDEX, Index
from fastclip.train.summary import retrieval, summary
from fastclip.train.trainer import train

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
    model = model.to(memory_format=torch.channels_last)
    say(
        f"{len(training):,} pictures of {len(names):,} names in {len(np.unique(training.face_of))} faces to "
        f"train on; never trained on: {', '.join(config.faces_held_out)}."
    )

    ids = tokenizer(glyphs.names)
    augment, noise = Augment(), torch.Generator().manual_seed(config.seed)

    def draw() -> tuple[torch.Tensor, torch.Tensor]:
        images, numbers = batches.draw()
        return augment(images, noise), ids[numbers]

    settings = TrainConfig(steps=config.steps, batch=config.batch, seed=config.seed)
    weights = sum(weight.numel() for weight in model.parameters())
    say(f"Training {weights:,} weights, {config.steps} steps of {config.batch:,} pairs. Ctrl-C stops early.")
    prepared = time.perf_counter()
    with Progress(config.steps, config.batch) as progress:
        history = train(model, draw, settings, progress)
    trained = time.perf_counter()
    if history.interrupted:
        say(f"Stopped by Ctrl-C after {len(history.loss)} steps; evaluating what is there.")

    model.eval()
    save_model(config.out, model, tokenizer)
    say("Evaluating ...")
    index = Index.build(model, glyphs, config.faces_held_out)
    index.save(config.out / INDEX)
    texts = encode(model.encode_text, ids)
    faces = {face: retrieval(index, texts, face, training) for face in config.faces_held_out}
    scans, digits = load_digit_scans(MODEL.image.image_size)
    matrix = confusion_matrix(digits, classify(model, tokenizer, scans, PROMPTS), len(WORDS)).numpy()
    accuracy = matrix.trace() / matrix.sum()

    report.loss_curve(history, config.batch, config.out / "loss.png")
    answers = [(query, index.find(encode(model.encode_text, tokenizer(query))[0], 8)) for query in QUERIES]
    among = f"{len(index.glyphs):,} pictures of {len(glyphs.names):,} characters"
    report.gallery(answers, config.out / "gallery.png", f"Asked in words, found among {among}")
    title = f"Handwritten digits, never trained on: {accuracy:.1%} right"
    report.confusion(matrix, WORDS, config.out / "digits.png", title)
    ended = time.perf_counter()

    results = {
        "steps": len(history.loss),
        "interrupted": history.interrupted,
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
            "train": asdict(settings),
            "model": model.config.to_dict(),
            "augment": asdict(augment),
        },
        "machine": {
            "processor": processor(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "history": {"loss": history.loss, "scale": history.scale, "accuracy": history.accuracy},
    }
    save_json(config.out / "metrics.json", results)
    say(summary(results, config))
    return results


def claim(folder: Path) -> None:
    """Make `folder` and prove that it can be written, before minutes are spent."""
    probe = folder / ".fastclip-probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror}") from error


def say(text: str) -> None:
    print(text, flush=True)
