"""A mistake on one rank is an error on every rank, and the death of one is the end of all, soon."""

import datetime
import os
import re
import signal
import tempfile
import time

import pytest
import torch
from pool import CONTEXT
from rank_cases import outcome
from torch import distributed as dist

import fastclip
from fastclip.distributed import Sharded

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
CLIP = {"image_features": X, "text_features": X, "logit_scale": 10.0}
WANTED = X.clone().requires_grad_()


# What some ranks do differently, the message there, and what all other ranks are told.
MISTAKES = {
    "no rows": ({1: {"image_features": X[:0], "text_features": X[:0]}}, "at least one row", "rank 1: .*one row"),
    "integers": ({2: {"image_features": X.int()}}, "got torch.int32", "rank 2: TypeError: .*torch.int32"),
    "weight": ({0: {"weight": torch.ones(3)}}, r"\[N\] = \(4,\)", "rank 0: ValueError: weight"),
    "backend": ({0: {"backend": "triton"}}, "triton", "rank 0: RuntimeError: .*triton"),
    "width": ({1: {"image_features": X[:, :2], "text_features": X[:, :2]}}, "", "rank 0: .*D=3.* rank 1: .*D=2"),
    "dtype": ({1: {"image_features": X.double(), "text_features": X.double()}}, "", "rank 1: .*image=float64"),
    "option": ({2: {"label_smoothing": 0.1}}, "", "label_smoothing=0.1"),
    "reduction": ({2: {"reduction": "sum"}}, "", "reduction=sum"),
    "mode": ({0: {"mode": "ring"}}, "", "mode=ring"),
    "gradient": ({1: {"text_features": WANTED}}, "", r"rank 1: .*text=float32\+"),
    "ids": ({1: {"ids": torch.arange(4)}}, "", "rank 1: .*ids=int64"),
}


@pytest.mark.parametrize(("calls", "own", "others"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_on_one_rank_is_an_error_on_every_rank(pool, calls, own, others):
    results = pool.run(outcome, "clip_loss", calls, CLIP, world=3)
    for rank, (name, message) in enumerate(results):
        assert name in ("ValueError", "TypeError", "RuntimeError"), (rank, name, message)
        pattern = own if rank in calls and own else others
        assert re.search(pattern, message), (rank, message)
    assert pool.run(outcome, "clip_loss", {}, CLIP, world=3) == [("", "")] * 3, "the group has to work afterwards"


def test_siglip_and_info_nce_too(pool):
    results = pool.run(outcome, "siglip_loss", {1: {"ids": torch.rand(4)}}, CLIP, world=3)
    assert [name for name, _ in results] == ["ValueError", "TypeError", "ValueError"]
    nce = {"query": X, "key": X, "scale": 10.0}
    results = pool.run(outcome, "info_nce", {1: {"key": X[:2]}}, nce, world=2)
    assert all("at least N = 4 rows, got 2" in message for _, message in results)


# Labels of rank 1 (rank 0 has good ones), and what both ranks are told. Two ranks have four keys each.
LABELS = {
    "too large": (torch.tensor([0, 8, 1, 7]), r"\[0, 8\), the keys of all ranks in order, got 0 to 8 on rank 1"),
    "negative": (torch.tensor([0, -1, 1, 7]), r"got -1 to 7 on rank 1"),
    "floating": (torch.ones(4), r"labels must be an integer tensor \[4\], got torch.float32"),
    "too few": (torch.arange(3), r"labels must be \[4\], got \(3,\)"),
    "none": (None, "all ranks must call the loss alike|labels=int64"),
}


@pytest.mark.parametrize("mode", ["gather", "ring"])
@pytest.mark.parametrize(("labels", "told"), LABELS.values(), ids=LABELS)
def test_labels_that_are_wrong_on_one_rank(pool, labels, told, mode):
    nce = {"query": X, "key": X, "scale": 10.0, "labels": torch.tensor([7, 0, 4, 7]), "mode": mode}
    results = pool.run(outcome, "info_nce", {1: {"labels": labels}}, nce, world=2)
    for name, message in results:
        assert name in ("ValueError", "TypeError") and re.search(told, message), (name, message)
    assert pool.run(outcome, "info_nce", {}, nce, world=2) == [("", "")] * 2, "the group has to work afterwards"


def doomed(rank: int, store: str, mode: str, when: str) -> None:
    """Three ranks train; rank 1 stops in its third step. A fresh process: it ends as a training process would."""
    torch.set_num_threads(1)
    wait = datetime.timedelta(seconds=3)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=3, timeout=wait)
    x = torch.randn(4, 3, requires_grad=True)
    for step in range(3):
        last = rank == 1 and step == 2
        if last and when == "raises":
            raise RuntimeError("the data loader of rank 1 failed")
        if last and when == "hangs":
            time.sleep(60)
        if last and when == "dies before the loss":
            os.kill(os.getpid(), signal.SIGKILL)
        if last and when == "dies in the loss":
            fastclip.ops.similarity_sums = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
        loss = fastclip.clip_loss(x, x.flip(1), 10.0, group=Sharded(mode=mode))
        if last and when == "dies before backward":
            os.kill(os.getpid(), signal.SIGKILL)
        loss.backward()


@pytest.mark.parametrize("mode", ["gather", "ring"])
@pytest.mark.parametrize(
    "when", ["raises", "hangs", "dies before the loss", "dies in the loss", "dies before backward"]
)
def test_when_one_rank_stops_all_others_end_with_an_error(mode, when):
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        processes = [CONTEXT.Process(target=doomed, args=(rank, store, mode, when)) for rank in range(3)]
        for process in processes:
            process.start()
        started = time.monotonic()
        try:
            for process in (processes[0], processes[2]):
                process.join(30.0 - (time.monotonic() - started))
                assert process.exitcode, f"exit code {process.exitcode}"
            if when != "hangs":
                processes[1].join(5.0)
                assert processes[1].exitcode
        finally:
            for process in processes:
                process.kill()
                process.join()
