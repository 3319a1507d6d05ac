"""Gradient caching beside one big batch: gradients, time and memory of forward and backward of a small CLIP.

Peak memory is above what the process held before the step (model and batch): activations, features, gradients, and the
loss's workspace. Each peak has a process of its own, which gives freed blocks back at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from fastclip import clip_loss
from fastclip.benchmarks.children import return_freed_blocks, run_in_child
from fastclip.benchmarks.memory import watch
from fastclip.clip import Clip, create_model
from fastclip.grad_cache import GradCache

MICRO_BATCH = 64
WIDTH = 256  # of the features
SIZE, CONTEXT, VOCABULARY = 16, 16, 2048
# Pairs, rounds: about 15 seconds, and 3 minutes, on two cores.
QUICK, FULL = (512, 2), (4096, 3)
ALLOWED_ERROR = 2.0  # times that of the big batch
WHOLE, CACHED, SMALL = "whole batch", "cached", "one micro-batch"


def measure(quick: bool) -> list[dict]:
    """Lines: each way's seconds, ratio to the whole batch, peak MiB, and the worst gradient's error against float64.

    Raises ValueError where the cached gradients are further from float64 than the whole batch's.
    """
    n, rounds = QUICK if quick else FULL
    threads = torch.get_num_threads()
    errors = gradient_errors(n)
    if errors[CACHED] > ALLOWED_ERROR * errors[WHOLE]:
        raise ValueError(f"cached gradients are wrong: errors {errors[CACHED]:.1e}, whole batch {errors[WHOLE]:.1e}")
    seconds = times(n, rounds)
    rows = {WHOLE: n, CACHED: n, SMALL: MICRO_BATCH}
    peaks = {way: run_in_child(peak_mib, way, count, threads=threads) for way, count in rows.items()}
    features_mib = 2 * 4 * n * WIDTH / 2**20
    lines = []
    for way, count in rows.items():
        line = {"step": way, "N": count, "micro-batch": MICRO_BATCH if way == CACHED else count}
        line["s"] = median(seconds[way])
        line["s, all"] = " ".join(f"{value:.3g}" for value in seconds[way])
        line["peak MiB"] = round(peaks[way], 1)
        line["worst relative error"] = errors.get(way)
        lines.append(line)
    ratios = [cached / whole for cached, whole in zip(seconds[CACHED], seconds[WHOLE], strict=True)]
    bound = peaks[SMALL] + features_mib
    lines.append({"step": "cached / whole batch, s", "s": median(ratios)})
    # As many graphs as there are micro-batches, each with a loss of its own: the work without caching, and the cache's
    # advantage of small pieces with it.
    pieces = median(seconds[CACHED]) / (n / MICRO_BATCH * median(seconds[SMALL]))
    lines.append({"step": f"cached / {n // MICRO_BATCH} times one micro-batch, s", "s": pieces})
    lines.append({"step": "cached / (one micro-batch + features), peak", "peak MiB": peaks[CACHED] / bound})
    return lines


def model_and_batch(n: int) -> tuple[Clip, Tensor, Tensor]:
    """A vision transformer on 17 tokens and a text transformer on 16, the same for every process."""
    torch.manual_seed(0)
    model = create_model(
        "ViT-Ti/4@32px",
        embed_dim=WIDTH,
        image_size=SIZE,
        image_width=128,
        image_layers=4,
        text_width=128,
        text_layers=2,
        vocabulary=VOCABULARY,
        context=CONTEXT,
    )
    return model, torch.randn(n, 3, SIZE, SIZE), torch.randint(1, VOCABULARY, (n, CONTEXT))


def step(way: str, model: Clip, images: Tensor, tokens: Tensor) -> None:
    """Forward and backward."""
    if way == CACHED:
        cached = GradCache([model.encode_image, model.encode_text], MICRO_BATCH)
        clip_loss(*cached(images, tokens), model.logit_scale).backward()
    else:
        clip_loss(*model(images, tokens)).backward()


def gradient_errors(n: int) -> dict[str, float]:
    """The worst parameter's |found - expected| / |expected|, 2-norms, expected from one big batch in float64."""
    found = {}
    for way in (WHOLE, CACHED):
        model, images, tokens = model_and_batch(n)
        step(way, model, images, tokens)
        found[way] = [p.grad.double() for p in model.parameters()]
    model.zero_grad()
    model.double().set_grad_checkpointing()  # half the memory for twice the bytes
    step(WHOLE, model, images.double(), tokens)
    expected = [p.grad for p in model.parameters()]
    return {
        way: max(float((g - e).norm() / e.norm()) for g, e in zip(own, expected, strict=True))
        for way, own in found.items()
    }


def times(n: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each way, in turn: A B C, then C B A, so that a drift of the machine falls on all alike."""
    model, images, tokens = model_and_batch(n)
    calls: dict[str, Callable[[], None]] = {
        WHOLE: lambda: step(WHOLE, model, images, tokens),
        CACHED: lambda: step(CACHED, model, images, tokens),
        SMALL: lambda: step(SMALL, model, images[:MICRO_BATCH], tokens[:MICRO_BATCH]),
    }
    found: dict[str, list[float]] = {way: [] for way in calls}
    for number in range(rounds + 1):
        for way in list(calls) if number % 2 else reversed(calls):
            model.zero_grad()
            start = time.perf_counter()
            calls[way]()
            if number:  # the first round warms up
                found[way].append(time.perf_counter() - start)
    return found


def peak_mib(way: str, n: int) -> float:
    """MiB of one step above what was there before; for a process of its own."""
    return_freed_blocks()
    model, images, tokens = model_and_batch(n)
    step(SMALL, model, images[:8], tokens[:8])  # libraries, threads, their buffers
    model.zero_grad()
    before, peak, _ = watch()
    step(way, model, images, tokens)
    return peak() - before
