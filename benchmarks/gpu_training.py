"""Training steps of a CLIP model on one GPU, of batches that fit in pieces alone: gradient caching, and the other ways.

    python -m benchmarks.gpu --only training

Pictures are random and made on the device, a micro-batch at a time; nothing is loaded. Three ways:
cached: fastclip's GradCache and clip_loss, the loss once over the whole batch. cached-dense: the same cache with
OpenCLIP's dense loss. accumulated: OpenCLIP's --accum-freq, which computes the dense loss once for every micro-batch.

Legend: N pairs, D width of the embedding; features [N, D].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip import clip_loss
from fastclip.benchmarks import gpu_measure as measure
from fastclip.benchmarks.peers import open_clip as open_clip_form
from fastclip.clip import Clip, create_model
from fastclip.grad_cache import GradCache
from fastclip.plan.towers import tower_cost

MOST_STEPS, STEPS_S = 3, 12.0  # timed steps, at most, and the time they may take together; one step at least
LABELS = {
    "cached": "GradCache, fastclip",
    "cached-dense": "GradCache, OpenCLIP's dense loss",
    "accumulated": "--accum-freq, OpenCLIP's dense loss",
}
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """One way to make a step. overrides: of the model's configuration, for small models."""

    way: str
    batch: int
    micro_batch: int = 1024
    model: str = "ViT-B/32"
    dtype: str = "bf16"
    overrides: tuple[tuple[str, object], ...] = ()


# The same batch all three ways, then what fastclip alone is made for, then the largest dense batches.
CASES = (
    Case("cached", 32768),
    Case("cached-dense", 32768),
    Case("accumulated", 32768),
    Case("cached", 131072),
    Case("cached-dense", 131072),
    Case("cached-dense", 65536),
    Case("accumulated", 65536),
)

SMALL = {"image_size": 16, "image_width": 64, "image_layers": 2, "text_width": 64, "text_layers": 2}
SMALL |= {"embed_dim": 32, "vocabulary": 100, "context": 8}


def small(way: str, batch: int = 24, micro_batch: int = 5, dtype: str = "fp32") -> Case:
    """For tests and rehearsals on a processor."""
    return Case(way, batch, micro_batch, "ViT-Ti/4@32px", dtype, tuple(SMALL.items()))


def run_case(case: Case, left_s: float) -> Iterator[dict]:
    """{"trying": ...} as it goes on, then one row. left_s: a step that would take longer is not made."""
    step, row = Step(case), {**asdict(case), "label": LABELS[case.way], "overrides": dict(case.overrides)}
    row["loss_from"] = "fastclip.clip_loss" if case.way == "cached" else dense_loss()[1]
    try:
        yield {"trying": "one micro-batch"}
        row["micro_batch_ms"], row["loss_alone_ms"] = step.micro_batch_ms(), step.loss_alone_ms()
        estimate_s = step.estimate_s(row["micro_batch_ms"], row["loss_alone_ms"])
        row["estimate_s"] = round(estimate_s, 2)
        steps = max(1, min(MOST_STEPS, int(STEPS_S / estimate_s)))
        warm_up = min(case.batch, 2 * case.micro_batch)
        row |= {"warm_up": f"a step of {warm_up:,} pairs and the loss of the whole batch", "steps_timed": steps}
        if steps * estimate_s > left_s:
            row["note"] = f"not run: {steps} steps of about {estimate_s:.0f} s do not fit into the {left_s:.0f} s left"
        else:
            yield {"trying": "a step"}
            row |= step.measured(steps, warm_up)
    except torch.OutOfMemoryError as error:
        row["note"] = f"out of memory: {str(error).splitlines()[0][:160]}"
    del step
    measure.give_back()
    yield row


