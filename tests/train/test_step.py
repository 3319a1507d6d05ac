"""One optimiser step: the same as a plain loop, and what happens when it goes wrong."""

import math
from dataclasses import replace

import pytest
import torch
from tiny import MODEL

from fastclip import clip_loss, siglip_loss
from fastclip.clip import CausalTextConfig, Clip, VitConfig
from fastclip.data.batch import Batch
from fastclip.errors import UserError
from fastclip.train.config import ModelConfig, OptimizerConfig, PrecisionConfig, TrainConfig
from fastclip.train.optimizer import make_optimizer
from fastclip.train.parallel import World
from fastclip.train.schedule import Schedule
from fastclip.train.step import TrainStep
from fastclip.train.towers import make_encode
from fastclip.train.trainer import make_state

ALONE = World(0, 1, torch.device("cpu"), None)
VIT = replace(
    MODEL,
    image=VitConfig(image_size=8, patch_size=4, width=8, layers=2, head_width=4),
    text=CausalTextConfig(vocabulary=60, context=8, width=8, layers=2, head_width=4),
)
STEPS, BATCH = 3, 6
# The bias of the keys has no gradient but rounding errors; a larger eps keeps Adam from making steps of them.
ADAM = OptimizerConfig(learning_rate=1e-2, eps=1e-3)


def model_of(config, **changes):
    torch.manual_seed(0)
    return Clip(replace(config, **changes))


def batches(number=STEPS):
    generator = torch.Generator().manual_seed(1)
    for _ in range(number):
        tokens = torch.randint(1, 59, (BATCH, 8), generator=generator)
        tokens[:, -1] = 59  # the end of text
        yield Batch(torch.randn(BATCH, 3, 8, 8, generator=generator), tokens)


def stepper(clip, /, world=ALONE, **changes):
    config = TrainConfig(batch=BATCH, **{"optimizer": ADAM, **changes})
    state = make_state(clip, config, world)
    step = TrainStep(state, make_encode(clip, config, world), Schedule(STEPS, 1), config, world)
    step.training_mode()
    return step


def trained(clip, /, **changes):
    """(the results of the steps, the weights after them)."""
    step = stepper(clip, **changes)
    # The default loss scale of fp16 is lowered in its first steps, without updates.
    step.state.scaler = torch.amp.GradScaler("cpu", init_scale=128.0, enabled=step.state.scaler.is_enabled())
    return [step(batch) for batch in batches()], {name: p.detach().clone() for name, p in clip.named_parameters()}


def plain(model, loss, *, clip_norm=None):
    """What a loop written by hand does: AdamW, cosine, no decay of gains, biases and the scale."""
    decay = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": 0.2}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-3)
    model.train()
    losses = []
    for i, batch in enumerate(batches()):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1.0 if i == 0 else 0.5 * (1 + math.cos(math.pi * (i - 1) / (STEPS - 1))))
        value = loss(model, batch)
        optimizer.zero_grad()
        value.backward()
        if clip_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
        with torch.no_grad():
            model.log_scale.clamp_(0, math.log(100))
        losses.append(value.item())
    return losses, dict(model.named_parameters())


def clip(model, batch):
    return clip_loss(model.image(batch.images), model.text(batch.tokens), model.logit_scale)


def siglip(model, batch):
    return siglip_loss(model.image(batch.images), model.text(batch.tokens), model.logit_scale, model.logit_bias)


def assert_close(got, want, rtol=1e-4, atol=1e-5):
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=rtol, atol=atol, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("clip_norm", [None, 0.05])
def test_steps_are_those_of_a_plain_loop(clip_norm):
    results, got = trained(model_of(VIT), optimizer=replace(ADAM, clip_norm=clip_norm))
    losses, want = plain(model_of(VIT), clip, clip_norm=clip_norm)
    assert [r.loss for r in results] == pytest.approx(losses, rel=1e-5)
    assert all(r.gradient_norm > 0.05 for r in results)  # so that clipping bites
    assert_close(got, want)


