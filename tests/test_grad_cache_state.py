"""The second pass of gradient caching finds what the first one found; and what both of them hold.

The oracle is the same micro-batches with their graphs kept: what the encoders do to a micro-batch is then the same.
"""

import pytest
import torch
from torch import Tensor, nn

from fastclip import clip_loss
from fastclip.clip import create_model
from fastclip.grad_cache import GradCache

N, PIECE = 23, 5  # four whole micro-batches and one of 3
WIDTH = 8


class Encoders(nn.Module):
    """Two encoders with `middle` inside, float64, and a logit scale."""

    def __init__(self, middle: type[nn.Module], *args: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = (
            nn.Sequential(nn.Linear(6, WIDTH), middle(*args), nn.Tanh(), nn.Linear(WIDTH, 4)).double() for _ in range(2)
        )
        self.scale = nn.Parameter(torch.tensor(3.0, dtype=torch.float64))

    def loss(self, image: Tensor, text: Tensor) -> Tensor:
        return clip_loss(image, text, self.scale)


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(N, 6, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))


def with_graphs(model: Encoders, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The features of the same micro-batches in the same order, each with its graph."""
    towers = (model.image, model.text)
    return tuple(torch.cat([tower(x) for x in own.split(PIECE)]) for tower, own in zip(towers, inputs, strict=True))


def cached(model: Encoders, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return GradCache([model.image, model.text], PIECE)(*inputs)


def gradients(model: nn.Module) -> list[Tensor]:
    found = [p.grad for p in model.parameters()]
    model.zero_grad()
    return found


def buffers(model: nn.Module) -> list[Tensor]:
    return [b.clone() for b in model.buffers()]


def assert_same(got: object, want: object) -> None:
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)


class Counting(nn.Module):
    """Its output depends on a buffer that every forward pass changes, as spectral normalisation's does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return x * self.calls.clone()


class TestRandomNumbers:
    def test_dropout_masks_are_the_first_pass_s(self):
        model = Encoders(nn.Dropout, 0.5)
        torch.manual_seed(7)
        features = with_graphs(model, batch())
        after = torch.rand(3)
        model.loss(*features).backward()
        want = gradients(model)
        torch.manual_seed(7)
        features = cached(model, batch())
        assert_same(torch.rand(3), after)
        model.loss(*features).backward()
        assert_same(gradients(model), want)

    def test_backward_leaves_the_generator_where_it_was(self):
        model = Encoders(nn.Dropout, 0.5)
        loss = model.loss(*cached(model, batch()))
        torch.manual_seed(8)
        expected = torch.rand(3)
        torch.manual_seed(8)
        loss.backward()
        assert_same(torch.rand(3), expected)

    def test_a_gradient_with_other_masks_would_differ(self):
        """That the oracle can tell."""
        model = Encoders(nn.Dropout, 0.5)
        found = []
        for seed in (7, 8):
            torch.manual_seed(seed)
            model.loss(*with_graphs(model, batch())).backward()
            found.append(gradients(model))
        assert (found[0][1] - found[1][1]).abs().max() > 1e-3


class TestBuffers:
    def test_running_statistics_move_once(self):
        one, two = Encoders(nn.BatchNorm1d, WIDTH), Encoders(nn.BatchNorm1d, WIDTH)
        features = with_graphs(one, batch())
        expected = buffers(one)
        one.loss(*features).backward()
        features = cached(two, batch())
        assert_same(buffers(two), expected)
        two.loss(*features).backward()
        assert_same(buffers(two), expected)
        assert_same(gradients(two), gradients(one))
        assert expected[2] == 5  # num_batches_tracked: micro-batches, not passes

    def test_batch_norm_sees_micro_batches_in_training_and_none_in_evaluation(self):
        """docs/grad_cache.md says so: the whole batch's statistics would need all activations at once."""
        model = Encoders(nn.BatchNorm1d, WIDTH)
        results = []
        for training in (True, False):
            model.train(training)
            model.loss(model.image(batch()[0]), model.text(batch()[1])).backward()
            want = gradients(model)
            model.loss(*cached(model, batch())).backward()
            results.append(max((g - w).abs().max().item() for g, w in zip(gradients(model), want, strict=True)))
        assert results[0] > 1e-3 and results[1] < 1e-13

    def test_a_forward_pass_between_the_call_and_backward_counts(self):
        model = Encoders(nn.BatchNorm1d, WIDTH)
        loss = model.loss(*cached(model, batch()))
        with torch.no_grad():
            model.image(batch()[0])
        expected = buffers(model)
        loss.backward()
        assert_same(buffers(model), expected)

    def test_outputs_that_depend_on_a_changing_buffer(self):
        one, two = Encoders(Counting), Encoders(Counting)
        one.loss(*with_graphs(one, batch())).backward()
        two.loss(*cached(two, batch())).backward()
        assert_same(gradients(two), gradients(one))
        assert [b.item() for b in two.buffers()] == [5, 5]

    def test_one_encoder_for_both_inputs(self):
        one, two = Encoders(Counting), Encoders(Counting)
        image, text = batch()
        clip_loss(*(torch.cat([one.image(x) for x in own.split(PIECE)]) for own in (image, text)), one.scale).backward()
        clip_loss(*GradCache([two.image, two.image], PIECE)(image, text), two.scale).backward()
        found, want = gradients(two), gradients(one)
        assert_same([g for g in found if g is not None], [g for g in want if g is not None])


class TestMixedPrecision:
    @pytest.mark.parametrize("backward_inside", [False, True], ids=["backward-outside", "backward-inside"])
    def test_autocast_is_the_first_pass_s(self, backward_inside):
        """The oracle rounds the weights anew for each micro-batch, or it would add up their gradients in bfloat16."""
        model = Encoders(nn.Identity).float()
        found = []
        for encode, keep_rounded in ((with_graphs, False), (cached, True)):
            with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=keep_rounded):
                features = encode(model, batch(torch.float32))
                assert features[0].dtype == torch.bfloat16
                loss = model.loss(*features)
                if backward_inside:
                    loss.backward()
            if not backward_inside:
                loss.backward()
            found.append(gradients(model))
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-7)

    def test_without_autocast_around_the_call_there_is_none_in_backward(self):
        model = Encoders(nn.Identity).float()
        model.loss(*with_graphs(model, batch(torch.float32))).backward()
        want = gradients(model)
        loss = model.loss(*cached(model, batch(torch.float32)))
        seen = []
        model.image.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss.backward()
        assert set(seen) == {torch.float32}
        torch.testing.assert_close(gradients(model), want, rtol=0.02, atol=1e-3)

    def test_a_scaled_loss_gives_scaled_gradients(self):
        model = Encoders(nn.Identity).float()
        model.loss(*cached(model, batch(torch.float32))).backward()
        want = gradients(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        before = [p.detach().clone() for p in model.parameters()]
        scaler.scale(model.loss(*cached(model, batch(torch.float32)))).backward()
        torch.testing.assert_close([p.grad / 2**10 for p in model.parameters()], want)
        scaler.step(optimizer)
        scaler.update()
        after = [p.detach() for p in model.parameters()]
        torch.testing.assert_close(after, [b - g for b, g in zip(before, want, strict=True)])

    def test_a_loss_that_overflows_skips_the_step(self):
        model = Encoders(nn.Identity).float()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        before = [p.detach().clone() for p in model.parameters()]
        scaler.scale(model.loss(*cached(model, batch(torch.float32))) * float("inf")).backward()
        scaler.step(optimizer)
        scaler.update()
        torch.testing.assert_close([p.detach() for p in model.parameters()], before, rtol=0, atol=0)
        assert scaler.get_scale() == 2.0**9


class Held:
    """Bytes of activations that autograd holds: now, and the most at any time."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def watched(self):
        # Detached: an output that its own node keeps would never be freed.
        return torch.autograd.graph.saved_tensors_hooks(lambda t: _Saved(t.detach(), self), lambda saved: saved.tensor)


class _Saved:
    def __init__(self, tensor: Tensor, held: Held) -> None:
        self.tensor, self.held, self.bytes = tensor, held, tensor.nbytes
        held.now += self.bytes
        held.most = max(held.most, held.now)

    def __del__(self) -> None:
        self.held.now -= self.bytes


def small_vit() -> nn.Module:
    torch.manual_seed(0)
    return create_model(
        "ViT-Ti/4@32px", embed_dim=32, image_size=16, patch_size=4, image_width=32, image_layers=2, image_head_width=16,
        text_width=32, text_layers=2, text_head_width=16, vocabulary=64, context=6,
    )  # fmt: skip


def test_what_is_held_is_one_micro_batch_and_the_features():
    """1024 rows in micro-batches of 32: one graph of all would hold 32 times as much."""
    n, piece = 1024, 32
    model = small_vit()
    images, tokens = torch.randn(n, 3, 16, 16), torch.randint(1, 64, (n, 6))

    def peak(rows: int, encode) -> int:
        held = Held()
        with held.watched():
            clip_loss(*encode(images[:rows], tokens[:rows]), model.logit_scale).backward()
        assert held.now == 0
        return held.most

    cache = GradCache([model.encode_image, model.encode_text], piece)
    one_micro_batch = peak(piece, lambda x, y: model(x, y)[:2])
    inputs_and_features = images.nbytes + tokens.nbytes + 2 * 4 * n * 32
    found = peak(n, cache)
    assert found <= one_micro_batch + 2 * inputs_and_features
    assert peak(n, lambda x, y: model(x, y)[:2]) > 4 * found


def test_the_call_keeps_the_inputs_and_no_activation():
    model = small_vit()
    images, tokens = torch.randn(256, 3, 16, 16), torch.randint(1, 64, (256, 6))
    held = Held()
    with held.watched():
        features = GradCache([model.encode_image, model.encode_text], 32)(images, tokens)
    assert held.most == images.nbytes + tokens.nbytes
    del features
    assert held.now == 0


def test_checkpointing_inside_an_encoder():
    model = small_vit()
    images, tokens = torch.randn(16, 3, 16, 16), torch.randint(1, 64, (16, 6))
    found = []
    for recompute in (False, True):
        model.set_grad_checkpointing(recompute)
        features = GradCache([model.encode_image, model.encode_text], 5)(images, tokens)
        clip_loss(*features, model.logit_scale).backward()
        found.append(gradients(model))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-7)
