"""The PNGs: whole, as large as they must be, and with what they are to show."""

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from PIL import Image

from fastclip.evaluate.drawing import MOST_COUNTS, MOST_NAMES, Tile, draw_confusion, draw_gallery

RED, BLUE = np.full((8, 8, 3), (250, 0, 0), np.uint8), np.full((4, 16, 3), (0, 0, 250), np.uint8)


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def share(image: np.ndarray, colour) -> float:
    return (np.abs(image - colour).max(2) < 12).mean()


def extent(image: np.ndarray, colour) -> tuple[int, int]:
    """(height, width) of what has the colour."""
    rows, columns = np.nonzero(np.abs(image - colour).max(2) < 12)
    return int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1


def test_gallery_shows_query_and_tiles_undistorted(tmp_path):
    tiles = [Tile(BLUE, "$wide_{tile}\n\x07", 0.5)]
    draw_gallery([(RED, tiles)], tmp_path / "a.png", "100% of $x_1$", "legend")
    image = pixels(tmp_path / "a.png")
    high, wide = extent(image, (250, 0, 0))
    assert abs(high - wide) <= 3 and high > 100
    high, wide = extent(image, (0, 0, 250))
    assert wide / high == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("rows", [1, 3])
def test_gallery_grows_with_its_rows_and_marks_what_is_right(tmp_path, rows):
    tiles = [Tile(np.zeros((8, 8), np.uint8), "name", 0.9, right=True)] * 7
    draw_gallery([("words " * 30, tiles)] * rows, tmp_path / "a.png", "title", "legend")
    image = pixels(tmp_path / "a.png")
    assert image.shape[0] == pytest.approx(130 * (0.85 + 1.72 * rows), abs=3)
    assert share(image, (0x16, 0xA3, 0x4A)) > 0.001


SIZES = {"two": 2, "counts": MOST_COUNTS, "names": MOST_COUNTS + 1, "neither": MOST_NAMES + 1}


@pytest.mark.parametrize("classes", SIZES.values(), ids=SIZES)
def test_confusion_of_any_number_of_classes(tmp_path, classes):
    matrix = np.eye(classes, dtype=np.int64) * 5
    matrix[0, 1] = 2
    draw_confusion(matrix, [f"class $number {i}" for i in range(classes)], tmp_path / "a.png", "50% of $")
    image = pixels(tmp_path / "a.png")
    assert 700 < image.shape[0] < 2400 and image.std() > 10
    # The diagonal is dark, the rest is light.
    dark = (image.sum(2) < 350).mean()
    assert 0.002 < dark < 0.5


def test_class_without_pictures_is_drawn_empty(tmp_path):
    draw_confusion(np.array([[0, 0], [1, 1]]), ["", "猫 ☃"], tmp_path / "a.png", "title")
    assert pixels(tmp_path / "a.png").std() > 10
