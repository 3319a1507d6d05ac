"""The benchmark over two processes, on a batch too small to say anything about time."""

import pytest
import torch

from fastclip.benchmarks import sharded
from fastclip.benchmarks.children import ChildError


def test_every_way_is_checked_timed_and_weighed(monkeypatch):
    monkeypatch.setattr(sharded, "QUICK", ((64, 1),))
    lines = sharded.measure(quick=True)
    assert [(line["loss"], line["way"]) for line in lines] == [(case.loss, case.way) for case in sharded.cases()]
    assert all(line["s"] > 0 and line["N"] == 64 and line["peak MiB per rank"] >= 0 for line in lines)


def wrong(rank: int) -> None:
    sharded.clip_loss = lambda x, y, scale, **options: (x * y).sum() * scale
    sharded.check(rank, sharded.Case("clip", "fastclip gather"))


def test_a_wrong_result_is_not_timed():
    with pytest.raises(ChildError, match=r"clip, fastclip gather: loss is .* away from the reference"):
        sharded.on_ranks(wrong)


def test_the_ranks_shares_are_the_batch():
    whole = sharded.batch(10)
    shares = [sharded.share(10, rank) for rank in range(sharded.RANKS)]
    for side in (0, 1):
        torch.testing.assert_close(torch.cat([share[side] for share in shares]), whole[side], rtol=0, atol=0)
