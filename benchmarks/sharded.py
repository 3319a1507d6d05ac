"""The losses over two processes with one thread each, beside OpenCLIP's on the same ranks: time and memory of a step.

Step: forward and backward of the loss alone, from features that are leaves; both ranks start it together and it ends
when both have finished. Before anything is timed, values and gradients are compared with the float64 reference on a
smaller batch, and the values with each other on the batch itself. Peak memory is one rank's above its features, in
processes of their own. Messages go through gloo on this machine, not through a network.
"""

from __future__ import annotations

import datetime
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from fastclip import clip_loss, reference, siglip_loss
from fastclip.benchmarks.children import return_freed_blocks, run_in_child
from fastclip.benchmarks.foreign import open_clip_losses, why_not_open_clip
from fastclip.benchmarks.measure import paired
from fastclip.benchmarks.memory import watch
from fastclip.distributed import Sharded

RANKS = 2
WIDTH = 512
SCALE, BIAS = 30.0, -10.0
CHECKED_ROWS = 256
ALLOWED_ERROR = 1e-4  # of value and gradients in float32, relative to their norms
QUICK, FULL = ((2048, 3),), ((4096, 9), (8192, 5))  # batch size over all ranks, and rounds

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """loss: "clip" or "siglip". way: whose, and how the features travel."""

    loss: str
    way: str


def cases() -> list[Case]:
    """What is measured; OpenCLIP's where it is installed."""
    ways = {"clip": ["fastclip gather", "fastclip ring"], "siglip": ["fastclip gather", "fastclip ring"]}
    if why_not_open_clip() is None:
        ways["clip"].append("OpenCLIP local_loss, gather_with_grad")
        ways["siglip"] += ["OpenCLIP gather", "OpenCLIP bidir"]
    return [Case(loss, way) for loss, names in ways.items() for way in names]


def measure(quick: bool) -> list[dict]:
    """One line for each case and size; "/ OpenCLIP" is the quotient, round by round, to OpenCLIP's last way.

    Raises ValueError where a result is wrong.
    """
    lines = []
    for n, rounds in QUICK if quick else FULL:
        seconds = on_ranks(timed, n, rounds)[0]
        for case in cases():
            line = {"loss": case.loss, "way": case.way, "ranks": RANKS, "N": n, "D": WIDTH}
            line["s"] = median(seconds[case])
            line["s, all"] = " ".join(f"{value:.3g}" for value in seconds[case])
            for theirs in (other for other in cases() if other.loss == case.loss and "OpenCLIP" in other.way):
                line["/ OpenCLIP"] = paired(seconds[case], seconds[theirs]).median
            line["peak MiB per rank"] = round(max(on_ranks(peak, case, n)), 1)
            lines.append(line)
    return lines


def on_ranks(function: Callable, *arguments: object) -> list:
    """function(rank, *arguments) on RANKS processes of one gloo group."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(RANKS) as threads:
        store = str(Path(folder) / "store")
        runs = [
            threads.submit(run_in_child, _rank, function, rank, store, arguments, threads=1) for rank in range(RANKS)
        ]
        return [run.result() for run in runs]


def _rank(function: Callable, rank: int, store: str, arguments: tuple) -> object:
    warnings.simplefilter("ignore", FutureWarning)  # OpenCLIP calls what torch 2.13 has renamed
    wait = datetime.timedelta(minutes=2)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS, timeout=wait)
    try:
        return function(rank, *arguments)
    finally:
        dist.destroy_process_group()


def loss_of(case: Case, rank: int) -> Loss:
    """(image [n, D], text [n, D], scale) -> this rank's loss; the features are of length 1 already."""
    whose, _, how = case.way.partition(" ")
    if whose == "fastclip":
        group = Sharded(mode=how)
        if case.loss == "clip":
            return lambda x, y, scale: clip_loss(x, y, scale, normalize=False, group=group)
        return lambda x, y, scale: siglip_loss(x, y, scale, BIAS, normalize=False, group=group)
    losses = open_clip_losses()
    if case.loss == "clip":
        return losses.ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=RANKS)
    module = losses.SigLipLoss(rank=rank, world_size=RANKS, dist_impl=how)
    return lambda x, y, scale: module(x, y, scale, torch.tensor(BIAS))


