"""The commands on both kinds of model: one of characters in its folder, and CLIP's in a file of OpenCLIP's layout."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("tyro")
pytest.importorskip("tokenizers")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from fastclip import cli, clip
from fastclip.clip.tokenizer import BpeTokenizer, ClipTokenizer
from fastclip.data import characters
from fastclip.data.glyphs import load_glyphs

# The first is the one that eval takes.
FACES = ("DejaVuSerif", "DejaVuSansDisplay", "STIXGeneralBolIta")
NAMES = ("digit one", "latin capital letter a", "latin small letter g")


@pytest.fixture(scope="module")
def glyphs(tmp_path_factory):
    return load_glyphs(32, FACES, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def characters_model(tmp_path_factory):
    """Folder of a small model of the demo's kind, with random weights."""
    folder = tmp_path_factory.mktemp("characters")
    tokenizer = BpeTokenizer.train(NAMES, 100, 8)
    torch.manual_seed(0)
    sizes = {"embed_dim": 8, "widths": (4, 4, 8), "hidden": 8, "text_width": 16, "head_width": 8, "context": 8}
    model = clip.create_model("glyph-conv", vocabulary=len(tokenizer), **sizes).eval()
    clip.save(model, folder)
    (folder / "tokenizer.json").write_text(tokenizer.to_json())
    return folder


@pytest.fixture(scope="module")
def openclip_file(tmp_path_factory):
    """weights.pt of a small ViT in OpenCLIP's layout, its tokenizer beside it."""
    folder = tmp_path_factory.mktemp("openclip")
    tokenizer = ClipTokenizer.train(NAMES, 530, 77)
    torch.manual_seed(0)
    sizes = {"image_size": 64, "image_width": 64, "image_layers": 1, "text_width": 64, "text_layers": 1}
    model = clip.create_model("ViT-B/32", vocabulary=len(tokenizer), **sizes)
    torch.save(clip.export_openclip(model), folder / "weights.pt")
    (folder / "tokenizer.json").write_text(tokenizer.to_json())
    return folder / "weights.pt"


@pytest.fixture(params=["characters_model", "openclip_file"])
def model(request):
    return str(request.getfixturevalue(request.param))


@pytest.fixture
def pictures(glyphs, tmp_path):
    """A folder of folders with some characters in print, and captions beside them."""
    for name in NAMES:
        folder = tmp_path / "pictures" / name.replace(" ", "_")
        folder.mkdir(parents=True)
        for row in np.flatnonzero(glyphs.name_of == glyphs.names.index(name)):
            for size in (32, 40, 48):
                path = folder / f"{glyphs.faces[glyphs.face_of[row]]}-{size}.png"
                Image.fromarray(255 - glyphs.images[row]).resize((size, size)).save(path)
                path.with_suffix(".txt").write_text(name)
    return tmp_path / "pictures"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTCLIP_CACHE", str(tmp_path / "cache"))


def succeeds(capsys, *arguments: str) -> str:
    cli.main(arguments)
    return capsys.readouterr().out


