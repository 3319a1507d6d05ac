"""ClipLoss in OpenCLIP's place: the same constructor, arguments, values and gradients as open_clip 3.3.0's ClipLoss.

`OpenClipLoss` below is its formula for one process; where open_clip is installed, it is compared itself.
"""

import inspect

import pytest
import torch
import torch.nn.functional as F
from cases import device_of
from torch import nn

from fastclip import ClipLoss


class OpenClipLoss(nn.Module):
    """open_clip 3.3.0, loss.py, world_size = 1."""

    def __init__(
        self,
        local_loss=False,
        gather_with_grad=False,
        cache_labels=False,
        rank=0,
        world_size=1,
        use_horovod=False,
    ):
        super().__init__()

    def get_logits(self, image_features, text_features, logit_scale, logit_bias=None):
        logits_per_image = logit_scale * image_features @ text_features.T
        logits_per_text = logit_scale * text_features @ image_features.T
        if logit_bias is not None:
            logits_per_image += logit_bias
            logits_per_text += logit_bias
        return logits_per_image, logits_per_text

    def forward(self, image_features, text_features, logit_scale, logit_bias=None, output_dict=False):
        logits_per_image, logits_per_text = self.get_logits(image_features, text_features, logit_scale, logit_bias)
        labels = torch.arange(len(image_features), device=image_features.device)
        loss = (F.cross_entropy(logits_per_image, labels) + F.cross_entropy(logits_per_text, labels)) / 2
        return {"contrastive_loss": loss} if output_dict else loss


def open_clips():
    formula = pytest.param(OpenClipLoss, id="formula")
    try:
        from open_clip.loss import ClipLoss as Original
    except (ImportError, RuntimeError):  # the latter: a torchvision that does not fit torch
        return [formula]
    return [formula, pytest.param(Original, id="open_clip")]


originals = pytest.mark.parametrize("original", open_clips())


def batch(backend, n=17, d=12):
    generator = torch.Generator().manual_seed(3)
    image, text = (F.normalize(torch.randn(n, d, generator=generator), dim=1).to(device_of(backend)) for _ in range(2))
    return image, text


def run(module, image, text, log_scale, bias, **options):
    leaves = [t.clone().requires_grad_() for t in (image, text, log_scale) + (() if bias is None else (bias,))]
    extra = {} if bias is None else {"logit_bias": leaves[3]}
    loss = module(leaves[0], leaves[1], leaves[2].exp(), **extra, **options)
    loss = loss["contrastive_loss"] if options.get("output_dict") else loss
    return [loss, *torch.autograd.grad(loss, leaves)]


@originals
def test_the_same_constructor_and_forward(original):
    theirs = inspect.signature(original.__init__).parameters
    ours = inspect.signature(ClipLoss.__init__).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    assert all(ours[name].default == parameter.default for name, parameter in theirs.items())
    for method in ("forward", "get_logits"):
        names = [list(inspect.signature(getattr(kind, method)).parameters) for kind in (ClipLoss, original)]
        assert names[0] == names[1]


@originals
@pytest.mark.parametrize("bias", [None, torch.tensor(-10.0), torch.tensor([-10.0])], ids=["none", "0-d", "one"])
@pytest.mark.parametrize("options", [{}, {"output_dict": True}], ids=["tensor", "dict"])
def test_the_same_values_and_gradients(backend, original, bias, options):
    image, text = batch(backend)
    bias = bias if bias is None else bias.to(image.device)
    log_scale = torch.tensor(2.6592, device=image.device)
    got = run(ClipLoss(cache_labels=True, backend=backend), image, text, log_scale, bias, **options)
    want = run(original(cache_labels=True), image, text, log_scale, bias, **options)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-6)
    if bias is not None:
        assert torch.equal(got[-1], torch.zeros_like(bias))


@originals
def test_a_fixed_bias_and_a_plain_scale(backend, original):
    image, text = batch(backend)
    got = ClipLoss(backend=backend)(image, text, 14.3, logit_bias=-10.0)
    torch.testing.assert_close(got, original()(image, text, 14.3, logit_bias=-10.0), rtol=1e-5, atol=1e-6)


@originals
def test_features_are_taken_as_they_are(backend, original):
    image, text = (3 * side for side in batch(backend))
    torch.testing.assert_close(ClipLoss(backend=backend)(image, text, 1.5), original()(image, text, 1.5))


@originals
def test_get_logits(original):
    image, text = batch("cpu")
    for bias in (None, -10.0):
        both = (loss.get_logits(image, text, 14.3, bias) for loss in (ClipLoss(), original()))
        for got, want in zip(*both, strict=True):
            torch.testing.assert_close(got, want)


def test_ground_truth():
    assert ClipLoss().get_ground_truth(torch.device("cpu"), 5).tolist() == [0, 1, 2, 3, 4]


class Captioned(ClipLoss):
    """As OpenCLIP's CoCaLoss: a term beside the parent's."""

    def __init__(self, caption_weight, **options):
        super().__init__(**options)
        self.caption_weight = caption_weight

    def forward(self, image_features, text_features, caption_loss, logit_scale):
        return super().forward(image_features, text_features, logit_scale) + self.caption_weight * caption_loss


class Distilled(ClipLoss):
    """As OpenCLIP's DistillClipLoss: its own loss from get_logits and get_ground_truth."""

    def forward(self, image_features, text_features, logit_scale):
        per_image, per_text = self.get_logits(image_features, text_features, logit_scale)
        labels = self.get_ground_truth(image_features.device, len(per_image))
        return (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2


def test_subclasses(backend):
    image, text = batch(backend)
    plain = ClipLoss(backend=backend)(image, text, 14.3)
    captioned = Captioned(2.0, backend=backend)(image, text, torch.tensor(1.5, device=image.device), 14.3)
    torch.testing.assert_close(captioned, plain + 3.0)
    torch.testing.assert_close(Distilled(backend=backend)(image, text, 14.3), plain)


class Cooler(ClipLoss):
    """Changes the logits themselves and leaves forward to its parent, which OpenCLIP's ClipLoss allows."""

    def get_logits(self, image_features, text_features, logit_scale, logit_bias=None):
        per_image, per_text = super().get_logits(image_features, text_features, logit_scale, logit_bias)
        return per_image / 2, per_text / 2


def test_a_subclass_with_other_logits_gets_the_loss_of_those(backend):
    image, text = batch(backend)
    expected = ClipLoss(backend=backend)(image, text, 14.3 / 2)
    torch.testing.assert_close(Cooler(backend=backend)(image, text, 14.3), expected)


def test_no_parameters_and_a_state_that_loads(backend):
    module = ClipLoss(backend=backend)
    assert not list(module.parameters()) and not module.state_dict()


def test_several_processes_need_a_process_group():
    x = torch.randn(4, 3)
    with pytest.raises(ValueError, match="init_process_group"):
        ClipLoss(world_size=2)(x, x, 1.0)
