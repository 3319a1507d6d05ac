"""ClipLoss and SigLipLoss with world_size > 1, beside OpenCLIP's own on the same ranks."""

import importlib.util

import pytest
import torch
from rank_cases import module_step

import fastclip

pytestmark = pytest.mark.skipif(importlib.util.find_spec("open_clip") is None, reason="needs open_clip_torch")
RANKS = 4
X = torch.randn(4 * RANKS, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
X = X / X.norm(dim=1, keepdim=True)  # the modules take features as OpenCLIP's models return them
Y = X.roll(1, 0) * 0.3 + X.flip(1)
BOTH_SIDES = {"local_loss": True, "gather_with_grad": True}


def step(pool, whose: str, name: str, **options):
    """(mean of the ranks' values, each rank's value, averaged gradients, the warnings of rank 0)."""
    ranks = pool.run(module_step, whose, name, options, X, Y, 12.0)
    values = torch.stack([value for value, _, _ in ranks])
    return values.mean(), values, ranks[0][1], ranks[0][2]


def assert_same_gradients(got: dict, want: dict) -> None:
    for name in want:
        torch.testing.assert_close(
            got[name], want[name], rtol=1e-12, atol=1e-14, msg=lambda text, name=name: name + text
        )


@pytest.mark.parametrize("local_loss", [False, True])
@pytest.mark.parametrize("mode", ["gather", "ring"])
def test_clip_loss_is_open_clips_with_gather_with_grad(pool, local_loss, mode):
    want, _, grads, _ = step(pool, "open_clip", "ClipLoss", local_loss=local_loss, gather_with_grad=True)
    got, values, our_grads, told = step(
        pool, "fastclip", "ClipLoss", local_loss=local_loss, gather_with_grad=True, mode=mode
    )
    torch.testing.assert_close(got, want, rtol=1e-13, atol=0.0)
    assert (values == values[0]).all() and not told
    assert_same_gradients(our_grads, grads)


def test_open_clips_default_gives_the_encoders_one_rank_of_w_and_the_scale_all(pool):
    """What docs/distributed.md says of OpenCLIP's other settings."""
    want = step(pool, "open_clip", "ClipLoss", **BOTH_SIDES)[2]
    without = step(pool, "open_clip", "ClipLoss")[2]
    for name in ("image.weight", "text.weight"):
        torch.testing.assert_close(without[name] * RANKS, want[name], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(without["scale"], want["scale"], rtol=1e-12, atol=1e-14)
    # fastclip gives the whole batch's either way.
    assert_same_gradients(step(pool, "fastclip", "ClipLoss")[2], want)


def test_local_loss_alone_warns_once_and_is_right_all_the_same(pool):
    want = step(pool, "open_clip", "ClipLoss", **BOTH_SIDES)[2]
    theirs = step(pool, "open_clip", "ClipLoss", local_loss=True)[2]
    assert (theirs["image.weight"] * 2 - want["image.weight"]).norm() > 1e-3 * want["image.weight"].norm()
    told = []
    for _ in range(2):
        _, _, grads, warnings = step(pool, "fastclip", "ClipLoss", local_loss=True)
        assert_same_gradients(grads, want)
        told.extend(warnings)
    assert len(told) == 1 and "gather_with_grad" in told[0]


@pytest.mark.parametrize("dist_impl", ["bidir", "shift", "reduce", "gather", None])
def test_siglip_loss_is_open_clips(pool, dist_impl):
    want, _, grads, _ = step(pool, "open_clip", "SigLipLoss", dist_impl=dist_impl)
    got, values, our_grads, _ = step(pool, "fastclip", "SigLipLoss", dist_impl=dist_impl)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=0.0)
    assert (values == values[0]).all()
    assert_same_gradients(our_grads, grads)


def wrong_world(rank, group):
    x, messages = torch.ones(2, 3), []
    for options in ({"rank": rank, "world_size": RANKS + 1}, {"rank": rank + 1, "world_size": RANKS}):
        with pytest.raises(ValueError, match="do not fit the default process group") as caught:
            fastclip.ClipLoss(**options)(x, x, 1.0)
        messages.append(str(caught.value))
    return messages


def test_a_rank_or_world_size_that_is_not_the_groups(pool):
    messages = pool.run(wrong_world)
    assert "process group, rank=3 and world_size=4" in messages[3][0]


def test_what_runs_in_one_process_only_says_so():
    class Own(fastclip.ClipLoss):
        def get_logits(self, *args, **kwargs):
            return super().get_logits(*args, **kwargs)

    x = torch.ones(2, 3)
    with pytest.raises(NotImplementedError, match="makes its own logits runs in one process only, got world_size=2"):
        Own(world_size=2)(x, x, 1.0)
    with pytest.raises(NotImplementedError, match="Horovod"):
        fastclip.SigLipLoss(world_size=2, use_horovod=True)
    with pytest.raises(ValueError, match="dist_impl must be one of"):
        fastclip.SigLipLoss(dist_impl="tree")
