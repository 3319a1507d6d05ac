"""What the ranks run. Every function takes its rank and its group first, and returns plain tensors and numbers.

Legend: whole batches come in, x, y [N, D]; each rank cuts out its rows by `sizes`, its share of N.
"""

import contextlib
import warnings
from collections import Counter
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastclip
from fastclip.benchmarks.foreign import open_clip_losses
from fastclip.distributed import Sharded, exchange


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


def only(rank, group, loss: str, mode: str, sizes, x, y, wanted: str, options: dict) -> Tensor:
    """The gradient of one of "x", "y" and "scale" where nothing else wants one. options are cut like x."""
    own = rows(sizes, rank)
    cut = {name: value[own] if isinstance(value, Tensor) else value for name, value in options.items()}
    inputs = {"x": x[own].clone(), "y": y[own].clone(), "scale": torch.tensor(8.0, dtype=x.dtype)}
    inputs[wanted].requires_grad_()
    getattr(fastclip, loss)(*inputs.values(), group=Sharded(group, mode), **cut).backward()
    assert all((tensor.grad is not None) == (name == wanted) for name, tensor in inputs.items())
    return inputs[wanted].grad


def pairs_steps(rank, group, cases: list[tuple]):
    return [pairs_step(rank, group, *case) for case in cases]


def outcome(rank, group, loss: str, calls: dict[int, dict], default: dict) -> tuple[str, str]:
    """(exception's name, message) of a call whose arguments are `default`, but calls[rank] on the ranks named there."""
    arguments = default | calls.get(rank, {})
    mode = arguments.pop("mode", "gather")
    try:
        getattr(fastclip, loss)(**arguments, group=Sharded(group, mode))
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def traffic(rank, group, loss: str, mode: str, sizes, x, y) -> dict[str, int]:
    """Bytes that this rank sends to others in forward and backward, by kind of message."""
    sent: Counter = Counter()
    others = len(sizes) - 1

    def counted(kind: str, run, bytes_of):
        def wrapper(*args, **kwargs):
            sent[kind] += bytes_of(*args)
            return run(*args, **kwargs)

        return wrapper

    def of_all_to_all(_, t, __, in_sizes):
        return t.nbytes - t[: in_sizes[rank]].nbytes

    def of_p2p(operations):
        return sum(operation.tensor.nbytes for operation in operations if operation.op is dist.isend)

    patches = [
        mock.patch.object(dist, "all_gather", counted("header", dist.all_gather, lambda _, t: others * t.nbytes)),
        mock.patch.object(dist, "all_reduce", counted("all_reduce", dist.all_reduce, lambda t: t.nbytes)),
        mock.patch.object(
            exchange,
            "_all_gather_single",
            counted("gather", exchange._all_gather_single, lambda _, t: others * t.nbytes),
        ),
        mock.patch.object(dist, "all_to_all_single", counted("to_owners", dist.all_to_all_single, of_all_to_all)),
        mock.patch.object(dist, "batch_isend_irecv", counted("ring", dist.batch_isend_irecv, of_p2p)),
    ]
    own = rows(sizes, rank)
    x, y = x[own].requires_grad_(), y[own].requires_grad_()
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        getattr(fastclip, loss)(x, y, 10.0, group=Sharded(group, mode)).backward()
    return dict(sent)


def kept(rank, group, loss: str, mode: str, n: int, width: int) -> int:
    """Bytes that autograd keeps for backward on this rank, n rows each; every storage counted once."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x, y = torch.randn(n, width, requires_grad=True), torch.randn(n, width, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        getattr(fastclip, loss)(x, y, 10.0, group=Sharded(group, mode))
    return sum(storages.values())


def fsdp_step(rank, group, mode: str, sizes, x, y, scale: float):
    """As ddp_step for clip_loss, under FSDP2: parameters sharded over the ranks, the whole gradients put together."""
    model = Pair(x.shape[1], scale, 0.0, x.dtype)
    # FSDP2 shards along the first dimension, which a 0-d parameter has not.
    model.scale, model.bias = (nn.Parameter(p.detach().reshape(1)) for p in (model.scale, model.bias))
    mesh = DeviceMesh.from_group(group, "cpu")
    for part in (model.image, model.text, model):
        fully_shard(part, mesh=mesh)
    own = rows(sizes, rank)
    image, text, multiplier, bias = model(x[own], y[own])
    value = fastclip.clip_loss(image, text, multiplier, group=Sharded(group, mode))
    (value + 0.0 * bias.sum()).backward()
    return {"loss": value.detach()} | {name: p.grad.full_tensor() for name, p in model.named_parameters()}


def module_step(rank, group, whose: str, name: str, options: dict, x, y, scale: float):
    """ddp_step with a loss module, fastclip's or OpenCLIP's, over the default group. Also the warnings it gave."""
    world = dist.get_world_size()
    losses = fastclip if whose == "fastclip" else open_clip_losses()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss = getattr(losses, name)(rank=rank, world_size=world, **options)
    model = DistributedDataParallel(Pair(x.shape[1], scale, -5.0, x.dtype))
    own = rows((len(x) // world,) * world, rank)
    image, text, multiplier, bias = model(x[own], y[own])
    value = loss(image, text, multiplier, bias)
    value.backward()
    grads = {name: p.grad for name, p in model.module.named_parameters()}
    return value.detach(), grads, [str(warning.message) for warning in caught]


def compiled_step(rank, group, mode: str) -> tuple[Tensor, Tensor]:
    """The gradient of an encoder with the loss, as it is and under torch.compile."""
    encoder = nn.Linear(3, 3)
    x = torch.randn(4, 3)

    def step(x: Tensor) -> Tensor:
        image = encoder(x)
        return 2.0 * fastclip.clip_loss(image, image.flip(1), 3.0, group=Sharded(group, mode))

    run = torch.compile(step, backend="aot_eager")
    return tuple(torch.autograd.grad(function(x), encoder.weight)[0] for function in (step, run))
