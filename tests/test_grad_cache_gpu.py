"""Gradient caching on a CUDA device: its generator, its autocast, batches that stay on the CPU, and NCCL.

Self-contained, so that a machine with torch and pytest alone can run it.
"""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastclip import clip_loss
from fastclip.grad_cache import GradCache

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
N, PIECE = 23, 5  # four whole micro-batches and one of 3


class Pair(nn.Module):
    """Two small encoders with dropout and a logit scale, on the GPU."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = (
            nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.5), nn.Tanh(), nn.Linear(16, 8)).cuda() for _ in range(2)
        )
        self.scale = nn.Parameter(torch.tensor(3.0, device="cuda"))

    def loss(self, image: Tensor, text: Tensor) -> Tensor:
        return clip_loss(image, text, self.scale, backend="eager")


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(1)
    return tuple(torch.randn(N, 6, generator=generator, device="cuda") for _ in range(2))


def with_graphs(pair: Pair) -> tuple[Tensor, Tensor]:
    """The same micro-batches in the same order, each with its graph."""
    towers = (pair.image, pair.text)
    return tuple(torch.cat([tower(x) for x in own.split(PIECE)]) for tower, own in zip(towers, batch(), strict=True))


def gradients(pair: Pair) -> list[Tensor]:
    found = [p.grad for p in pair.parameters()]
    pair.zero_grad()
    return found


def oracle(pair: Pair, **autocast: object) -> list[Tensor]:
    torch.manual_seed(7)
    # Weights are rounded anew for each micro-batch, or their gradients would be added up in 16 bits.
    with torch.autocast("cuda", cache_enabled=False, **autocast):
        loss = pair.loss(*with_graphs(pair))
    loss.backward()
    return gradients(pair)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_dropout_and_autocast_are_the_first_pass_s(dtype):
    pair, autocast = Pair(), {"dtype": dtype or torch.bfloat16, "enabled": dtype is not None}
    want = oracle(pair, **autocast)
    torch.manual_seed(7)
    with torch.autocast("cuda", **autocast):
        features = GradCache([pair.image, pair.text], PIECE)(*batch())
        assert features[0].dtype == (dtype or torch.float32)
        loss = pair.loss(*features)
    after = torch.cuda.get_rng_state()
    loss.backward()
    assert torch.equal(torch.cuda.get_rng_state(), after)
    torch.testing.assert_close(gradients(pair), want, rtol=1e-4, atol=1e-5)


def test_a_batch_that_stays_on_the_cpu():
    pair = Pair()
    want = oracle(pair, enabled=False)
    torch.manual_seed(7)
    encoders = [lambda x: pair.image(x.cuda()), lambda x: pair.text(x.cuda())]
    image, text = (x.cpu() for x in batch())
    pair.loss(*GradCache(encoders, PIECE, modules=[pair])(image, text)).backward()
    torch.testing.assert_close(gradients(pair), want, rtol=1e-4, atol=1e-5)


def test_gradients_are_reduced_once_through_nccl(tmp_path):
    """One process is enough to see when the reducer's buckets are ready; autograd runs in a thread of its own here."""
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        pair = Pair()
        want = oracle(pair, enabled=False)
        ddp, calls = DistributedDataParallel(pair, device_ids=[torch.cuda.current_device()]), []

        def hook(_, bucket):
            calls.append(1)
            return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda f: f.value()[0])

        ddp.register_comm_hook(None, hook)
        cached = GradCache([pair.image, pair.text], PIECE, modules=[ddp])
        for step in range(3):  # DDP orders its buckets anew after the first
            torch.manual_seed(7)
            pair.loss(*cached(*batch())).backward()
            assert len(calls) == step + 1
            torch.testing.assert_close(gradients(pair), want, rtol=1e-4, atol=1e-5)
    finally:
        dist.destroy_process_group()
