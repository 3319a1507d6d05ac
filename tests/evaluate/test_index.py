"""Search in a folder: the right pictures, an index that follows the folder, and what is written."""

import json
import os

import numpy as np
import pytest
import torch
from colour_model import COLOURS, picture
from PIL import Image

from fastclip.errors import UserError
from fastclip.evaluate import index as index_module
from fastclip.evaluate.encode import Reading, encode_texts
from fastclip.evaluate.files import printable
from fastclip.evaluate.index import open_index
from fastclip.evaluate.search import Query, search_folder, thumbnail


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTCLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


@pytest.fixture
def encoded(monkeypatch):
    """The pictures that were encoded, call by call."""
    calls, real = [], index_module.encode_images

    def record(loaded, pictures, reading):
        calls.append([path.name for path in pictures])
        return real(loaded, pictures, reading)

    monkeypatch.setattr(index_module, "encode_images", record)
    return calls


def test_words_find_pictures(colours, coloured):
    index = open_index(colours, coloured)
    for name in COLOURS:
        hits = index.find(encode_texts(colours, [f"something {name}"])[0], 4)
        assert {hit.path.parent.name for hit in hits} == {f"the_{name}_ones"} and len(hits) == 4
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    assert len(index.find(torch.ones(3), 100)) == 12


def test_index_is_kept_and_gives_the_same_answers(colours, coloured, cache, encoded):
    first = open_index(colours, coloured)
    assert {path.name for path in cache.rglob("*") if path.is_file()} == {"features.safetensors", "pictures.json"}
    second = open_index(colours, coloured)
    assert len(encoded) == 1 and len(encoded[0]) == 12
    assert torch.equal(first.features, second.features) and first.entries == second.entries


def test_only_what_changed_is_encoded_again(colours, coloured, encoded):
    before = open_index(colours, coloured)
    (coloured / "the_red_ones" / "1.png").unlink()
    picture("blue", 9).save(coloured / "the_red_ones" / "2.png")
    os.utime(coloured / "the_red_ones" / "2.png", ns=(1, 1))
    picture("green", 9).save(coloured / "new.png")
    after = open_index(colours, coloured)
    assert encoded[1:] == [["new.png", "2.png"]]
    assert len(after.features) == 12 and len(before.features) == 12
    fresh = open_index(colours, coloured, coloured.parent / "fresh")
    assert torch.equal(after.features, fresh.features) and after.entries == fresh.entries
    best = after.find(torch.tensor([0.0, 0.0, 1.0]), 5)
    assert "2.png" in {hit.path.name for hit in best if hit.path.parent.name == "the_red_ones"}


def test_pictures_removed_leave_the_index(colours, coloured, encoded):
    open_index(colours, coloured)
    (coloured / "the_red_ones" / "1.png").unlink()
    assert len(open_index(colours, coloured).features) == 11 and encoded[1:] == [[]]


@pytest.mark.parametrize("damage", ["no json", "cut json", "cut tensors", "other half", "other model", "other folder"])
def test_index_that_does_not_fit_is_made_anew(colours, coloured, tmp_path, encoded, damage):
    place = tmp_path / "index"
    expected = open_index(colours, coloured, place)
    names, tensors = place / "pictures.json", place / "features.safetensors"
    values = json.loads(names.read_text())
    if damage == "no json":
        names.unlink()
    elif damage == "cut json":
        names.write_bytes(names.read_bytes()[:-20])
    elif damage == "cut tensors":
        tensors.write_bytes(tensors.read_bytes()[:-3])
    elif damage == "other half":
        values["pictures"].reverse()
        names.write_text(json.dumps(values))
    elif damage == "other model":
        colours.model.image.weight.data *= 2
    else:
        coloured = coloured.rename(tmp_path / "moved")
    again = open_index(colours, coloured, place)
    assert len(encoded) == 2 and len(encoded[1]) == 12
    torch.testing.assert_close(again.features, expected.features, atol=1e-3, rtol=0)