def test_siglip_steps_are_those_of_a_plain_loop_and_move_the_bias():
    results, got = trained(model_of(VIT, init_bias=-10.0), loss="siglip")
    losses, want = plain(model_of(VIT, init_bias=-10.0), siglip)
    assert [r.loss for r in results] == pytest.approx(losses, rel=1e-5)
    assert_close(got, want)
    assert got["logit_bias"].item() != -10.0


@pytest.mark.parametrize(
    "changes", [{"micro_batch": 4}, {"model": ModelConfig(recompute=True)}], ids=["micro", "recompute"]
)
def test_saving_memory_changes_nothing(changes):
    want = trained(model_of(VIT))
    got = trained(model_of(VIT), **changes)
    assert [r.loss for r in got[0]] == pytest.approx([r.loss for r in want[0]], rel=1e-5)
    assert_close(got[1], want[1])


def test_micro_batches_hold_fewer_activations():
    def peak(**changes):
        """Bytes of the tensors that autograd holds at most at once, in the forward passes of one step."""
        held, most = 0, 0
        step = stepper(model_of(VIT), **changes)

        class Held:
            def __init__(self, tensor):
                nonlocal held, most
                self.tensor, self.bytes = tensor, tensor.numel() * tensor.element_size()
                held += self.bytes
                most = max(most, held)

            def __del__(self):
                nonlocal held
                held -= self.bytes

        with torch.autograd.graph.saved_tensors_hooks(Held, lambda kept: kept.tensor):
            step(next(batches()))
        return most

    assert peak(micro_batch=2) < 0.6 * peak()


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_equal_captions_reach_the_loss(loss):
    model = model_of(VIT, init_bias=-10.0)
    batch = next(batches())
    ids = torch.tensor([1, 2, 1, 3, 4, 2])
    plain = stepper(model, loss=loss)
    value, _ = plain.loss(replace(batch, pair_ids=ids), accuracy=False)
    image, text = model.image(batch.images), model.text(batch.tokens)
    if loss == "clip":
        want = clip_loss(image, text, model.logit_scale, ids=ids)
    else:
        want = siglip_loss(image, text, model.logit_scale, model.logit_bias, ids=ids)
    assert value.item() == pytest.approx(want.item(), rel=1e-5) != plain.loss(batch, accuracy=False)[0].item()


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_low_precision_learns_nearly_the_same(dtype):
    want, _ = trained(model_of(VIT))
    got, weights = trained(model_of(VIT), precision=PrecisionConfig(dtype=dtype))
    assert [r.loss for r in got] == pytest.approx([r.loss for r in want], rel=0.05)
    assert all(p.dtype == torch.float32 for p in weights.values())


def test_locked_image_tower_is_not_touched():
    model = model_of(MODEL)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    results, _ = trained(model, model=ModelConfig(lock_image=True))
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before if name.startswith("image."))
    assert not torch.equal(after["text.project.weight"], before["text.project.weight"])
    assert not any(part.training for part in model.image.modules()) and results[-1].loss < results[0].loss


def test_locked_image_tower_in_micro_batches():
    want = trained(model_of(VIT), model=ModelConfig(lock_image=True))
    got = trained(model_of(VIT), model=ModelConfig(lock_image=True), micro_batch=4)
    assert_close(got[1], want[1])


def test_average_of_the_weights():
    model = model_of(VIT)
    step = stepper(model, optimizer=OptimizerConfig(learning_rate=1e-2, ema=0.75))
    want = {name: p.detach().clone() for name, p in model.named_parameters()}
    for batch in batches():
        step(batch)
        want = {name: 0.75 * want[name] + 0.25 * p.detach() for name, p in model.named_parameters()}
    assert_close(step.state.average.weights, want, rtol=1e-5, atol=1e-6)


