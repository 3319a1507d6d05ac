"""Pictures to tensors: OpenAI's preprocessing and the random one for training."""

import pickle

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")

from PIL import Image

from fastclip.clip import model_config
from fastclip.data.transform import (
    OPENAI_MEAN,
    OPENAI_STD,
    Preprocess,
    TrainTransform,
    preprocess_for,
    random_box,
)

PLAIN = {"mean": (0, 0, 0), "std": (1, 1, 1)}


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """Nothing blurs an error in the place or the weights away."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def ramp(width: int, height: int) -> Image.Image:
    """Red grows across, green down: where a pixel came from can be read."""
    across = np.broadcast_to(np.linspace(0, 255, width), (height, width))
    down = np.broadcast_to(np.linspace(0, 255, height)[:, None], (height, width))
    return Image.fromarray(np.stack([across, down, 0 * across], 2).round().astype(np.uint8))


def whole_resize(image: Image.Image, size: int) -> np.ndarray:
    """The definition: the shorter side to `size`, the longer in proportion and rounded down, then the middle."""
    short = min(image.size)
    wide, high = (int(size * side / short) for side in image.size)
    left, top = round((wide - size) / 2), round((high - size) / 2)
    resized = image.resize((wide, high), Image.Resampling.BICUBIC)
    return np.asarray(resized.crop((left, top, left + size, top + size)))


@pytest.mark.parametrize("size", [32, 224])
@pytest.mark.parametrize(
    ("width", "height"),
    [(1, 1), (2, 3), (31, 33), (224, 224), (225, 224), (640, 480), (481, 641), (40, 300), (300, 40)],
    ids=["pixel", "tiny", "odd", "same", "one more", "landscape", "portrait", "tall", "wide"],
)
def test_preprocess_equals_resize_then_crop(width, height, size):
    image = noise(width, height)
    ours = Preprocess(size, **PLAIN)(image)
    assert ours.shape == (3, size, size) and ours.dtype == torch.float32 and ours.is_contiguous()
    theirs = torch.from_numpy(whole_resize(image, size).copy()).permute(2, 0, 1).float() / 255
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("width", "height", "off", "share"),
    [(300, 7, 2, 0.01), (2000, 17, 2, 0.01), (17, 2000, 30, 0.4)],
    ids=["wide", "very wide", "very tall: Pillow may go down first"],
)
def test_elongated_pictures_are_cut_first(width, height, off, share):
    image = noise(width, height)
    ours = (Preprocess(32, **PLAIN)(image).permute(1, 2, 0).numpy() * 255).round()
    difference = np.abs(ours - whole_resize(image, 32))
    assert difference.max() <= off and (difference > 0).mean() < share
    # Where there is no noise, rounding is all there is.
    smooth = ramp(width, height)
    ours = (Preprocess(32, **PLAIN)(smooth).permute(1, 2, 0).numpy() * 255).round()
    assert np.abs(ours - whole_resize(smooth, 32)).max() <= 1


@pytest.mark.parametrize(("width", "height"), [(1, 100_000), (100_000, 1)], ids=["column", "row"])
def test_very_elongated_pictures_cost_little(width, height):
    # Resizing the whole of it first would take 15 GB.
    assert Preprocess(224)(ramp(width, height)).isfinite().all()
    train = TrainTransform(224)(ramp(width, height), torch.Generator().manual_seed(0))
    assert train.shape == (3, 224, 224) and train.isfinite().all()


def test_mean_and_std_are_openais_for_three_channels_and_none_for_one():
    grey = Image.new("RGB", (9, 9), (51, 102, 204))
    expected = (torch.tensor([51, 102, 204]) / 255 - torch.tensor(OPENAI_MEAN)) / torch.tensor(OPENAI_STD)
    torch.testing.assert_close(Preprocess(4)(grey)[:, 2, 2], expected)
    # ITU-R 601-2: 0.299 R + 0.587 G + 0.114 B.
    assert Preprocess(4, channels=1)(grey)[0, 2, 2].item() == pytest.approx(98 / 255, abs=1 / 255)


def test_invert_makes_dark_ink_one():
    paper = Image.new("L", (8, 8), 255)
    paper.putpixel((3, 3), 0)
    tensor = Preprocess(8, channels=1, invert=True)(paper)
    assert tensor.shape == (1, 8, 8) and tensor[0, 3, 3] == 1 and tensor.sum() == 1


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_any_mode_that_converts(mode):
    assert Preprocess(16)(ramp(20, 30).convert(mode)).shape == (3, 16, 16)
    assert TrainTransform(16)(ramp(20, 30).convert(mode)).shape == (3, 16, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 2}, "channels must be 1 or 3"),
        ({"size": 0}, "size at least 1"),
        ({"mean": (0.5,)}, "3 channels need as many means"),
        ({"std": (1, 1, 0)}, "positive stds"),
    ],
)
def test_arguments_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        Preprocess(**{"size": 8, **arguments})


@pytest.mark.parametrize(
    "arguments",
    [{"scale": (0, 1)}, {"scale": (0.5, 1.1)}, {"ratio": (2, 1)}, {"flip": 1.5}, {"jitter": (0.1, 0.1, 0.1, 0.6)}],
    ids=lambda value: next(iter(value)),
)
def test_training_arguments_that_cannot_be(arguments):
    with pytest.raises(ValueError, match="must"):
        TrainTransform(8, **arguments)


def test_models_get_their_preprocessing():
    clip = preprocess_for(model_config("RN50x4"))
    assert (clip.size, clip.channels, clip.invert, clip.mean) == (288, 3, False, OPENAI_MEAN)
    glyphs = preprocess_for(model_config("glyph-conv"))
    assert (glyphs.size, glyphs.channels, glyphs.invert) == (32, 1, True)


def test_random_part_has_the_area_ratio_and_place_asked_for():
    generator = torch.Generator().manual_seed(0)
    luck = torch.rand(4000, 22, generator=generator, dtype=torch.float64)
    boxes = np.array([random_box(400, 300, (0.2, 0.5), (0.5, 2.0), row.tolist()) for row in luck], dtype=float)
    left, top, width, height = boxes.T
    assert (left >= 0).all() and (top >= 0).all()
    assert (left + width <= 400).all() and (top + height <= 300).all()
    area, ratio = width * height / (400 * 300), width / height
    assert 0.195 < area.min() < 0.205 and 0.49 < area.max() < 0.505
    assert 0.48 < ratio.min() < 0.53 and 1.9 < ratio.max() < 2.1
    # The place is uniform and goes up to both edges.
    for start, length, side in ((left, width, 400), (top, height, 300)):
        free = side - length > 0
        place = start[free] / (side - length)[free]
        assert place.min() < 0.01 and place.max() > 0.99 and abs(place.mean() - 0.5) < 0.02


def test_random_part_of_a_picture_that_none_fits_is_its_middle():
    luck = [0.9] * 22
    assert random_box(1000, 10, (0.9, 1.0), (0.75, 4 / 3), luck) == (493, 0, 13, 10)
    assert random_box(10, 1000, (0.9, 1.0), (0.75, 4 / 3), luck) == (0, 493, 10, 13)
    assert random_box(1, 1, (0.9, 1.0), (0.75, 4 / 3), luck) == (0, 0, 1, 1)


def test_all_of_the_picture_without_randomness_is_a_plain_resize():
    image = ramp(60, 60)
    tensor = TrainTransform(30, scale=(1, 1), ratio=(1, 1), **PLAIN)(image)
    expected = np.asarray(image.resize((30, 30), Image.Resampling.BICUBIC)).transpose(2, 0, 1) / 255
    np.testing.assert_allclose(tensor.numpy(), expected, atol=1e-6)


def test_same_generator_state_same_picture_and_torchs_own_without_one():
    transform = TrainTransform(16, scale=(0.3, 1), flip=0.5, jitter=(0.4, 0.4, 0.4, 0.1), grayscale=0.2)
    image = noise(40, 30)

    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.stack([transform(image, generator) for _ in range(5)])

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))
    assert len({row.numpy().tobytes() for row in run(1)}) == 5
    torch.manual_seed(1)
    assert torch.equal(torch.stack([transform(image) for _ in range(5)]), run(1))
    assert torch.equal(pickle.loads(pickle.dumps(transform))(image, torch.Generator().manual_seed(1)), run(1)[0])


def test_one_pictures_size_does_not_change_the_next_ones_luck():
    transform, image = TrainTransform(16, flip=0.5), noise(40, 30)
    after = []
    for first in (noise(30, 30), noise(500, 2)):
        generator = torch.Generator().manual_seed(3)
        transform(first, generator)
        after.append(transform(image, generator))
    assert torch.equal(*after)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_share_of_mirrored_and_grey_pictures(share):
    transform = TrainTransform(8, scale=(1, 1), ratio=(1, 1), flip=share, grayscale=share, **PLAIN)
    generator = torch.Generator().manual_seed(0)
    tensors = [transform(ramp(8, 8), generator) for _ in range(300)]
    mirrored = np.mean([(t[:, :, 0].sum() > t[:, :, -1].sum()).item() for t in tensors])
    grey = np.mean([torch.equal(t[0], t[2]) for t in tensors])
    assert mirrored == pytest.approx(share, abs=0.08) and grey == pytest.approx(share, abs=0.08)


@pytest.mark.parametrize(
    ("jitter", "changes"),
    [
        ((0.5, 0, 0, 0), "brightness"),
        ((0, 0.5, 0, 0), "contrast"),
        ((0, 0, 0.5, 0), "saturation"),
        ((0, 0, 0, 0.5), "hue"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_jitter_changes_what_it_says_and_no_more(jitter, changes):
    transform = TrainTransform(8, scale=(1, 1), ratio=(1, 1), jitter=jitter, **PLAIN)
    image = Image.new("RGB", (8, 8), (180, 90, 60))
    image.paste((60, 90, 120), (0, 0, 4, 8))
    generator = torch.Generator().manual_seed(0)
    seen = torch.stack([transform(image, generator) for _ in range(200)])
    luma = (seen * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1)
    spread = (seen.amax(1) - seen.amin(1))[:, 0, 0]
    brightness, contrast = luma.mean((1, 2)), luma[:, 0, 7] - luma[:, 0, 0]
    first_channel_leads = (seen.argmax(1)[:, 0, 7] == 0).float().mean()
    moves = {
        "brightness": brightness.max() / brightness.min() > 2,
        "contrast": contrast.max() / contrast.min() > 2 and brightness.max() / brightness.min() < 1.05,
        "saturation": spread.max() / spread.min() > 2 and brightness.max() / brightness.min() < 1.05,
        "hue": first_channel_leads < 0.6,
    }
    assert moves[changes]
    assert first_channel_leads == 1 or changes == "hue"


def test_jitter_is_for_its_share_of_the_pictures():
    transform = TrainTransform(8, scale=(1, 1), ratio=(1, 1), jitter=(0.5, 0, 0, 0), jitter_share=0.25)
    image, generator = ramp(8, 8), torch.Generator().manual_seed(0)
    same = TrainTransform(8, scale=(1, 1), ratio=(1, 1))(image)
    changed = np.mean([not torch.equal(transform(image, generator), same) for _ in range(400)])
    assert changed == pytest.approx(0.25, abs=0.07)


def test_one_channel_is_augmented_too():
    transform = TrainTransform(8, channels=1, invert=True, jitter=(0.3, 0.3, 0, 0))
    tensor = transform(ramp(12, 12), torch.Generator().manual_seed(0))
    assert tensor.shape == (1, 8, 8) and 0 <= tensor.min() < tensor.max() <= 1
