"""Gradient caching: the gradient of the whole batch, from encoders that see a few rows at a time.

Legend: image [N, D_image], text [N, D_text] inputs; features [N, D].
"""

import functools
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastclip import clip_loss, siglip_loss
from fastclip.clip import create_model
from fastclip.grad_cache import GradCache

N, PIECE = 23, 5  # four whole micro-batches and one of 3
PAGE = Path(__file__).parents[1] / "docs" / "grad_cache.md"


class Pair(nn.Module):
    """Two small encoders and a logit scale, float64: what is left of a difference is a mistake, not rounding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)).double()
        self.text = nn.Sequential(nn.Linear(3, 9), nn.Tanh(), nn.Linear(9, 4)).double()
        self.log_scale = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

    def encode_image(self, image: Tensor) -> Tensor:
        return self.image(image)

    def encode_text(self, text: Tensor) -> Tensor:
        return self.text(text)

    def loss(self, image: Tensor, text: Tensor) -> Tensor:
        return clip_loss(image, text, self.log_scale.exp())


@pytest.fixture
def pair() -> Pair:
    return Pair()


def batch(n: int = N) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(n, width, generator=generator, dtype=torch.float64) for width in (6, 3))


def gradients(model: nn.Module) -> list[Tensor]:
    """All parameters' gradients, which are then cleared."""
    found = [p.grad for p in model.parameters()]
    model.zero_grad()
    return found


def whole_batch(pair: Pair) -> list[Tensor]:
    image, text = batch()
    pair.loss(pair.image(image), pair.text(text)).backward()
    return gradients(pair)


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    "micro_batch",
    [1, PIECE, N - 1, N, 10 * N, [PIECE, N], [2, 7]],
    ids=["one-row", "ragged", "last-of-one", "whole", "larger", "one-tower", "each-its-own"],
)
def test_gradients_are_those_of_the_whole_batch(pair, micro_batch):
    want = whole_batch(pair)
    cached = GradCache([pair.encode_image, pair.encode_text], micro_batch)
    loss = pair.loss(*cached(*batch()))
    loss.backward()
    assert_same(gradients(pair), want)
    torch.testing.assert_close(loss, pair.loss(pair.image(batch()[0]), pair.text(batch()[1])))


def test_a_vision_transformer_at_batch_4096_is_as_near_to_float64_as_one_big_batch():
    """The size of the claim in docs/grad_cache.md; the model is as small as one with every kind of layer can be."""
    n, micro_batch = 4096, 64
    torch.manual_seed(0)
    model = create_model(
        "ViT-Ti/4@32px", embed_dim=32, image_size=16, patch_size=8, image_width=32, image_layers=1, image_head_width=16,
        text_width=32, text_layers=1, text_head_width=16, vocabulary=64, context=6,
    )  # fmt: skip
    images, tokens = torch.randn(n, 3, 16, 16), torch.randint(1, 64, (n, 6))

    clip_loss(*model(images, tokens)).backward()
    big = gradients(model)
    cached = GradCache([model.encode_image, model.encode_text], micro_batch)
    clip_loss(*cached(images, tokens), model.logit_scale).backward()
    small = gradients(model)
    clip_loss(*model.double()(images.double(), tokens)).backward()
    truth = gradients(model)

    def error(found: list[Tensor]) -> Tensor:
        return torch.stack([(f.double() - t).norm() / t.norm() for f, t in zip(found, truth, strict=True)])

    eps = torch.finfo(torch.float32).eps
    # Sums in another order are as good as each other on the whole, not for each parameter.
    assert error(small).mean() <= error(big).mean() + eps
    assert (error(small) <= 3 * error(big) + 8 * eps).all()


def test_any_loss_of_the_features(pair):
    image, text = batch()
    weight = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def losses(x: Tensor, y: Tensor) -> Tensor:
        first, stats = clip_loss(x, y, pair.log_scale.exp(), return_stats=True)
        assert stats.losses.shape == (N,)
        second = siglip_loss(x * weight, y, pair.log_scale.exp(), -1.0)
        # Another term of the same backward pass, through a parameter of the encoder.
        return 0.5 * first + second + pair.image[0].weight.square().sum()

    losses(pair.image(image), pair.text(text)).backward()
    want, want_weight = gradients(pair), weight.grad
    weight.grad = None
    losses(*GradCache([pair.image, pair.text], PIECE)(image, text)).backward()
    assert_same([*gradients(pair), weight.grad], [*want, want_weight])


