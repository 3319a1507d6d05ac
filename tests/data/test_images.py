"""Pictures of every kind become RGB, or an error that says why."""

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL")

from PIL import Image, ImageFile

from fastclip.data.images import BadImage, known_formats, read_image

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def halves(left, right, mode: str = "RGB", size=(8, 6)) -> Image.Image:
    """`left` on the left half, `right` on the right."""
    image = Image.new(mode, size, right)
    image.paste(left, (0, 0, size[0] // 2, size[1]))
    return image


def corners(image: Image.Image) -> list:
    w, h = image.size
    return [image.getpixel(at) for at in ((0, 0), (w - 1, 0), (0, h - 1), (w - 1, h - 1))]


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims to be so large, with next to nothing in it."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF"])
def test_plain_pictures_keep_their_pixels(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    image = read_image(encoded(halves(RED, BLUE), kind, **options))
    assert image.mode == "RGB" and image.size == (8, 6) and corners(image) == [RED, BLUE, RED, BLUE]


def test_path_bytes_and_file_are_the_same(tmp_path):
    data = encoded(halves(RED, BLUE))
    (tmp_path / "a.png").write_bytes(data)
    with open(tmp_path / "a.png", "rb") as file:
        read = [read_image(tmp_path / "a.png"), read_image(str(tmp_path / "a.png")), read_image(data), read_image(file)]
        assert not file.closed
    assert len({image.tobytes() for image in read}) == 1


def test_the_file_is_closed(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(halves(RED, BLUE)))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        image = read_image(tmp_path / "a.png")
    (tmp_path / "a.png").unlink()
    assert image.getpixel((0, 0)) == RED


def test_palette_with_and_without_a_transparent_colour():
    image = halves(RED, BLUE).quantize(2)
    assert corners(read_image(encoded(image))) == [RED, BLUE, RED, BLUE]
    transparent = image.getpixel((0, 0))
    assert corners(read_image(encoded(image, transparency=transparent))) == [WHITE, BLUE, WHITE, BLUE]
    # An alpha for each entry of the palette.
    alphas = bytes(0 if entry == transparent else 255 for entry in range(2))
    assert corners(read_image(encoded(image, transparency=alphas))) == [WHITE, BLUE, WHITE, BLUE]


def test_grey_and_one_bit():
    assert corners(read_image(encoded(halves(30, 200, "L")))) == [(30,) * 3, (200,) * 3] * 2
    assert corners(read_image(encoded(halves(0, 1, "1")))) == [(0,) * 3, (255,) * 3] * 2


@pytest.mark.parametrize(
    ("left", "mode", "expected"),
    [
        ((255, 0, 0, 255), "RGBA", (255, 0, 0)),
        ((255, 0, 0, 0), "RGBA", (255, 255, 255)),
        ((0, 0, 0, 51), "RGBA", (204, 204, 204)),
        ((0, 255), "LA", (0, 0, 0)),
        ((0, 0), "LA", (255, 255, 255)),
    ],
    ids=["opaque", "clear", "a fifth", "grey", "clear grey"],
)
def test_alpha_is_laid_on_white(left, mode, expected):
    image = read_image(encoded(Image.new(mode, (4, 4), left)))
    assert image.mode == "RGB" and image.getpixel((1, 1)) == expected


def test_transparent_colour_of_rgb():
    assert corners(read_image(encoded(halves(RED, BLUE), transparency=RED))) == [WHITE, BLUE, WHITE, BLUE]


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_is_ink(kind):
    options = {"quality": 95} if kind == "JPEG" else {}
    image = read_image(encoded(halves((0, 255, 255, 0), (0, 0, 0, 255), "CMYK", (32, 32)), kind, **options))
    np.testing.assert_allclose(corners(image), [RED, (0, 0, 0)] * 2, atol=3)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_keep_the_upper_eight(kind):
    values = np.array([[0, 255, 256, 0x1234], [0x7FFF, 0x8000, 0xFEFF, 0xFFFF]], dtype=np.uint16)
    image = read_image(encoded(Image.fromarray(values), kind))
    assert np.array_equal(np.asarray(image)[..., 1], values >> 8) and image.mode == "RGB"


@pytest.mark.parametrize("value", [0.5, 70000, -1], ids=["float", "above", "below"])
def test_numbers_without_a_range_are_refused(value):
    image = Image.fromarray(np.full((3, 3), value, dtype=np.float32 if isinstance(value, float) else np.int32))
    with pytest.raises(BadImage, match="no defined RGB"):
        read_image(encoded(image, "TIFF"))


# What each orientation does to a picture whose corners are A B / C D, from EXIF's definition of the tag.
TURNED = {1: "ABCD", 2: "BADC", 3: "DCBA", 4: "CDAB", 5: "ACBD", 6: "CADB", 7: "DBCA", 8: "BDAC"}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", TURNED)
def test_exif_turns_the_picture_upright(kind, orientation):
    colour = {"A": RED, "B": BLUE, "C": (0, 255, 0), "D": (0, 0, 0)}
    image = Image.new("RGB", (32, 16), colour["D"])
    for letter, box in {"A": (0, 0, 16, 8), "B": (16, 0, 32, 8), "C": (0, 8, 16, 16)}.items():
        image.paste(colour[letter], box)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, kind, exif=exif, **({"quality": 95, "subsampling": 0} if kind == "JPEG" else {}))
    turned = read_image(data)
    assert turned.size == ((16, 32) if orientation > 4 else (32, 16))
    atol = 30 if kind in ("JPEG", "WEBP") else 0
    np.testing.assert_allclose(corners(turned), [colour[letter] for letter in TURNED[orientation]], atol=atol)


