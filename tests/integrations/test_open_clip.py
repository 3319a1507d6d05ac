"""fastclip.integrations.open_clip against OpenCLIP itself.

Legend: image, text [N, D] features of length 1, as OpenCLIP's models return them; V words, T tokens a caption.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from accounting import saved_bytes

open_clip = pytest.importorskip("open_clip")

from open_clip import factory, model  # noqa: E402
from open_clip import loss as theirs  # noqa: E402

import fastclip  # noqa: E402
from fastclip.integrations import open_clip as ours  # noqa: E402

NAMES = ("ClipLoss", "CoCaLoss", "DistillClipLoss", "SigLipLoss")
ORIGINAL = {name: getattr(theirs, name) for name in NAMES}
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}


@pytest.fixture
def patched():
    ours.patch()
    yield
    ours.unpatch()


def pair(n: int, d: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(n, d, generator=generator, dtype=torch.float64)
    text = image + torch.randn(n, d, generator=generator, dtype=torch.float64)
    return F.normalize(image).to(dtype), F.normalize(text).to(dtype)


def run(loss, **inputs) -> dict[str, torch.Tensor]:
    """Everything the loss returns and its sum's gradient in every input that wants one, by name."""
    inputs = {
        name: value.detach().clone().requires_grad_(value.requires_grad) if torch.is_tensor(value) else value
        for name, value in inputs.items()
    }
    results = loss(**inputs, output_dict=True)
    sum(results.values()).backward()
    grads = {f"grad {name}": value.grad for name, value in inputs.items() if torch.is_tensor(value)}
    return {**results, **{name: grad for name, grad in grads.items() if grad is not None}}


def agree(got: dict, want: dict, tolerance: float) -> None:
    assert list(got) == list(want)
    for name, value in want.items():
        limit = tolerance * max(1.0, value.abs().max().item())
        torch.testing.assert_close(
            got[name], value, rtol=0.0, atol=limit, msg=lambda text, name=name: f"{name}: {text}"
        )


def features(n: int, d: int, dtype: torch.dtype, *names: str, seed: int = 0) -> dict[str, torch.Tensor]:
    image, text = pair(n, d, dtype, seed)
    tensors = {"image_features": image, "text_features": text}
    tensors |= {name: torch.tensor(value, dtype=dtype) for name, value in SCALARS.items() if name in names}
    return {name: value.requires_grad_() for name, value in tensors.items()}


TEACHER = ("dist_image_features", "dist_text_features", "dist_logit_scale")
SCALARS = {"logit_scale": 14.3, "logit_bias": -9.5}
# One pair has no negatives; 7 and 130 end within and beyond a tile of the kernels.
SIZES = pytest.mark.parametrize("n, d", [(1, 4), (7, 5), (130, 32)], ids=["one", "tile+1", "ragged"])
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float64", "float32"])
BIAS = pytest.mark.parametrize("names", [("logit_scale",), ("logit_scale", "logit_bias")], ids=["no bias", "bias"])


@SIZES
@DTYPES
@BIAS
@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_loss_and_gradients_are_open_clips(name, n, d, dtype, names):
    inputs = features(n, d, dtype, *names)
    inputs.setdefault("logit_bias", None)
    got, want = run(getattr(ours, name)(), **inputs), run(ORIGINAL[name](), **inputs)
    agree(got, want, TOLERANCE[dtype])


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_without_output_dict_the_loss_is_a_tensor(name):
    image, text = pair(9, 4)
    got, want = (module()(image, text, 10.0, -3.0) for module in (getattr(ours, name), ORIGINAL[name]))
    torch.testing.assert_close(got, want)


@DTYPES
@pytest.mark.parametrize("weights", [(2.0, 0.5), (2.0, 0)], ids=["both", "caption only"])
def test_coca_loss_is_open_clips(dtype, weights):
    n, words, tokens = 6, 11, 4
    inputs = features(n, 8, dtype, "logit_scale")
    generator = torch.Generator().manual_seed(1)
    inputs["logits"] = torch.randn(n, tokens, words, generator=generator, dtype=dtype).requires_grad_()
    inputs["labels"] = torch.randint(0, words, (n, tokens), generator=generator)
    settings = {"caption_loss_weight": weights[0], "clip_loss_weight": weights[1], "pad_id": 3}
    got, want = (run(module(**settings), **inputs) for module in (ours.CoCaLoss, ORIGINAL["CoCaLoss"]))
    agree(got, want, TOLERANCE[dtype])


@DTYPES
def test_distill_loss_is_open_clips(dtype):
    inputs = features(9, 8, dtype, "logit_scale")
    inputs |= dict(zip(TEACHER, (*pair(9, 5, dtype, seed=1), 30.0), strict=True))
    got, want = (run(module(), **inputs) for module in (ours.DistillClipLoss, ORIGINAL["DistillClipLoss"]))
    agree(got, want, TOLERANCE[dtype])


@pytest.mark.parametrize("negative_only", [False, True])
def test_siglip_block_loss_is_open_clips(negative_only):
    inputs = features(7, 5, torch.float64, *SCALARS)
    got, want = (
        module()._loss(*inputs.values(), negative_only=negative_only) for module in (ours.SigLipLoss, theirs.SigLipLoss)
    )
    torch.testing.assert_close(got, want)
    for g, w in zip(*(torch.autograd.grad(x, list(inputs.values())) for x in (got, want)), strict=True):
        torch.testing.assert_close(g, w)


