"""What the ranks run. Every function takes its rank and its group first, and returns plain tensors and numbers.

Legend: whole batches come in, x, y [N, D]; each rank cuts out its rows by `sizes`, its share of N.
"""

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastclip
from fastclip.distributed import Sharded


def rows(sizes: tuple[int, ...], rank: int) -> slice:
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


class Pair(nn.Module):
    """Two encoders that start as the identity, so that the features are the inputs; a scale and a bias."""

    def __init__(self, width: int, scale: float, bias: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.image, self.text = (nn.Linear(width, width, dtype=dtype) for _ in range(2))
        for encoder in (self.image, self.text):
            nn.init.eye_(encoder.weight)
            nn.init.zeros_(encoder.bias)
        vectors = torch.float64 if dtype == torch.float64 else torch.float32
        self.logarithmic = scale > 0
        start = torch.tensor(scale, dtype=torch.float64)
        self.scale = nn.Parameter((start.log() if self.logarithmic else start).to(vectors))
        self.bias = nn.Parameter(torch.tensor(bias, dtype=vectors))

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.image(images), self.text(texts), self.scale.exp() if self.logarithmic else self.scale, self.bias


def ddp_step(rank, group, loss: str, mode: str, sizes, x, y, scale: float, normalize: bool):
    """The loss, and by name the gradients after DDP's averaging: of encoders, scale and bias."""
    model = DistributedDataParallel(Pair(x.shape[1], scale, -5.0, x.dtype), process_group=group)
    own = rows(sizes, rank)
    image, text, multiplier, bias = model(x[own], y[own])
    args = (image, text, multiplier, bias) if loss == "siglip_loss" else (image, text, multiplier)
    value = getattr(fastclip, loss)(*args, normalize=normalize, group=Sharded(group, mode))
    # A parameter that a loss does not use is part of the step all the same, as DDP asks for.
    (value + 0.0 * bias).backward()
    return {"loss": value.detach()} | {name: p.grad for name, p in model.module.named_parameters()}


def ddp_steps(rank, group, cases: list[tuple]):
    return [ddp_step(rank, group, *case) for case in cases]


def pairs_step(rank, group, loss: str, mode: str, sizes, x, y, numbers: dict[str, float], options: dict):
    """Features as leaves: this rank's value (or losses) and averaged-to-be gradients, and the statistics.

    sizes: of x and of y. numbers: scale, and bias where the loss has one. options that are tensors are cut like x;
    "key_ids" like y.
    """
    own_x, own_y = rows(sizes[0], rank), rows(sizes[1], rank)
    x, y = x[own_x].requires_grad_(), y[own_y].requires_grad_()
    numbers = {name: torch.tensor(value, dtype=x.dtype, requires_grad=True) for name, value in numbers.items()}
    cut = {
        name: value[own_y if name == "key_ids" else own_x].clone() if isinstance(value, Tensor) else value
        for name, value in options.items()
    }
    weight = cut["weight"].requires_grad_() if "weight" in cut and loss != "siglip_loss" else None
    out = getattr(fastclip, loss)(x, y, *numbers.values(), group=Sharded(group, mode), **cut)
    value, stats = out if options.get("return_stats") else (out, None)
    # Each rank's losses are its part of what the ranks average; W times their sum is the sum over the batch.
    (value.sum() * len(sizes[0]) if value.ndim else value).backward()
    got = {"value": value.detach(), "x": x.grad, "y": y.grad}
    got |= {name: number.grad for name, number in numbers.items()}
    if weight is not None:
        got["weight"] = weight.grad
    return got, stats and vars(stats)


def pairs_steps(rank, group, cases: list[tuple]):
    return [pairs_step(rank, group, *case) for case in cases]