def fails(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 1
    return capsys.readouterr().err


def is_picture(path) -> bool:
    with Image.open(path) as image:
        return np.asarray(image.convert("L")).std() > 5


@pytest.mark.parametrize("query", ["digit one", "a picture"])
def test_search_in_a_folder(capsys, model, pictures, tmp_path, query):
    (pictures / "broken.jpg").write_bytes(b"no")
    if query == "a picture":
        query = str(next(pictures.rglob("*-32.png")))
    arguments = ("search", query, "--run", model, "--images", str(pictures), "--top", "4", "--out", "found.png")
    said = succeeds(capsys, *arguments)
    lines = said.splitlines()
    assert len(lines) == 6 and lines[0].split()[0] == "1" and lines[0].endswith(".png")
    assert "left out: 1 (such as broken.jpg)" in lines[4] and lines[5] == "Pictures: found.png"
    assert is_picture("found.png") and len(json.loads((tmp_path / "found.json").read_text())["found"]) == 4
    # From the index now.
    assert succeeds(capsys, *arguments) == said


def test_classify(capsys, model, pictures, tmp_path):
    templates = ("--templates", "imagenet-7", "plain")
    said = succeeds(capsys, "classify", str(pictures), "--run", model, *templates, "--out", "c")
    assert f"{len(list(pictures.rglob('*.png')))} pictures of 3 classes: top-1 " in said and "mean per class" in said
    written = json.loads((tmp_path / "c" / "predictions.json").read_text())
    assert len(written["templates"]) == 8 and written["classes"] == list(NAMES) and is_picture("c/confusion.png")
    assert all(len(entry["top"]) == 3 for entry in written["predictions"])


def test_classify_by_classes_of_ones_own(capsys, model, pictures):
    said = succeeds(capsys, "classify", str(pictures), "--run", model, "--classes", "cat", "dog", "--out", "c")
    assert "2 classes; no picture's class is known" in said and "confusion.png" not in said


def test_probe_learns_to_tell_characters_apart(capsys, model, pictures, tmp_path):
    said = succeeds(capsys, "probe", str(pictures), "--run", model, "--out", "p", "--test-share", "0.34")
    assert said.startswith("Trained on ") and is_picture("p/confusion.png")
    written = json.loads((tmp_path / "p" / "predictions.json").read_text())
    # Random features of the same characters at other sizes: easy.
    assert written["figures"]["top-1"] > 0.6 and len(written["sweep"]) >= 7


def test_probe_with_pictures_of_its_own_to_test(capsys, model, pictures):
    said = succeeds(capsys, "probe", str(pictures), "--run", model, "--test", str(pictures), "--out", "p")
    count = len(list(pictures.rglob("*.png")))
    assert f"Trained on {count} pictures" in said and f"{count} pictures of 3 classes: top-1" in said


def test_eval_on_pairs_and_labels(capsys, model, pictures, tmp_path):
    where = ("--pairs", str(pictures), "--labelled", str(pictures), "--out", "e")
    said = succeeds(capsys, "eval", "--run", model, *where, "--limit", "5")
    assert "text to image  recall@1 " in said and "top-1" in said
    written = json.loads((tmp_path / "e" / "metrics.json").read_text())
    assert 1 <= written["retrieval"]["images"] <= 5 and 0 <= written["zero-shot"]["top-1"] <= 1


def test_eval_on_the_glyphs_and_digits_by_itself(capsys, model, glyphs, tmp_path, monkeypatch):
    monkeypatch.setattr(characters, "load_glyphs", lambda size: glyphs)
    monkeypatch.setattr("fastclip.evaluate.labelled.load_digit_scans", few_scans)
    said = succeeds(capsys, "eval", "--run", model, "--limit", "20")
    written = json.loads((tmp_path / "runs" / "eval" / "metrics.json").read_text())
    assert "captions of glyphs" in said and written["retrieval"]["split"] == "test"
    assert written["zero-shot"]["pictures"] == 30
    assert written["zero-shot"]["templates"] == (["a photo of a {}."] if model.endswith(".pt") else ["digit {}"])


def few_scans(size):
    return torch.rand(30, 1, size, size), torch.arange(30) % 10


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("search", "one"), "has no gallery of characters"),
        (("search", "one", "--images", "gone"), "gone is not a folder of pictures"),
        (("classify", "gone"), "gone is not a folder of pictures"),
        (("classify", "digits", "--templates", "imagnet"), "neither a set of templates"),
        (("classify", "digits", "--batch", "0"), "--batch must be at least 1"),
        (("probe", "digits", "--test-share", "1"), "--test-share must be between 0 and 1"),
        (("eval", "--limit", "0"), "--limit must be at least 1"),
        (("eval", "--pairs", "gone"), "gone"),
        (("eval", "--labelled", "gone"), "gone is not a folder"),
        (("classify", "digits", "--model", "RN50"), "cannot be used"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_mistakes_are_one_line(capsys, model, arguments, said):
    error = fails(capsys, *arguments, "--run", model)
    assert said in error and error.count("\n") == 1


def test_vocabulary_says_where_it_is(capsys, tmp_path, monkeypatch):
    file = tmp_path / "merges.txt"
    file.write_text("#\na b\n")
    monkeypatch.setenv("FASTCLIP_VOCABULARY", str(file))
    assert succeeds(capsys, "vocabulary") == f"{file}\n"