def arguments(**changes) -> SimpleNamespace:
    """What open_clip_train's command line hands to create_loss."""
    defaults = {
        "distill": False,
        "model": "ViT-B-32",
        "siglip": False,
        "local_loss": False,
        "gather_with_grad": False,
        "rank": 0,
        "world_size": 1,
        "horovod": False,
        "loss_dist_impl": None,
        "coca_caption_loss_weight": 2.0,
        "coca_contrastive_loss_weight": 1.0,
    }
    return SimpleNamespace(**defaults | changes)


LOSS_OF = {
    "ClipLoss": arguments(),
    "CoCaLoss": arguments(model="coca_ViT-B-32"),
    "DistillClipLoss": arguments(distill=True),
    "SigLipLoss": arguments(siglip=True),
}


@pytest.mark.parametrize("name", NAMES)
def test_patch_replaces_what_create_loss_builds(name, patched):
    loss = open_clip.create_loss(LOSS_OF[name])
    assert type(loss) is getattr(ours, name)
    assert isinstance(loss, (fastclip.ClipLoss, fastclip.SigLipLoss)) and isinstance(loss, ORIGINAL[name])


@pytest.mark.parametrize("name", NAMES)
def test_patch_and_unpatch_twice_are_once(name):
    for swap, expected in ((ours.patch, getattr(ours, name)), (ours.unpatch, ORIGINAL[name])):
        for _ in range(2):
            swap()
            holders = [holder for holder in (open_clip, theirs, factory) if hasattr(holder, name)]
            assert len(holders) >= 2 and all(getattr(holder, name) is expected for holder in holders)
    assert type(open_clip.create_loss(LOSS_OF[name])) is ORIGINAL[name]


def test_several_processes_without_a_group_raise_and_do_not_train_on_something_else(patched):
    with pytest.raises(ValueError, match="init_process_group"):
        open_clip.create_loss(arguments(world_size=2))(*pair(6, 4), 10.0)


def test_newer_open_clips_chunk_size_is_accepted():
    image, text = pair(6, 4)
    chunked = ours.SigLipLoss(chunk_size=2)(image, text, 10.0, -3.0)
    torch.testing.assert_close(chunked, theirs.SigLipLoss()(image, text, 10.0, -3.0))


def train(siglip: bool, steps: int = 2) -> tuple[type, dict[str, torch.Tensor]]:
    """A tiny OpenCLIP model after a few steps as open_clip_train takes them: the loss's class and the parameters."""
    torch.manual_seed(0)
    vision = model.CLIPVisionCfg(layers=1, width=32, head_width=16, patch_size=8, image_size=16)
    words = model.CLIPTextCfg(context_length=8, vocab_size=64, width=32, heads=2, layers=1)
    clip = model.CLIP(16, vision, words, output_dict=True, init_logit_bias=-10.0 if siglip else None)
    loss = open_clip.create_loss(arguments(siglip=siglip))
    optimizer = torch.optim.SGD(clip.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        outputs = clip(torch.randn(10, 3, 16, 16), torch.randint(1, 64, (10, 8)))
        sum(loss(**outputs, output_dict=True).values()).backward()
        optimizer.step()
    return type(loss), {name: value.detach().clone() for name, value in clip.named_parameters()}


@pytest.mark.parametrize("siglip", [False, True], ids=["softmax", "sigmoid"])
def test_training_an_open_clip_model_gives_the_same_parameters(siglip):
    want_loss, want = train(siglip)
    ours.patch()
    try:
        got_loss, got = train(siglip)
    finally:
        ours.unpatch()
    assert got_loss is not want_loss
    _, start = train(siglip, steps=0)
    moved = max((want[name] - start[name]).abs().max() for name in want)
    assert moved > 1e-2  # else the comparison below would say nothing
    for name, value in want.items():
        torch.testing.assert_close(
            got[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("name", NAMES)
def test_memory_kept_for_backward_is_linear_where_open_clips_is_quadratic(name):
    settings = {"caption_loss_weight": 2.0, "clip_loss_weight": 1.0} if name == "CoCaLoss" else {}

    def kept(module, n: int) -> int:
        inputs = features(n, 8, torch.float32, "logit_scale")
        if name == "SigLipLoss":
            inputs["logit_bias"] = torch.tensor(-9.5, requires_grad=True)
        if name == "CoCaLoss":
            inputs |= {"logits": torch.zeros(n, 2, 5), "labels": torch.ones(n, 2).long()}
        if name == "DistillClipLoss":
            inputs |= dict(zip(TEACHER, (*pair(n, 5, torch.float32, seed=1), 30.0), strict=True))
        return saved_bytes(lambda: sum(module(**settings)(**inputs, output_dict=True).values()))

    def growth(module) -> float:
        """How many times more is kept for a batch twice as large."""
        return kept(module, 3000) / kept(module, 1500)

    assert growth(getattr(ours, name)) < 2.1
    assert growth(ORIGINAL[name]) > 3.0