def test_unreadable_pictures_are_named_and_not_tried_again(colours, coloured, encoded):
    (coloured / "broken.png").write_bytes(b"no")
    for _ in range(2):
        with pytest.raises(UserError, match=r"1 of 13 pictures cannot be used, more than the 5% .*broken\.png"):
            open_index(colours, coloured, reading=Reading(max_skipped=0.05))
    index = open_index(colours, coloured)
    assert list(index.skipped) == ["broken.png"] and "not a picture" in index.skipped["broken.png"]
    assert len(index.features) == 12
    picture("red", 9).save(coloured / "more.png")
    assert list(open_index(colours, coloured).skipped) == ["broken.png"] and encoded[1:] == [["more.png"]]


def test_folder_without_a_readable_picture(colours, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"no")
    with pytest.raises(UserError, match=r"none of the 1 pictures in .* can be read; the first: .*a\.png"):
        open_index(colours, tmp_path / "bad")


def test_names_of_files_that_are_no_text(colours, coloured, tmp_path):
    name = os.fsdecode(b"\xff\x07.png")
    try:
        picture("red", 8).save(coloured / name)
    except OSError:
        pytest.skip("this file system takes no such name")
    for _ in range(2):
        hits, _, out = search_folder("red", colours, coloured, 5, tmp_path / "out.png")
        assert name in {hit.path.name for hit in hits}
    found = json.loads((tmp_path / "out.json").read_text())["found"]
    assert name in {os.path.basename(entry["path"]) for entry in found}
    assert printable(name) == "??.png" and out.stat().st_size > 1000


def test_search_writes_a_gallery_and_json(colours, coloured, tmp_path):
    (coloured / "$a_{b}\u00e9.png").write_bytes((coloured / "the_red_ones" / "0.png").read_bytes())
    hits, _, out = search_folder("RED  things, red!", colours, coloured, 5, None)
    assert str(out) == "runs/search/search-red-things-red.png" and len(hits) == 5
    with Image.open(out) as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    # The pictures found are in it.
    assert (np.abs(pixels.astype(int) - COLOURS["red"]).max(1) < 40).mean() > 0.02
    written = json.loads(out.with_suffix(".json").read_text())
    assert [entry["path"] for entry in written["found"]] == [str(hit.path) for hit in hits]
    assert written["query"] == "RED  things, red!" and written["skipped"] == {}


def test_search_by_a_picture_finds_its_neighbours_and_not_itself(colours, coloured, tmp_path):
    query = coloured / "the_green_ones" / "2.png"
    hits, _, _ = search_folder(str(query), colours, coloured, 3, tmp_path / "out.png")
    assert {hit.path.name for hit in hits} == {"0.png", "1.png", "3.png"}
    assert {hit.path.parent.name for hit in hits} == {"the_green_ones"}
    picture("green", 77).save(tmp_path / "outside.png")
    hits, _, _ = search_folder(str(tmp_path / "outside.png"), colours, coloured, 4, tmp_path / "out.png")
    assert {hit.path.parent.name for hit in hits} == {"the_green_ones"} and len(hits) == 4


def test_query_is_a_picture_only_if_there_is_one(tmp_path):
    picture("red").save(tmp_path / "a.png")
    assert Query.of(str(tmp_path / "a.png")).picture == tmp_path / "a.png"
    assert Query.of("a.png photo").picture is None and Query.of("missing.png").picture is None
    assert Query.of("../../Black  Queen?").slug() == "black-queen" and Query.of("☂").slug() == "query"


@pytest.mark.parametrize(
    ("text", "top", "message"), [("  ", 3, "query is empty"), ("red", 0, "--top must be at least 1")]
)
def test_questions_that_cannot_be(colours, coloured, text, top, message):
    with pytest.raises(UserError, match=message):
        search_folder(text, colours, coloured, top, None)


def test_picture_to_search_with_must_be_readable(colours, coloured, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no")
    with pytest.raises(UserError, match="1 of 1 pictures cannot be used"):
        search_folder(str(tmp_path / "bad.png"), colours, coloured, 3, None)


def test_thumbnails_are_small_and_not_bent(tmp_path):
    Image.new("RGB", (2000, 500), (1, 2, 3)).save(tmp_path / "wide.png")
    assert thumbnail(tmp_path / "wide.png").shape == (64, 256, 3)
