"""Fixtures of the evaluation's tests."""

from pathlib import Path

import pytest

pytest.importorskip("PIL")
pytest.importorskip("tqdm")
pytest.importorskip("safetensors")

from colour_model import COLOURS, Colours, count_colours, picture

from fastclip.data.transform import Preprocess
from fastclip.evaluate.loaded import LoadedModel


@pytest.fixture
def colours() -> LoadedModel:
    return LoadedModel(Colours(), count_colours, Preprocess(4, mean=(0, 0, 0), std=(1, 1, 1)), Path("colours"))


@pytest.fixture
def coloured(tmp_path) -> Path:
    """A folder with a folder of four pictures for each colour."""
    for name in COLOURS:
        folder = tmp_path / "coloured" / f"the_{name}_ones"
        folder.mkdir(parents=True)
        for i in range(4):
            picture(name, i).save(folder / f"{i}.png")
    return tmp_path / "coloured"