def test_average_is_swapped_in_and_out():
    model = model_of(VIT)
    step = stepper(model, optimizer=OptimizerConfig(learning_rate=1e-2, ema=0.75))
    step(next(batches()))
    average, trained_weights = step.state.average, [p.detach().clone() for p in model.parameters()]
    averages = [tensor.clone() for tensor in average.weights.values()]
    average.swap()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), averages, strict=True))
    average.swap()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), trained_weights, strict=True))


def test_step_that_is_not_finite_is_skipped_and_counted():
    model = model_of(VIT)
    step = stepper(model)
    step(next(batches()))
    before = [p.detach().clone() for p in model.parameters()]
    moments = {name: t.clone() for name, t in step.state.moments().items()}
    bad = next(batches())
    bad.images[0, 0, 0, 0] = math.inf
    result = step(bad)
    assert result.skipped and step.state.skipped == step.state.skipped_in_a_row == 1
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert all(torch.equal(t, moments[name]) for name, t in step.state.moments().items())
    assert not step(next(batches())).skipped and step.state.skipped_in_a_row == 0 and step.state.skipped == 1
    assert step.state.step == 3


def test_too_many_skips_in_a_row_end_the_run_with_step_and_value():
    step = stepper(model_of(VIT), optimizer=OptimizerConfig(skips=2))
    bad = next(batches())
    bad.images.fill_(math.nan)
    step(bad)
    step(bad)
    with pytest.raises(UserError, match=r"the loss became nan at step 3 .*logit scale 14\.3.* 3 step"):
        step(bad)


@pytest.mark.parametrize(("before", "after"), [(99.99, 100.0), (1.001, 1.0)], ids=["high", "low"])
def test_scale_is_clamped_after_the_step(before, after):
    model = model_of(VIT)
    step = stepper(model, optimizer=OptimizerConfig(learning_rate=1e-2, scale_rate=100.0))
    model.log_scale.data.fill_(math.log(before))
    # A step of one learning rate times 100 in the direction that the gradient says.
    wanted = 1.0 if after == 100.0 else -1.0
    model.log_scale.register_hook(lambda gradient: -wanted * gradient.abs())
    result = step(next(batches()))
    assert result.clamped and result.scale == pytest.approx(after, rel=1e-5) and step.state.clamped == 1


def test_scale_that_is_not_a_number_stops_the_run():
    model = model_of(VIT)
    step = stepper(model, optimizer=OptimizerConfig(skips=0))
    model.log_scale.data.fill_(math.nan)
    with pytest.raises(UserError, match=r"loss became nan at step 1 \(logit scale nan\)"):
        step(next(batches()))


def test_a_single_pair_for_batch_normalisation_is_refused_beforehand():
    with pytest.raises(UserError, match="more than one pair: 6 pairs of each process in pieces of 5 leave one"):
        stepper(model_of(MODEL), micro_batch=5)


def test_only_matrices_decay_and_the_scale_has_its_own_rate():
    for described, betas, eps in ((VIT, (0.9, 0.98), 1e-6), (MODEL, (0.9, 0.999), 1e-8)):
        model = model_of(described, init_bias=-10.0)
        optimizer = make_optimizer(model, OptimizerConfig(scale_rate=10.0))
        matrices, vectors, scalars = optimizer.param_groups
        assert {p.ndim for p in vectors["params"]} == {1} and min(p.ndim for p in matrices["params"]) == 2
        assert [p is q for p, q in zip(scalars["params"], (model.log_scale, model.logit_bias), strict=True)] == [
            True
        ] * 2
        assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
        assert [g["weight_decay"] for g in optimizer.param_groups] == [0.2, 0.0, 0.0]
        assert [g["factor"] for g in optimizer.param_groups] == [1.0, 1.0, 10.0]
        assert (optimizer.defaults["betas"], optimizer.defaults["eps"]) == (betas, eps) and optimizer.defaults["fused"]
