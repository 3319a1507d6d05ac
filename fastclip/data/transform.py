"""Pictures -> tensors: OpenAI's preprocessing, and the random one for training.

Both give float32 [C, S, S]. Source: Radford et al., arXiv 2103.00020, section 2.5, and github.com/openai/CLIP; the same
as torchvision's Resize (bicubic, antialiased), CenterCrop, ToTensor and Normalize on Pillow images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageEnhance

from fastclip.clip.config import ClipConfig

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
Box = tuple[float, float, float, float]
# A picture this many times as long as it is wide is not resized whole.
LONGEST = 8
TRIES = 10
# Numbers a training picture takes: place, tries, mirror, jitter, grey, and four changes of colour.
LUCK = 2 + 2 * TRIES + 3 + 4


class ToTensor:
    """RGB picture of the right size -> float32 [C, S, S]: in [0, 1], perhaps inverted, minus mean, by std.

    channels: 3, or 1 for grey (ITU-R 601-2 luma). mean, std: a number for each channel; None: OpenAI's for 3 channels,
    0 and 1 for one. invert: 1 - x first, for models whose ink is 1 on 0. ValueError for other channels, or numbers that
    do not match them.
    """

    def __init__(
        self,
        size: int,
        channels: int = 3,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        invert: bool = False,
    ) -> None:
        if channels not in (1, 3) or size < 1:
            raise ValueError(f"channels must be 1 or 3 and size at least 1, got {channels} and {size}")
        mean = mean if mean is not None else OPENAI_MEAN if channels == 3 else (0.0,)
        std = std if std is not None else OPENAI_STD if channels == 3 else (1.0,)
        if len(mean) != channels or len(std) != channels or min(std) <= 0:
            raise ValueError(f"{channels} channels need as many means and positive stds, got {mean} and {std}")
        self.size, self.channels, self.invert = size, channels, invert
        self.mean, self.std = tuple(mean), tuple(std)

    def to_tensor(self, image: Image.Image) -> torch.Tensor:
        values = np.array(image.convert("L" if self.channels == 1 else "RGB"))
        tensor = torch.from_numpy(values.reshape(self.size, self.size, self.channels)).permute(2, 0, 1)
        tensor = tensor.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
        if self.invert:
            tensor = 1 - tensor
        column = (self.channels, 1, 1)
        return tensor.sub_(torch.tensor(self.mean).view(column)).div_(torch.tensor(self.std).view(column))


class Preprocess(ToTensor):
    """The shorter side to `size`, the centre cut out. Arguments as ToTensor's."""

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """image: any mode that converts to RGB, best from read_image; any size from 1 x 1."""
        return self.to_tensor(resize_centre(plain(image), self.size))


class TrainTransform(ToTensor):
    """A random part of the picture, resized to `size`, and what else is asked for. Further arguments as ToTensor's.

    scale: the part's share of the area. ratio: its width by its height. flip: share of the pictures mirrored.
    jitter: greatest relative change of (brightness, contrast, saturation) and greatest turn of the hue, as a share of
    the circle (at most 0.5); jitter_share: share of the pictures that get it. grayscale: share that lose their colours.
    """

    def __init__(
        self,
        size: int,
        channels: int = 3,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        invert: bool = False,
        *,
        scale: tuple[float, float] = (0.9, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.0,
        jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0),
        jitter_share: float = 1.0,
        grayscale: float = 0.0,
    ) -> None:
        super().__init__(size, channels, mean, std, invert)
        if not (0 < scale[0] <= scale[1] <= 1 and 0 < ratio[0] <= ratio[1]):
            raise ValueError(f"scale must rise within (0, 1] and ratio above 0, got {scale} and {ratio}")
        if not all(0 <= share <= 1 for share in (flip, jitter_share, grayscale, *jitter)) or jitter[3] > 0.5:
            raise ValueError("shares and jitter must be in [0, 1], the hue's in [0, 0.5]")
        self.scale, self.ratio, self.flip, self.grayscale = scale, ratio, flip, grayscale
        self.jitter, self.jitter_share = jitter, jitter_share

    def __call__(self, image: Image.Image, generator: torch.Generator | None = None) -> torch.Tensor:
        """image: as for Preprocess. The same generator state gives the same tensor; None draws from torch's own."""
        # All numbers are drawn whatever is used, so that one picture's size does not change the next one's luck.
        luck = torch.rand(LUCK, generator=generator, dtype=torch.float64).tolist()
        left, top, width, height = random_box(*image.size, self.scale, self.ratio, luck)
        image = plain(image).crop((left, top, left + width, top + height))
        image = image.resize((self.size, self.size), Image.Resampling.BICUBIC)
        mirrored, jittered, gray, *change = luck[2 + 2 * TRIES :]
        if mirrored < self.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if jittered < self.jitter_share:
            image = jitter_colours(image, [(2 * u - 1) * most for u, most in zip(change, self.jitter, strict=True)])
        if gray < self.grayscale:
            image = image.convert("L").convert("RGB")
        return self.to_tensor(image)


