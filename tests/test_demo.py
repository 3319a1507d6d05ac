"""The demo as a user runs it, on a few faces and for a few steps: what it writes, prints and answers."""

import functools
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")
pytest.importorskip("tqdm")

from PIL import Image

from fastclip.errors import UserError
from fastclip.evaluate import search as search_module
from fastclip.evaluate.retrieval import ties
from fastclip.evaluate.search import search_glyphs as search
from fastclip.evaluate.zero_shot import confusion_matrix
from fastclip.train import demo as demo_module
from fastclip.train.checkpoint import load_model
from fastclip.train.config import DemoConfig
from fastclip.train.summary import recalls

FACES = ("DejaVuSansDisplay", "STIXGeneralItalic", "STIXGeneralBolIta")
HELD_OUT = ("STIXGeneralBolIta",)
FILES = {
    "config.json",
    "gallery.png",
    "digits.png",
    "index.safetensors",
    "loss.png",
    "metrics.json",
    "model.safetensors",
    "tokenizer.json",
}

# The demo with few faces, in a process of its own.
CHILD = f"""
import functools, fastclip.train.demo as demo
demo.load_glyphs = functools.partial(demo.load_glyphs, faces={FACES})
from fastclip.cli import main
main()
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def few_faces(cache, monkeypatch):
    monkeypatch.setenv("FASTCLIP_CACHE", str(cache))
    few = functools.partial(demo_module.load_glyphs, faces=FACES)
    monkeypatch.setattr(demo_module, "load_glyphs", few)
    monkeypatch.setattr(search_module, "load_glyphs", few)


@pytest.fixture(scope="module")
def run(tmp_path_factory, cache):
    """(folder, results, the picture sets that batches were drawn from) of a run of two steps."""
    folder = tmp_path_factory.mktemp("run") / "new" / "demo"
    drawn_from = []

    class Recorded(demo_module.UniqueCaptions):
        def draw(self):
            drawn_from.append(self.images.numpy())
            return super().draw()

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTCLIP_CACHE", str(cache))
        patch.setattr(demo_module, "UniqueCaptions", Recorded)
        patch.setattr(demo_module, "load_glyphs", functools.partial(demo_module.load_glyphs, faces=FACES))
        results = demo_module.demo(DemoConfig(steps=2, batch=64, out=folder, faces_held_out=HELD_OUT))
    return folder, results, drawn_from


def start(cache, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, "demo", "--faces-held-out", *HELD_OUT, *arguments],
        text=True,
        env={**os.environ, "FASTCLIP_CACHE": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_two_steps_write_every_file_and_nothing_else(run):
    folder = run[0]
    assert {path.name for path in folder.iterdir()} == FILES


@pytest.mark.parametrize("name", ["loss.png", "gallery.png", "digits.png"])
def test_pictures_are_whole_and_not_blank(run, name):
    with Image.open(run[0] / name) as image:
        pixels = np.asarray(image.convert("L"))
    assert min(pixels.shape) > 400 and pixels.std() > 5


def test_metrics_say_what_was_held_out_and_measured(run):
    folder, results, _ = run
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics == json.loads(json.dumps(results))
    assert metrics["steps"] == 2 == len(metrics["history"]["loss"]) and not metrics["interrupted"]
    face = metrics["retrieval"]["STIXGeneralBolIta"]
    assert face["names"] > 1000 and 0 < face["names_seen_in_training"] <= face["names"]
    for way in ("text_to_image", "image_to_text"):
        assert 0 <= face[way]["recall@1_ties_against"] <= face[way]["recall@1"] <= face[way]["recall@5"] <= 1
    assert np.sum(metrics["digits"]["confusion"]) == 1797
    assert metrics["memory"]["dense_mib"] == 4 * 4 * 64**2 / 2**20
    assert metrics["memory"]["peak_mib"] > 50


def test_held_out_pictures_are_never_drawn(run, few_faces):
    glyphs = demo_module.load_glyphs(32)
    allowed = glyphs.images[glyphs.face_of != FACES.index(HELD_OUT[0])]
    assert len(run[2]) == 2 and 0 < len(allowed) < len(glyphs)
    assert all(np.array_equal(images, allowed) for images in run[2])


def test_same_seed_same_run(run, few_faces, tmp_path):
    results = demo_module.demo(DemoConfig(steps=2, batch=64, out=tmp_path, faces_held_out=HELD_OUT))
    assert results["history"] == run[1]["history"] and results["retrieval"] == run[1]["retrieval"]


def test_search_finds_names_once_each_in_order(run, few_faces, tmp_path):
    found, picture = search("greek small letter alpha", run[0], 7, tmp_path / "found.png")
    assert len(found) == len({hit.name for hit in found}) == 7
    scores = [hit.score for hit in found]
    assert scores == sorted(scores, reverse=True) and all(-1.001 <= score <= 1.001 for score in scores)
    assert all(hit.held_out == (hit.face in HELD_OUT) for hit in found)
    with Image.open(picture) as image:
        image.load()


def test_search_writes_beside_the_checkpoint_whatever_the_query(run, few_faces):
    _, picture = search("../../Black  Queen?", run[0], 1, None)
    assert picture == run[0] / "search-black-queen.png"
    picture.unlink()


def test_search_gives_the_same_answers_when_the_fonts_have_changed(run, few_faces, tmp_path, monkeypatch):
    before, _ = search("one", run[0], 3, tmp_path / "a.png")
    monkeypatch.setattr("fastclip.data.glyphs.Glyphs.fingerprint", lambda self: "another")
    after, _ = search("one", run[0], 3, tmp_path / "b.png")
    assert [hit.name for hit in before] == [hit.name for hit in after]
    assert [hit.held_out for hit in before] == [hit.held_out for hit in after]


@pytest.mark.parametrize("damage", ["missing", "truncated", "other model", "bad json"])
def test_damaged_checkpoint_is_named(run, few_faces, tmp_path, damage):
    for name in ("config.json", "tokenizer.json", "model.safetensors", "index.safetensors"):
        (tmp_path / name).write_bytes((run[0] / name).read_bytes())
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    if damage == "missing":
        weights.unlink()
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "other model":
        values = json.loads(config.read_text())
        config.write_text(json.dumps({**values, "embed_dim": 8}))
    else:
        config.write_text("{")
    with pytest.raises(UserError, match=str(tmp_path)):
        search("one", tmp_path, 3, None)


def test_checkpoint_gives_back_the_same_model(run):
    model, tokenizer = load_model(run[0])
    again, _ = load_model(run[0])
    images, ids = torch.rand(3, 1, 32, 32), tokenizer(["one", "two words", "three"])
    for a, b in zip(model(images, ids), again(images, ids), strict=True):
        assert torch.equal(a, b)
    assert not model.training


def test_interrupt_evaluates_and_writes_what_there_is(cache, tmp_path):
    with start(cache, "--steps", "100000", "--batch", "64", "--out", str(tmp_path)) as child:
        try:
            # The first progress line: training has begun.
            next(line for line in child.stderr if line.startswith("step "))
            child.send_signal(signal.SIGINT)
            output, errors = child.communicate(timeout=100)
        finally:
            child.kill()
    assert child.returncode == 0, errors
    assert "Traceback" not in errors and "Stopped by Ctrl-C after" in output
    assert {path.name for path in tmp_path.iterdir()} == FILES
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["interrupted"] and 1 <= metrics["steps"] == len(metrics["history"]["loss"]) < 100000


def test_without_a_terminal_progress_is_lines(cache, tmp_path):
    with start(cache, "--steps", "3", "--batch", "32", "--out", str(tmp_path)) as child:
        output, errors = child.communicate(timeout=100)
    assert child.returncode == 0, errors
    lines = [line for line in errors.splitlines() if line.startswith("step ")]
    assert lines[-1].startswith("step 3/3 loss ") and lines[-1].endswith("samples/s, 0 s left")
    assert "\r" not in errors and "recall@1" in output and "never trained on: STIXGeneralBolIta" in output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "--steps must be at least 1"),
        ({"batch": 1}, "--batch at least 2"),
        ({"batch": 50_000}, "50000 unique captions"),
        ({"faces_held_out": ("Comic",)}, "unknown face 'Comic'"),
        ({"faces_held_out": ()}, "at least one face"),
        ({"faces_held_out": FACES}, "unique captions needs as many names, got 0"),
        ({"threads": 0}, "--threads must be at least 1"),
    ],
)
def test_impossible_settings_are_explained(few_faces, tmp_path, change, message):
    settings = {"steps": 1, "batch": 16, "out": tmp_path, "faces_held_out": HELD_OUT, **change}
    with pytest.raises(UserError, match=message):
        demo_module.demo(DemoConfig(**settings))


def test_loss_that_is_not_finite_stops_the_run(few_faces, tmp_path, monkeypatch):
    monkeypatch.setattr(
        demo_module.UniqueCaptions,
        "draw",
        lambda self: (torch.full((4, 1, 32, 32), torch.nan), torch.arange(4)),
    )
    with pytest.raises(UserError, match="loss became nan at step 1"):
        demo_module.demo(DemoConfig(steps=1, batch=16, out=tmp_path, faces_held_out=HELD_OUT))


def test_ties_are_counted_without_the_answer_itself():
    scores = torch.tensor([[0.9, 0.9, 0.1], [0.0, 0.5, 0.6], [0.3, 0.3, 0.3]])
    assert ties(scores, torch.eye(3), chunk=2).tolist() == [1, 0, 2]


def test_recalls_of_all_of_new_and_against_ties():
    ranks, tied = torch.tensor([0, 0, 3, 9]), torch.tensor([1, 0, 0, 0])
    figures = recalls(ranks, tied, torch.tensor([True, False, True, False]))
    assert figures == {
        "recall@1": 0.5,
        "recall@5": 0.75,
        "recall@1_ties_against": 0.25,
        "recall@1_new_pictures": 0.5,
        "recall@5_new_pictures": 1.0,
    }
    assert recalls(ranks, tied, torch.zeros(4, dtype=torch.bool))["recall@1_new_pictures"] is None


def test_confusion_matrix_is_truth_by_answer():
    matrix = confusion_matrix(torch.tensor([0, 0, 2]), torch.tensor([0, 1, 2]), 3)
    assert matrix.tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]