def test_damaged_exif_leaves_the_picture_as_it_is():
    data = encoded(halves(RED, BLUE, size=(32, 16)), "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff broken")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about the tag
        assert read_image(data).size == (32, 16)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_first_frame_of_an_animation(kind):
    frames = [Image.new("RGB", (4, 4), RED), Image.new("RGB", (4, 4), BLUE)]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    with Image.open(io.BytesIO(data)) as both:
        assert both.n_frames == 2
    assert read_image(data).getpixel((0, 0)) == RED


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF"])
def test_one_pixel(kind):
    image = read_image(encoded(Image.new("RGB", (1, 1), WHITE), kind))
    assert image.size == (1, 1) and image.getpixel((0, 0)) == WHITE


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_truncated_files_are_refused(kind, share):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about cut tags of TIFF
        with pytest.raises(BadImage):
            read_image(data[: int(len(data) * share)])


@pytest.mark.parametrize(
    "data", [b"", b"hello" * 50, b"\x89PNG\r\n\x1a\n", b"GIF89a", b"\xff\xd8\xff\xe0", b"RIFF1234WEBP"]
)
def test_what_is_no_picture_is_refused(data):
    with pytest.raises(BadImage):
        read_image(data)


def test_a_format_that_starts_other_programs_is_not_tried():
    with pytest.raises(BadImage, match="not a picture in any known format"):
        read_image(encoded(Image.new("RGB", (9, 9)), "EPS"))


def test_bytes_flipped_anywhere_end_in_a_picture_or_the_reason():
    """2,000 damaged files: the decoders raise all kinds of errors, and only one may come out."""
    rng = np.random.default_rng(1)
    noise = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
    whole = [encoded(noise, kind) for kind in known_formats()]
    refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for turn in range(2000):
            data = bytearray(whole[turn % len(whole)])
            for _ in range(rng.integers(1, 6)):
                data[rng.integers(0, min(len(data), 200))] = rng.integers(0, 256)
            try:
                assert read_image(bytes(data), max_pixels=10**6).mode == "RGB"
            except BadImage:
                refused += 1
    assert 200 < refused < 1900


@pytest.mark.parametrize(
    ("width", "height"), [(10_000, 10_000), (8_001, 8_000), (40_000, 40_000)], ids=["100 megapixels", "just", "huge"]
)
def test_bomb_is_refused_before_it_is_decoded(monkeypatch, width, height):
    def load(self):
        raise AssertionError("decoded")

    data = png_header(width, height)
    assert len(data) < 200
    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with warnings.catch_warnings(), pytest.raises(BadImage, match="pixels"):
        warnings.simplefilter("ignore")  # Pillow's own, above 89 megapixels
        read_image(data)


def test_limit_can_be_set():
    data = encoded(Image.new("RGB", (20, 10)))
    assert read_image(data, max_pixels=200).size == (20, 10)
    with pytest.raises(BadImage, match="20 x 10 is more than 199 pixels"):
        read_image(data, max_pixels=199)


def test_errors_name_the_path_and_missing_files_are_not_bad(tmp_path):
    (tmp_path / "notes.png").write_text("hello")
    with pytest.raises(BadImage, match=rf"{tmp_path}/notes.png: not a picture"):
        read_image(tmp_path / "notes.png")
    with pytest.raises(FileNotFoundError):
        read_image(Path(tmp_path, "none.png"))


def test_running_out_of_memory_is_not_the_pictures_fault(monkeypatch):
    def load(self):
        raise MemoryError

    data = encoded(Image.new("RGB", (4, 4)))
    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(MemoryError):
        read_image(data)