def batch(n: int) -> tuple[Tensor, Tensor]:
    """The whole batch, float32 rows of length 1, early in training: a loss of about 3, where no way has lost digits."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, WIDTH, generator=generator)
    y = x + 4.0 * torch.randn(n, WIDTH, generator=generator)
    return tuple(torch.nn.functional.normalize(side, dim=1) for side in (x, y))


def share(n: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's rows and the scale, all of which want gradients."""
    rows = slice(rank * n // RANKS, (rank + 1) * n // RANKS)
    return *(side[rows].clone().requires_grad_() for side in batch(n)), torch.tensor(SCALE, requires_grad=True)


def step(loss: Loss, inputs: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
    value = loss(*inputs)
    return value.detach(), torch.autograd.grad(value, inputs)


def check(rank: int, case: Case) -> None:
    """Raises ValueError where value or averaged gradients are not the reference's."""
    value, grads = step(loss_of(case, rank), share(CHECKED_ROWS, rank))
    mean = torch.stack([value.double(), grads[2].double()])
    dist.all_reduce(mean)
    found = [mean[0] / RANKS, *(grad.double() / RANKS for grad in grads[:2]), mean[1] / RANKS]

    whole = [side.double().requires_grad_() for side in batch(CHECKED_ROWS)]
    scale = torch.tensor(SCALE, dtype=torch.float64, requires_grad=True)
    if case.loss == "clip":
        expected = reference.clip_loss(*whole, scale, normalize=False)
    else:
        expected = reference.siglip_loss(*whole, scale, BIAS, normalize=False).mean()
    grads = torch.autograd.grad(expected, (*whole, scale))
    rows = slice(rank * CHECKED_ROWS // RANKS, (rank + 1) * CHECKED_ROWS // RANKS)
    for name, f, e in zip(("loss", "image", "text", "scale"), found, (expected, *grads), strict=True):
        e = e.detach()[rows] if e.ndim else e.detach()
        far = float((f - e).norm() / e.norm())
        if not far < ALLOWED_ERROR:
            raise ValueError(f"{case.loss}, {case.way}: {name} is {far:.1e} away from the reference")


def timed(rank: int, n: int, rounds: int) -> dict[Case, list[float]]:
    """Seconds of each case, in turn: A B C, then C B A, so that a drift of the machine falls on all alike."""
    inputs, values = share(n, rank), {}
    for case in cases():
        check(rank, case)
        value = step(loss_of(case, rank), inputs)[0].double()  # warms up, too
        dist.all_reduce(value)
        values.setdefault(case.loss, []).append(float(value) / RANKS)
    for found in values.values():
        if max(found) - min(found) > ALLOWED_ERROR * abs(found[0]):
            raise ValueError(f"the values on the whole batch differ: {found}")
    seconds: dict[Case, list[float]] = {case: [] for case in cases()}
    for number in range(rounds):
        for case in cases() if number % 2 else reversed(cases()):
            loss = loss_of(case, rank)
            dist.barrier()
            start = time.perf_counter()
            step(loss, inputs)
            dist.barrier()
            seconds[case].append(time.perf_counter() - start)
    return seconds


def peak(rank: int, case: Case, n: int) -> float:
    """MiB of one step on this rank above its inputs; for a process of its own."""
    return_freed_blocks()
    inputs, loss = share(n, rank), loss_of(case, rank)
    step(loss, share(CHECKED_ROWS, rank))  # libraries, threads, their buffers
    dist.barrier()
    before, highest, _ = watch()
    step(loss, inputs)
    return highest() - before