def preprocess_for(config: ClipConfig) -> Preprocess:
    """What the model's pictures go through: OpenAI's for three channels.

    A model of one channel is taken to be one of ink, 1 on 0: pictures are dark ink on light paper and are inverted.
    """
    image = config.image
    return Preprocess(image.image_size, image.channels, invert=image.channels == 1)


def plain(image: Image.Image) -> Image.Image:
    """RGB or grey: what can be resized with bicubic weights."""
    return image if image.mode in ("RGB", "L") else image.convert("RGB")


def resize_centre(image: Image.Image, size: int) -> Image.Image:
    """The shorter side to `size`, the longer in proportion, and the square in the middle; rounded as by torchvision."""
    short = min(image.size)
    wide, high = (int(size * side / short) for side in image.size)
    left, top = round((wide - size) / 2), round((high - size) / 2)
    if max(wide, high) <= LONGEST * size:
        whole = image.resize((wide, high), Image.Resampling.BICUBIC)
        return whole.crop((left, top, left + size, top + size))
    across, down = image.width / wide, image.height / high
    return resize_part(image, (left * across, top * down, (left + size) * across, (top + size) * down), size)


def resize_part(image: Image.Image, box: Box, size: int) -> Image.Image:
    """The square of `size` pixels that `box` (left, top, right, bottom) becomes: only what is kept is computed.

    A picture of 1 x 100,000 pixels would be 5 gigapixels on the way. Where Pillow takes the whole of a picture down
    first and then across, the rounding between the passes differs.
    """
    left, right, first_column, last_column = reach(box[0], box[2], image.width, size)
    top, bottom, first_row, last_row = reach(box[1], box[3], image.height, size)
    part = image.crop((first_column, first_row, last_column, last_row))
    across = part.resize((size, part.height), Image.Resampling.BICUBIC, box=(left, 0, right, part.height))
    return across.resize((size, size), Image.Resampling.BICUBIC, box=(0, top, size, bottom))


def reach(low: float, high: float, length: int, size: int) -> tuple[float, float, int, int]:
    """(low, high, first, last): the pixels [first, last) that [low, high) needs, and where it lies in them.

    The bicubic kernel reaches two pixels of the coarser side. Pillow keeps a box in float32: small numbers are exact.
    """
    margin = math.ceil(2 * max(1.0, (high - low) / size)) + 1
    first, last = max(0, math.floor(low) - margin), min(length, math.ceil(high) + margin)
    return low - first, high - first, first, last


def random_box(
    width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float], luck: Sequence[float]
) -> tuple[int, int, int, int]:
    """(left, top, width, height) of a random part, from numbers in [0, 1): two for the place, then two a try.

    The area is uniform in `scale`, width / height in the logarithm of `ratio`; where ten tries do not fit, it is the
    largest part in the centre whose ratio is allowed. As Szegedy et al., arXiv 1409.4842, section 5.
    """
    across, down, *tries = luck
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for area_luck, ratio_luck in zip(tries[: 2 * TRIES : 2], tries[1 : 2 * TRIES : 2], strict=True):
        area = width * height * (scale[0] + (scale[1] - scale[0]) * area_luck)
        shape = math.exp(low + (high - low) * ratio_luck)
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            return int((width - w + 1) * across), int((height - h + 1) * down), w, h
    w = max(1, min(width, round(height * ratio[1])))
    h = max(1, min(height, round(width / ratio[0])))
    return (width - w) // 2, (height - h) // 2, w, h


def jitter_colours(image: Image.Image, changes: Sequence[float]) -> Image.Image:
    """Brightness, contrast, saturation times 1 + change, and the hue turned by a share of the circle."""
    *factors, hue = changes
    kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for kind, change in zip(kinds, factors, strict=True):
        if change:
            image = kind(image).enhance(1 + change)
    turn = round(255 * hue) % 256
    if turn:
        h, s, v = image.convert("HSV").split()
        image = Image.merge("HSV", (h.point(lambda value: (value + turn) % 256), s, v)).convert("RGB")
    return image
