"""Gradient caching in two processes: gradients are reduced once per backward pass, and are those of all ranks.

Both processes run every scenario below one after the other (starting them costs seconds); each scenario is a test.
Ranks hold different numbers of rows, and so of micro-batches, wherever their forward passes need not meet.
"""

import contextlib
import copy
import os
import re
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel as DDP  # noqa: N817 - its name everywhere
from torch.utils._python_dispatch import TorchDispatchMode

from fastclip import clip_loss
from fastclip.grad_cache import GradCache

PAGE = Path(__file__).parents[1] / "docs" / "grad_cache.md"
WORLD = 2
PIECE = 5
ROWS = (11, 21)  # of each rank: 3 and 5 micro-batches
TIMEOUT_S = 60  # a collective that one rank never reaches

if not dist.is_available():
    pytest.skip("torch is built without torch.distributed", allow_module_level=True)


class Pair(nn.Module):
    """float64, so that what is left of a difference is a mistake. forward runs one encoder, or both."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Sequential(nn.Linear(6, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Linear(8, 4)).double()
        self.text = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4)).double()
        self.scale = nn.Parameter(torch.tensor(3.0, dtype=torch.float64))

    def encode_image(self, image: Tensor) -> Tensor:
        return self.image(image)

    def encode_text(self, text: Tensor) -> Tensor:
        return self.text(text)

    def forward(self, image: Tensor | None = None, text: Tensor | None = None):
        if text is None:
            return self.image(image)
        if image is None:
            return self.text(text)
        return self.image(image), self.text(text), self.scale * 1.0


def batch(step: int, rank: int, rows: tuple[int, ...] = ROWS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return tuple(torch.randn(rows[rank], width, generator=generator, dtype=torch.float64) for width in (6, 3))


def rank_loss(model: Pair, image: Tensor, text: Tensor, rank: int) -> Tensor:
    """Differs between ranks, as each contrasts its own rows."""
    return (1.0 + rank) * clip_loss(image, text, model.scale, backend="eager")


def expect(model: Pair, reference: Pair, step: int, rows: tuple[int, ...] = ROWS, times: int = 1) -> None:
    """The gradients of `model` are the mean over ranks of those of `times` its losses; both models take a step."""
    total = 0.0
    for rank in range(WORLD):
        image, text = batch(step, rank, rows)
        total = total + times * rank_loss(reference, reference.image(image), reference.text(text), rank)
    (total / WORLD).backward()
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        found = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        torch.testing.assert_close(found, q.grad, rtol=1e-11, atol=1e-13, msg=lambda text, name=name: f"{name}: {text}")
    for module in (model, reference):
        torch.optim.SGD(module.parameters(), lr=0.1).step()
        module.zero_grad()


def counting(ddp: DDP) -> list[int]:
    """Gets one entry per bucket that `ddp` reduces; these models fit into one bucket."""
    calls = []

    def hook(group, bucket):
        calls.append(1)
        return dist.all_reduce(bucket.buffer() / WORLD, async_op=True).get_future().then(lambda f: f.value()[0])

    ddp.register_comm_hook(None, hook)
    return calls


def whole_model(rank: int, **options: bool) -> None:
    model, reference = Pair(), Pair()
    ddp = DDP(model, **options)
    calls = counting(ddp)
    cached = GradCache([model.encode_image, model.encode_text], PIECE, modules=[ddp])
    for step in range(3):  # DDP orders its buckets anew after the first
        rank_loss(model, *cached(*batch(step, rank)), rank).backward()
        assert len(calls) == step + 1
        expect(model, reference, step)


def a_whole_model(rank: int) -> None:
    whole_model(rank)


def a_whole_model_that_finds_unused_parameters(rank: int) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "find_unused_parameters=True was specified")
        whole_model(rank, find_unused_parameters=True)


def a_whole_model_with_gradients_in_buckets(rank: int) -> None:
    whole_model(rank, gradient_as_bucket_view=True)


def a_scale_computed_before_the_features(rank: int) -> None:
    """Its gradient arrives after the second pass, and must be reduced with the others."""
    model, reference = Pair(), Pair()
    cached = GradCache([model.encode_image, model.encode_text], PIECE, modules=[DDP(model)])
    scale = model.scale * 1.0
    image, text = cached(*batch(0, rank))
    ((1.0 + rank) * clip_loss(image, text, scale, backend="eager")).backward()
    expect(model, reference, 0)


def encoders_that_call_the_wrapper(rank: int) -> None:
    model, reference = Pair(), Pair()
    ddp = DDP(model)
    calls = counting(ddp)
    encoders = [lambda image: ddp(image=image), lambda text: ddp(text=text)]
    cached = GradCache(encoders, PIECE, modules=[ddp])
    for step in range(3):
        rank_loss(model, *cached(*batch(step, rank)), rank).backward()
        assert len(calls) == step + 1
        expect(model, reference, step)


def a_wrapper_per_encoder(rank: int) -> None:
    model, reference = Pair(), Pair()
    towers = [DDP(model.image), DDP(model.text)]
    calls = [counting(tower) for tower in towers]
    cached = GradCache(towers, PIECE)
    for step in range(3):
        rank_loss(model, *cached(*batch(step, rank)), rank).backward()
        dist.all_reduce(model.scale.grad.div_(WORLD))  # nobody else does
        assert [len(c) for c in calls] == [step + 1] * 2
        expect(model, reference, step)


def an_ordinary_step_between_cached_ones(rank: int) -> None:
    model, reference = Pair(), Pair()
    ddp = DDP(model)
    cached = GradCache([model.encode_image, model.encode_text], PIECE, modules=[ddp])
    for step in range(4):
        image, text = batch(step, rank)
        if step % 2:
            image, text, scale = ddp(image, text)
            loss = (1.0 + rank) * clip_loss(image, text, scale, backend="eager")
        else:
            loss = rank_loss(model, *cached(image, text), rank)
        loss.backward()
        expect(model, reference, step)


def accumulation(rank: int, no_sync: Callable[[DDP, GradCache], contextlib.AbstractContextManager]) -> None:
    model, reference = Pair(), Pair()
    ddp = DDP(model)
    calls = counting(ddp)
    cached = GradCache([model.encode_image, model.encode_text], PIECE, modules=[ddp])
    for step in range(2):
        for last in (False, True):
            with contextlib.nullcontext() if last else no_sync(ddp, cached):
                rank_loss(model, *cached(*batch(step, rank)), rank).backward()
            assert len(calls) == step + last
        expect(model, reference, step, times=2)


def accumulation_in_the_wrapper_s_no_sync(rank: int) -> None:
    accumulation(rank, lambda ddp, cached: ddp.no_sync())


def accumulation_in_the_cache_s_no_sync(rank: int) -> None:
    accumulation(rank, lambda ddp, cached: cached.no_sync())


def two_calls_in_one_backward_pass(rank: int) -> None:
    model, reference = Pair(), Pair()
    ddp = DDP(model)
    calls = counting(ddp)
    cached = GradCache([model.encode_image, model.encode_text], PIECE, modules=[ddp])
    sum(rank_loss(model, *cached(*batch(0, rank)), rank) for _ in range(2)).backward()
    assert len(calls) == 1
    expect(model, reference, 0, times=2)


def an_encoder_that_one_rank_does_not_train(rank: int) -> None:
    model, reference = Pair(), Pair()
    cached = GradCache([model.encode_image, model.encode_text], PIECE, modules=[DDP(model)])
    image, text = cached(*batch(0, rank))
    loss = image.square().sum() if rank else image.square().sum() + (model.scale * text).square().sum()
    loss.backward()
    loss = (reference.scale * reference.text(batch(0, 0)[1])).square().sum()
    for own in range(WORLD):
        loss = loss + reference.image(batch(0, own)[0]).square().sum()
    (loss / WORLD).backward()
    found, want = ([p.grad for p in m.parameters()] for m in (model, reference))
    torch.testing.assert_close(found, want, rtol=1e-11, atol=1e-13)


def a_frozen_encoder(rank: int) -> None:
    model, reference = Pair(), Pair()
    for m in (model, reference):
        m.text.requires_grad_(False)
    ddp = DDP(model)
    calls = counting(ddp)
    cached = GradCache([model.encode_image, model.encode_text], PIECE, modules=[ddp])
    rank_loss(model, *cached(*batch(0, rank)), rank).backward()
    assert len(calls) == 1 and model.text[0].weight.grad is None
    model.text, reference.text = nn.Identity(), copy.deepcopy(reference.text)
    total = 0.0
    for own in range(WORLD):
        image, text = batch(0, own)
        total = total + rank_loss(reference, reference.image(image), reference.text(text), own)
    (total / WORLD).backward()
    torch.testing.assert_close(
        [p.grad for p in model.image.parameters()], [p.grad for p in reference.image.parameters()], rtol=1e-11, atol=0
    )


def the_loss_over_all_ranks(rank: int) -> None:
    """With group= the average over ranks is the gradient of the whole batch, all ranks' rows in one loss."""
    model, reference = Pair(), Pair()
    cached = GradCache([model.encode_image, model.encode_text], PIECE, modules=[DDP(model)])
    image, text = cached(*batch(0, rank))
    clip_loss(image, text, model.scale, group=dist.group.WORLD, backend="eager").backward()
    images, texts = (torch.cat(parts) for parts in zip(*(batch(0, own) for own in range(WORLD)), strict=True))
    clip_loss(reference.image(images), reference.text(texts), reference.scale, backend="eager").backward()
    found, want = ([p.grad for p in m.parameters()] for m in (model, reference))
    torch.testing.assert_close(found, want, rtol=1e-11, atol=1e-13)