class Step:
    """A model, its optimiser and a batch of which the pictures exist a micro-batch at a time."""

    def __init__(self, case: Case) -> None:
        self.case, self.loss_ms = case, []
        torch.manual_seed(0)
        with torch.device(measure.DEVICE):
            self.model: Clip = create_model(case.model, **dict(case.overrides))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.loss: Loss = clip_loss if case.way == "cached" else dense_loss()[0]
        self.rows = torch.arange(case.batch)  # on the CPU: the number of a pair, from which its picture is made
        text = self.model.config.text
        draw = torch.Generator(measure.DEVICE).manual_seed(1)
        shape = (case.batch, text.context)
        self.tokens = torch.randint(1, text.vocabulary - 1, shape, generator=draw, device=measure.DEVICE)
        self.tokens[:, -1] = text.vocabulary - 1  # captions that fill the context, as their FLOPs are counted

    def pictures(self, rows: Tensor) -> Tensor:
        """uint8 noise, the same for the same rows, as 16-bit numbers about 0."""
        image = self.model.config.image
        draw = torch.Generator(measure.DEVICE).manual_seed(int(rows[0]))
        shape = (len(rows), image.channels, image.image_size, image.image_size)
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw, device=measure.DEVICE)
        return pixels.to(torch.bfloat16).sub_(127.5).div_(64.0)

    def encode_image(self, rows: Tensor) -> Tensor:
        return self.model.encode_image(self.pictures(rows))

    def autocast(self) -> torch.autocast:
        return torch.autocast(measure.DEVICE, dtype=torch.bfloat16, enabled=self.case.dtype == "bf16")

    def gradients(self, pairs: int) -> Tensor:
        """Adds the gradients of one step over the first pairs to the parameters'; the loss."""
        way = self._accumulated if self.case.way == "accumulated" else self._cached
        return way(self.rows[:pairs], self.tokens[:pairs])

    def _cached(self, rows: Tensor, tokens: Tensor) -> Tensor:
        cached = GradCache([self.encode_image, self.model.encode_text], self.case.micro_batch, modules=[self.model])
        with self.autocast():
            features = cached(rows, tokens)
        leaves, value = self._timed_loss(features)
        torch.autograd.backward(features, [leaf.grad for leaf in leaves])
        return value

    def _accumulated(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """All features without a graph; then each micro-batch again, with one, in its place among the others.

        As there, the logit scale gets its gradient once for every micro-batch.
        """
        pieces = list(zip(rows.split(self.case.micro_batch), tokens.split(self.case.micro_batch), strict=True))
        with torch.no_grad(), self.autocast():
            sides = [[self.encode_image(r) for r, _ in pieces], [self.model.encode_text(t) for _, t in pieces]]
        for number, (r, t) in enumerate(pieces):
            with self.autocast():
                own = (self.encode_image(r), self.model.encode_text(t))
            leaves, value = self._timed_loss(own, [(side[:number], side[number + 1 :]) for side in sides])
            torch.autograd.backward(own, [leaf.grad for leaf in leaves])
        return value

    def _timed_loss(self, features, others=(((), ()), ((), ()))) -> tuple[list[Tensor], Tensor]:
        """Loss and its gradients of leaves in place of the features, between others; its time goes to loss_ms."""
        leaves, value = [x.detach().requires_grad_() for x in features], []

        def run() -> None:
            whole = [torch.cat([*before, x, *after]) for x, (before, after) in zip(leaves, others, strict=True)]
            with self.autocast():
                loss = self.loss(*whole, self.model.logit_scale)
            loss.backward()
            value.append(loss.detach())

        self.loss_ms.append(measure.stopwatch(run))
        return leaves, value[0]

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.model.clamp_scale()

    def micro_batch_ms(self) -> float:
        """Of both towers: forward without a graph, then forward and backward, as both ways need it. The second run."""
        rows, tokens = self.rows[: self.case.micro_batch], self.tokens[: self.case.micro_batch]

        def run() -> None:
            with self.autocast():
                with torch.no_grad():
                    self.encode_image(rows), self.model.encode_text(tokens)
                # Autocast keeps what it rounded, and without a graph: those weights would get no gradient.
                torch.clear_autocast_cache()
                features = self.encode_image(rows), self.model.encode_text(tokens)
            torch.autograd.backward(features, [torch.ones_like(x) for x in features])

        taken = [measure.milliseconds(run) for _ in range(2)][1]
        self.optimizer.zero_grad()
        return round(taken, 2)

    def loss_alone_ms(self) -> float:
        """Of the whole batch, on random features. The second run."""
        shape = (self.case.batch, self.model.config.embed_dim)
        dtype = torch.bfloat16 if self.case.dtype == "bf16" else torch.float32
        sides = [torch.randn(shape, device=measure.DEVICE, dtype=dtype, requires_grad=True) for _ in range(2)]

        def run() -> None:
            with self.autocast():
                loss = self.loss(*sides, self.model.logit_scale)
            loss.backward()

        taken = [measure.milliseconds(run) for _ in range(2)][1]
        self.optimizer.zero_grad()
        return round(taken, 2)

    def estimate_s(self, micro_batch_ms: float, loss_ms: float) -> float:
        pieces = -(-self.case.batch // self.case.micro_batch)
        losses = pieces if self.case.way == "accumulated" else 1
        return (pieces * micro_batch_ms + losses * loss_ms) / 1e3

    def model_flop(self) -> float:
        """Of a step over the batch: forward once and backward, twice that; nothing that is computed again."""
        config = self.model.config
        forward = sum(tower_cost(tower, config.embed_dim, 2, False).flops for tower in (config.image, config.text))
        return 3 * forward * self.case.batch

    def measured(self, steps: int, warm_up: int) -> dict:
        """Figures of `steps` steps, after a small one."""
        self.gradients(warm_up)
        self.update()
        rate = measure.ceiling_tflops(torch.bfloat16 if self.case.dtype == "bf16" else torch.float32)
        self.loss_ms.clear()
        losses, taken_ms = [], []

        def run() -> None:
            losses.append(self.gradients(self.case.batch))
            self.update()

        if measure.DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for _ in range(steps):
            taken_ms.append(measure.milliseconds(run))
        step_ms, loss_ms = median(taken_ms), sum(taken() for taken in self.loss_ms) / steps
        achieved = measure.tflops(self.model_flop(), taken_ms)
        return {
            "step_ms": round(step_ms, 2),
            "runs_ms": [round(ms, 2) for ms in taken_ms],
            "images_per_s": round(1e3 * self.case.batch / step_ms, 1),
            "model_tflop": round(self.model_flop() / 1e12, 3),
            "ceiling_tflops": round(rate, 1),
            "mfu": round(achieved / rate, 4),
            # The second forward pass counted as well.
            "mfu_with_recomputation": round(achieved / rate * 4 / 3, 4),
            "loss_ms": round(loss_ms, 3),
            "loss_share": round(loss_ms / (sum(taken_ms) / steps), 5),
            "losses": [round(loss.item(), 6) for loss in losses],  # those of one batch agree, whichever way
            "peak_mib": round(torch.cuda.max_memory_allocated() / 2**20) if measure.DEVICE == "cuda" else None,
        }


def dense_loss() -> tuple[Loss, str]:
    """OpenCLIP's ClipLoss where open_clip is installed, else the same from its formula; and which."""
    try:
        import open_clip

        theirs = open_clip.ClipLoss()
    except Exception:  # not installed, or a torchvision that does not fit this torch
        return lambda x, y, scale: open_clip_form(F.normalize(x, dim=1), F.normalize(y, dim=1), scale), "its formula"
    return (
        lambda x, y, scale: theirs(F.normalize(x, dim=1), F.normalize(y, dim=1), scale),
        f"open_clip {open_clip.__version__}",
    )