def test_the_scale_may_be_computed_before_the_features(pair):
    """Autograd runs older nodes last: the scale's gradient then comes after the second pass."""
    want = whole_batch(pair)
    scale = pair.log_scale.exp()
    clip_loss(*GradCache([pair.image, pair.text], PIECE)(*batch()), scale).backward()
    assert_same(gradients(pair), want)


def test_gradients_add_up_over_calls_and_over_backward_passes(pair):
    want = whole_batch(pair)
    cached = GradCache([pair.image, pair.text], PIECE)
    loss = pair.loss(*cached(*batch())) / 2
    loss.backward(retain_graph=True)
    loss.backward()
    (pair.loss(*cached(*batch())) + pair.loss(*cached(*batch()))).backward()
    assert_same(gradients(pair), [3 * g for g in want])


def test_inputs_get_their_gradient(pair):
    image, text = batch()
    want = torch.autograd.grad(pair.loss(pair.image(image.requires_grad_()), pair.text(text)), image)
    upstream = 2 * image
    features = GradCache([pair.image, pair.text], PIECE)(upstream / 2, text)
    assert_same(list(torch.autograd.grad(pair.loss(*features), image)), list(want))


def test_inputs_of_every_structure(pair):
    image, text = batch()
    want = whole_batch(pair)
    seen = []

    def encode_image(left: Tensor, parts: dict, flag: str) -> Tensor:
        seen.append(flag)
        return pair.image(torch.cat([left, *parts["rest"]], dim=1))

    def encode_text(*, tokens: Tensor, mask: Tensor, scale: float) -> Tensor:
        assert mask.shape == (len(tokens),)
        return pair.text(tokens * mask[:, None] * scale)

    cached = GradCache([encode_image, encode_text], PIECE, modules=[pair])
    images = (image[:, :2], {"rest": [image[:, 2:3], image[:, 3:]]}, "as it is")
    texts = {"tokens": text, "mask": torch.full((N,), 0.5, dtype=torch.float64), "scale": 2.0}
    pair.loss(*cached(images, texts)).backward()
    assert_same(gradients(pair), want)
    assert set(seen) == {"as it is"}


def test_features_keep_shape_and_dtype():
    encoder = nn.Linear(6, 12).bfloat16()
    (features,) = GradCache([lambda x: encoder(x).view(-1, 3, 4)], PIECE, modules=[encoder])(
        torch.ones(N, 6).bfloat16()
    )
    assert features.shape == (N, 3, 4) and features.dtype == torch.bfloat16
    features.float().square().sum().backward()
    assert encoder.weight.grad.dtype == torch.bfloat16


def test_without_gradients_it_only_encodes(pair):
    calls = []
    pair.image.register_forward_hook(lambda module, args, out: calls.append(len(out)))
    with torch.no_grad():
        (features,) = GradCache([pair.image], PIECE)(batch()[0])
    assert not features.requires_grad and calls == [5, 5, 5, 5, 3]
    torch.testing.assert_close(features, pair.image(batch()[0]))


def test_a_frozen_encoder_is_not_encoded_again(pair):
    """As in LiT: one micro-batch is enough to see that nothing in it is trained."""
    pair.image.requires_grad_(False)
    calls = []
    pair.image.register_forward_hook(lambda module, args, out: calls.append(len(out)))
    image, text = batch()
    pair.loss(pair.image(image), pair.text(text)).backward()
    want = gradients(pair)
    calls.clear()
    pair.loss(*GradCache([pair.image, pair.text], PIECE)(image, text)).backward()
    got = gradients(pair)
    assert all(g is None for g in got[1:5]) and len(calls) == len(range(0, N, PIECE)) + 1
    assert_same([g for g in got if g is not None], [g for g in want if g is not None])


def test_an_encoder_that_the_loss_does_not_use_is_not_encoded_again(pair):
    calls = []
    pair.text.register_forward_hook(lambda module, args, out: calls.append(1))
    image, _ = GradCache([pair.image, pair.text], N)(*batch())
    image.sum().backward()
    assert len(calls) == 1 and pair.text[0].weight.grad is None and pair.image[0].weight.grad is not None


def test_methods_partials_and_compiled_modules_are_known(pair):
    want = whole_batch(pair)
    compiled = torch.compile(pair.text, backend="aot_eager")
    cached = GradCache([functools.partial(pair.encode_image), compiled], PIECE)
    assert cached.modules[0] is pair and cached.modules[1] is compiled
    pair.loss(*cached(*batch())).backward()
    assert_same(gradients(pair), want)


