"""Training steps at CLIP's batch of 32,768 on a processor: the small model of the demo, the pictures of characters.

    python -m fastclip.benchmarks.large_batch --threads 2
    python -m fastclip.benchmarks.large_batch --threads 2 --out benchmarks/results/large-batch.json

52,000 pictures share 7,060 names, so names repeat within such a batch: pairs of one name count as positives (`ids`).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
import tyro
from torch import Tensor

from fastclip import clip_loss
from fastclip.benchmarks import machine, noise
from fastclip.benchmarks.progress import Progress
from fastclip.benchmarks.results import Results
from fastclip.benchmarks.tables import extra
from fastclip.clip import create_model
from fastclip.clip.tokenizer import BpeTokenizer
from fastclip.data.glyphs import load_glyphs
from fastclip.data.pairs import to_float
from fastclip.grad_cache import GradCache
from fastclip.train.memory import dense_mib, peak_mib

LEARNING_RATE, WARM_UP = 1e-3, 10  # steps over which it grows to that
CONTEXT, VOCABULARY = 16, 2048


@dataclass(frozen=True)
class LargeBatch:
    """Train the demo's model with very large batches on this machine's processor."""

    batch: int = 32768
    """Pairs a step."""
    micro_batch: int = 1024
    """Pairs encoded at a time."""
    steps: int = 10
    """Steps, after which the figures are printed."""
    threads: int | None = None
    """Threads of torch and of the kernels; torch's own choice if not given."""
    out: Path | None = None
    """Results file to write, with the machine's name."""


def measure(quick: bool) -> list[dict]:
    """For `fastclip bench`: 10 steps of 32,768 pairs, or 2 of 2,048."""
    return [train(LargeBatch(batch=2048, steps=2) if quick else LargeBatch())]


def train(config: LargeBatch) -> dict:
    """Runs the steps; one line of figures. Raises ValueError where the loss does not fall."""
    torch.manual_seed(0)
    glyphs = load_glyphs()
    tokenizer = BpeTokenizer.train(glyphs.names, VOCABULARY, CONTEXT)
    tokens = tokenizer(glyphs.names)
    model = create_model("glyph-conv", vocabulary=len(tokenizer), context=CONTEXT)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05, fused=True)
    encode_image = lambda pictures: model.encode_image(to_float(pictures))  # noqa: E731 - a piece at a time
    cached = GradCache([encode_image, model.encode_text], config.micro_batch, modules=[model])

    losses, step_s, progress = [], [], Progress()
    progress.ready(config.steps)
    for pictures, names in batches(glyphs, config):
        start = time.perf_counter()
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1.0, (len(losses) + 1) / WARM_UP)
        features = cached(pictures, tokens[names])
        loss = clip_loss(*features, model.logit_scale, ids=names)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.clamp_scale()
        losses.append(loss.item())
        step_s.append(time.perf_counter() - start)
        progress.tell(f"loss {losses[-1]:.3f}, {config.batch / step_s[-1]:,.0f} samples/s, {peak_mib():,.0f} MiB")
    progress.close()
    if len(losses) >= WARM_UP and not losses[-1] < losses[0]:
        raise ValueError(f"the loss did not fall: {losses}")
    return {
        "N": config.batch,
        "micro-batch": config.micro_batch,
        "steps": config.steps,
        "s per step": median(step_s),
        "samples/s": round(config.batch / median(step_s)),
        "peak MiB of the process": round(peak_mib()),
        "MiB of the dense loss's matrices": round(dense_mib(config.batch)),
        "first loss": losses[0],
        "last loss": losses[-1],
    }


def batches(glyphs, config: LargeBatch) -> Iterator[tuple[Tensor, Tensor]]:
    """(pictures uint8 [N, S, S], number of the name int64 [N]), without repetition until all have been drawn."""
    pictures, name_of = torch.from_numpy(glyphs.images), torch.from_numpy(glyphs.name_of)
    order = np.random.default_rng(0)
    drawn = torch.empty(0, dtype=torch.int64)
    for _ in range(config.steps):
        while len(drawn) < config.batch:
            drawn = torch.cat([drawn, torch.from_numpy(order.permutation(len(glyphs)))])
        rows, drawn = drawn[: config.batch], drawn[config.batch :]
        yield pictures[rows], name_of[rows]


def main(config: LargeBatch) -> None:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    here, quiet = machine.describe(torch.get_num_threads()), noise.Noise()
    print(machine.headline(here))
    lines = [train(config)]
    part = {"date": here["date"], "commit": here["commit"], **quiet.measured()}
    for name, value in zip(*extra(lines), strict=True):
        print(f"{name:>34}: {value}")
    if config.out is not None:
        Results("cpu", here, extra={"large_batch": lines}, parts=[part]).save(config.out)
        print(f"Results: {config.out}")


if __name__ == "__main__":
    try:
        main(tyro.cli(LargeBatch, prog="python -m fastclip.benchmarks.large_batch"))
    except (ValueError, OSError) as error:
        sys.exit(f"large_batch: {error}")