class ReduceScatters(TorchDispatchMode):
    """How many there are inside."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "reduce_scatter" in func.name()
        return func(*args, **(kwargs or {}))


EVEN = (11, 11)  # FSDP2 gathers parameters in each forward pass: there the ranks have to meet


def sharded(rank: int, model: Pair, reference: Pair, groups: int) -> None:
    cached = GradCache([model.encode_image, model.encode_text], [4, PIECE])
    for step in range(3):
        with ReduceScatters() as sent:
            rank_loss(model, *cached(*batch(step, rank, EVEN)), rank).backward()
        assert sent.count == groups
        dist.all_reduce(model.scale.grad.div_(WORLD))
        expect(model, reference, step, EVEN)
    with cached.no_sync(), ReduceScatters() as sent:
        rank_loss(model, *cached(*batch(3, rank, EVEN)), rank).backward()
    assert sent.count == 0
    rank_loss(model, *cached(*batch(3, rank, EVEN)), rank).backward()
    dist.all_reduce(model.scale.grad.div_(WORLD))
    expect(model, reference, 3, EVEN, times=2)


def fsdp2_towers(rank: int) -> None:
    model, reference = Pair(), Pair()
    for part in (model.image[1], model.image, model.text):
        fully_shard(part)
    sharded(rank, model, reference, groups=3)


def fsdp2_towers_that_stay_gathered(rank: int) -> None:
    """Parameters gathered once a pass and not once a micro-batch; the next step must gather the new ones."""
    model, reference = Pair(), Pair()
    for part in (model.image, model.text):
        fully_shard(part, reshard_after_forward=False)
        part.set_reshard_after_backward(False)
    sharded(rank, model, reference, groups=2)


def fsdp2_root(rank: int) -> None:
    model, reference = Pair(), Pair()
    for part in (model.image, model.text):
        fully_shard(part)
    fully_shard(model, ignored_params={model.scale})
    for method in ("encode_image", "encode_text"):
        register_fsdp_forward_method(model, method)
    sharded(rank, model, reference, groups=2)


def fsdp2_with_uneven_ranks_is_an_error_on_all(rank: int) -> None:
    model = Pair()
    fully_shard(model.image)
    cached = GradCache([model.image, model.text], PIECE)
    image, text = batch(0, rank)
    with pytest.raises(ValueError, match=r"same number of micro-batches, got \[.*\] here, \[3, 3\] to \[5, 5\] in all"):
        cached(image, text)


def synchronised_batch_norm_with_uneven_ranks_is_an_error_on_all(rank: int) -> None:
    norm = nn.SyncBatchNorm(6).double()
    cached = GradCache([norm], PIECE, modules=[norm])
    with pytest.raises(ValueError, match="same number of micro-batches"):
        cached(batch(0, rank)[0])


def a_static_graph_is_refused(rank: int) -> None:
    model = Pair()
    cached = GradCache([model.image], PIECE, modules=[DDP(model, static_graph=True)])
    with pytest.raises(ValueError, match="static_graph"):
        cached(batch(0, rank)[0])


def a_forgotten_wrapper_is_a_warning(rank: int) -> None:
    model = Pair()
    DDP(model)
    with pytest.warns(UserWarning, match=r"modules=\[ddp_model\]"):
        GradCache([model.encode_image, model.encode_text], PIECE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GradCache([model.encode_image, model.encode_text], PIECE, modules=[model])


def page_examples(section: str) -> None:
    """docs/grad_cache.md; the gradients are on all ranks what they are on the first."""
    model = Pair()
    model.logit_scale = model.scale
    torch.manual_seed(dist.get_rank())
    names = {"model": model, "clip_loss": clip_loss, "GradCache": GradCache, "torch": torch}
    names |= {"DistributedDataParallel": DDP, "fully_shard": fully_shard}
    names["images"], names["tokens"] = (torch.randn(70, width, dtype=torch.float64) for width in (6, 3))
    text = next(part for part in PAGE.read_text().split("\n## ") if part.startswith(section))
    for snippet in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        exec(compile(snippet, PAGE.name, "exec"), names)
    found = model.image[0].weight.grad
    found = found.full_tensor() if isinstance(found, DTensor) else found
    first = found.clone()
    dist.broadcast(first, src=0)
    assert found.abs().max() > 0
    torch.testing.assert_close(found, first, rtol=0, atol=0)


def the_page_s_example_of_ddp(rank: int) -> None:
    page_examples("DistributedDataParallel")


def the_page_s_example_of_fsdp2(rank: int) -> None:
    page_examples("FSDP2")


SCENARIOS = [
    a_whole_model,
    a_whole_model_that_finds_unused_parameters,
    a_whole_model_with_gradients_in_buckets,
    a_scale_computed_before_the_features,
    encoders_that_call_the_wrapper,
    a_wrapper_per_encoder,
    an_ordinary_step_between_cached_ones,
    accumulation_in_the_wrapper_s_no_sync,
    accumulation_in_the_cache_s_no_sync,
    two_calls_in_one_backward_pass,
    an_encoder_that_one_rank_does_not_train,
    a_frozen_encoder,
    the_loss_over_all_ranks,
    fsdp2_towers,
    fsdp2_towers_that_stay_gathered,
    fsdp2_root,
    fsdp2_with_uneven_ranks_is_an_error_on_all,
    synchronised_batch_norm_with_uneven_ranks_is_an_error_on_all,
    a_static_graph_is_refused,
    a_forgotten_wrapper_is_a_warning,
    the_page_s_example_of_ddp,
    the_page_s_example_of_fsdp2,
]


def process(rank: int, folder: str) -> None:
    """Runs the scenarios; writes what failed, one file each."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    for scenario in SCENARIOS:
        try:
            scenario(rank)
        except BaseException:
            Path(folder, f"{scenario.__name__}-{rank}").write_text(traceback.format_exc())
        dist.barrier()
    Path(folder, f"done-{rank}").touch()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def failures(tmp_path_factory) -> Path:
    """The folder that holds what failed."""
    folder = tmp_path_factory.mktemp("processes")
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        context = mp.spawn(process, (str(folder),), nprocs=WORLD, join=False)
        with contextlib.suppress(mp.ProcessRaisedException, mp.ProcessExitedException):
            while not context.join(timeout=TIMEOUT_S):
                pass
    finally:
        os.environ.pop("OMP_NUM_THREADS")
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before
    return folder


@pytest.mark.parametrize("name", [scenario.__name__ for scenario in SCENARIOS])
def test_two_processes(failures, name):
    found = {path.name: path.read_text() for path in sorted(failures.glob(f"{name}-?"))}
    assert not found, "\n".join(found.values())
    assert len(list(failures.glob("done-?"))) == WORLD, "a process ended early"