class TestErrors:
    def test_a_function_must_say_which_modules_it_runs(self, pair):
        with pytest.raises(ValueError, match=r"encoders\[1\] is neither .* modules="):
            GradCache([pair.image, lambda x: pair.text(x)], 4)

    @pytest.mark.parametrize("micro_batch", [0, -1, [4], [4, 0], [4, 4, 4]])
    def test_micro_batch(self, pair, micro_batch):
        with pytest.raises(ValueError, match="micro_batch"):
            GradCache([pair.image, pair.text], micro_batch)

    def test_number_of_inputs(self, pair):
        with pytest.raises(ValueError, match="one input per encoder, 2, got 1"):
            GradCache([pair.image, pair.text], 4)(batch()[0])

    @pytest.mark.parametrize(
        "value",
        [["a", "caption"], torch.tensor(1.0), torch.ones(0, 6), (torch.ones(4, 6), torch.ones(5, 6))],
        ids=["no-tensor", "0-d", "empty", "two-sizes"],
    )
    def test_inputs_that_cannot_be_cut(self, pair, value):
        with pytest.raises(ValueError, match=r"input 0 must hold tensors \[N, \.\.\.\] of one N >= 1, got"):
            GradCache([pair.image], 4)(value)

    @pytest.mark.parametrize(
        ("encoder", "error", "message"),
        [
            (lambda x: (x, x), TypeError, "floating-point tensor, got tuple"),
            (lambda x: x.argmax(1), TypeError, "floating-point tensor, got torch.int64"),
            (lambda x: x.sum(0), ValueError, r"4 rows, got shape \(6,\)"),
            (lambda x: torch.ones(9, 6), ValueError, r"4 rows, got shape \(9, 6\)"),
        ],
        ids=["tuple", "integers", "pooled", "rows"],
    )
    def test_encoders_that_do_not_return_one_row_per_row(self, encoder, error, message):
        with pytest.raises(error, match=message):
            GradCache([encoder], 4, modules=[])(batch()[0])

    def test_a_parameter_that_changes_before_backward(self, pair):
        loss = pair.loss(*GradCache([pair.image, pair.text], PIECE)(*batch()))
        with torch.no_grad():
            pair.image[0].weight.add_(1.0)
        with pytest.raises(RuntimeError, match="a parameter has changed"):
            loss.backward()

    def test_a_mode_that_changes_before_backward(self, pair):
        """Dropout would be off in the second pass."""
        loss = pair.loss(*GradCache([pair.image, pair.text], PIECE)(*batch()))
        pair.eval()
        with pytest.raises(RuntimeError, match=r"train\(\) or eval\(\)"):
            loss.backward()

    def test_an_optimizer_inside_backward(self, pair):
        """It would step after the first micro-batch."""
        optimizer = torch.optim.SGD([pair.image[0].weight], lr=1.0)
        pair.image[0].weight.register_post_accumulate_grad_hook(lambda p: optimizer.step())
        with pytest.raises(RuntimeError, match="a parameter has changed"):
            pair.loss(*GradCache([pair.image, pair.text], PIECE)(*batch())).backward()

    def test_an_input_that_changes_before_backward(self, pair):
        image, text = batch()
        loss = pair.loss(*GradCache([pair.image, pair.text], PIECE)(image, text))
        image.zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_second_derivatives(self, pair):
        loss = pair.loss(*GradCache([pair.image, pair.text], PIECE)(*batch()))
        with pytest.raises(RuntimeError, match="once only"):
            loss.backward(create_graph=True)


def test_the_page_s_examples():
    """Those for one process, in order; tests/test_grad_cache_parallel.py has the others."""
    torch.manual_seed(0)
    model = create_model("ViT-Ti/4@32px", image_layers=1, text_layers=1, vocabulary=64, context=6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    names = {"model": model, "images": torch.randn(96, 3, 32, 32), "tokens": torch.randint(1, 64, (96, 6))}
    names |= {"torch": torch, "device": "cpu", "optimizer": optimizer, "scaler": torch.amp.GradScaler("cpu")}
    before = model.image.project.weight.detach().clone()
    for section in PAGE.read_text().split("\n## "):
        if not section.startswith(("DistributedDataParallel", "FSDP2")):
            for snippet in re.findall(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE):
                exec(compile(snippet, PAGE.name, "exec"), names)
    assert names["image_features"].dtype == torch.bfloat16 and not torch.equal(before, model.image.project.weight)
