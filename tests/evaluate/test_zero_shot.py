"""Prompts, class features and accuracies against OpenCLIP's and scikit-learn's."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fastclip.errors import UserError
from fastclip.evaluate.classify import describe, templates_for, write_classified, zero_shot
from fastclip.evaluate.encode import Reading
from fastclip.evaluate.labelled import UNKNOWN, open_labelled, split
from fastclip.evaluate.templates import named_templates, prompts_for, resolve_templates
from fastclip.evaluate.zero_shot import accuracies, class_features, confusion_matrix


def from_openclip(name: str):
    """A module of open_clip by itself: the package imports torchvision."""
    package = importlib.util.find_spec("open_clip")
    if package is None:
        pytest.skip("open_clip_torch is not installed")
    spec = importlib.util.spec_from_file_location(f"open_clips_{name}", Path(package.origin).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_imagenet_templates_are_openais():
    data = from_openclip("zero_shot_metadata")
    ours = named_templates()
    assert len(ours["imagenet"]) == 80 and len(ours["imagenet-7"]) == 7
    assert prompts_for(["cat"], ours["imagenet"]) == [[f("cat") for f in data.OPENAI_IMAGENET_TEMPLATES]]
    assert prompts_for(["cat"], ours["imagenet-7"]) == [[f("cat") for f in data.SIMPLE_IMAGENET_TEMPLATES]]


def test_templates_by_name_and_by_sentence():
    assert resolve_templates(["photo", "plain", "a {0} in {}", "plain"]) == ("a photo of a {}.", "{}", "a {0} in {}")
    assert prompts_for(["x{y}"], ["a {0} in {}"]) == [["a {0} in x{y}"]]


@pytest.mark.parametrize("wrong", ["a photo", "{} and {}", "imagnet", ""])
def test_sentences_without_a_place_for_the_class_are_refused(wrong):
    with pytest.raises(UserError, match="neither a set of templates"):
        resolve_templates(["photo", wrong])


def test_class_features_are_openclips():
    reference = from_openclip("zero_shot_classifier")
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(1000, 16, generator=generator)

    class Model:
        log_scale = torch.tensor(0.0)

        def encode_text(self, ids, normalize=False):
            features = table[ids].sum(1)
            return features / features.norm(dim=1, keepdim=True) if normalize else features

    def tokenize(texts):
        return torch.tensor([[sum(map(ord, text)) % 1000, len(text)] for text in texts])

    classes, templates = ["cat", "dog", "great white shark"], named_templates()["imagenet-7"]
    theirs = reference.build_zero_shot_classifier(Model(), tokenize, classes, templates, num_classes_per_batch=2)
    ours = class_features(Model(), tokenize, prompts_for(classes, templates))
    torch.testing.assert_close(ours, theirs.T, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("classes", [2, 5, 12], ids=["fewer than five", "five", "more"])
def test_accuracies_are_scikit_learns(classes):
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(classes)
    # Uneven classes, so that the mean over pictures and over classes differ.
    labels = np.concatenate([np.arange(classes), rng.integers(0, 2, 60)])
    scores = rng.normal(size=(len(labels), classes)) + 1.5 * np.eye(classes)[labels]
    ours = accuracies(torch.tensor(scores), torch.tensor(labels))
    guess, numbers = scores.argmax(1), np.arange(classes)
    assert ours["top-1"] == pytest.approx(metrics.accuracy_score(labels, guess))
    assert ours["mean per class"] == pytest.approx(metrics.balanced_accuracy_score(labels, guess))
    if classes > 5:
        assert ours["top-5"] == pytest.approx(metrics.top_k_accuracy_score(labels, scores, k=5, labels=numbers))
    else:
        assert ours["top-5"] == 1
    matrix = confusion_matrix(torch.tensor(labels), torch.tensor(guess), classes)
    assert matrix.tolist() == metrics.confusion_matrix(labels, guess, labels=numbers).tolist()


def test_classes_without_pictures_do_not_count():
    scores = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.5]])
    assert accuracies(scores, torch.tensor([0, 2])) == {"top-1": 0.5, "top-5": 1.0, "mean per class": 0.5}


def test_folder_of_folders_is_classified(colours, coloured, tmp_path):
    data = open_labelled(coloured)
    assert data.classes == ("the blue ones", "the green ones", "the red ones")
    result = zero_shot(colours, data, ("a photo of {}",), Reading(5))
    assert result.figures == {"top-1": 1.0, "top-5": 1.0, "mean per class": 1.0}
    paths = write_classified(result, tmp_path / "out", "colours", {"model": "colours"})
    assert [path.name for path in paths] == ["predictions.json", "confusion.png"] and all(
        p.stat().st_size for p in paths
    )
    written = json.loads(paths[0].read_text())
    assert written["model"] == "colours" and written["figures"]["top-1"] == 1 and len(written["predictions"]) == 12
    first = written["predictions"][0]
    assert first["image"] == "the_blue_ones/0.png" and first["label"] == first["top"][0]["class"] == "the blue ones"
    scores = torch.tensor([entry["score"] for entry in first["top"]])
    chances = torch.tensor([entry["probability"] for entry in first["top"]])
    torch.testing.assert_close(chances, (np.exp(2.0) * scores).softmax(0), atol=1e-5, rtol=1e-4)


def test_own_classes_and_pictures_of_unknown_class(colours, coloured, tmp_path):
    data = open_labelled(coloured, ["red", "the green ones", "black"])
    assert sorted(set(data.labels.tolist())) == [UNKNOWN, 1]
    result = zero_shot(colours, data, ("{}",))
    assert result.figures["top-1"] == 1 and (result.labels == 1).sum() == 4
    assert "4 pictures of 3 classes: top-1 100.0%" in describe(result) and "chance 33.3%" in describe(result)
    predictions = result.predictions()
    assert sum(entry["label"] is None for entry in predictions) == 8
    unknown = zero_shot(colours, open_labelled(coloured, ["red", "green"]), ("{}",))
    assert unknown.figures is None and "no picture's class is known" in describe(unknown)
    paths = write_classified(unknown, tmp_path / "out", "colours", {})
    assert [path.name for path in paths] == ["predictions.json"]


def test_pictures_that_cannot_be_read_keep_the_others_in_place(colours, coloured):
    (coloured / "the_green_ones" / "1.png").write_bytes(b"")
    result = zero_shot(colours, open_labelled(coloured), ("{}",))
    assert result.figures["top-1"] == 1 and list(result.skipped) == ["the_green_ones/1.png"]
    assert "left out: 1 (such as the_green_ones/1.png)" in describe(result)
    assert [entry["image"] for entry in result.predictions()][4:6] == ["the_green_ones/0.png", "the_green_ones/2.png"]


def test_models_of_characters_are_asked_for_the_bare_name(colours):
    assert templates_for(colours) == ("a photo of a {}.",) and templates_for(colours, ["plain"]) == ("{}",)
    colours.preprocess.channels = 1
    assert templates_for(colours) == ("{}",)


@pytest.mark.parametrize("problem", ["missing", "no pictures", "one class", "flat", "twice"])
def test_folders_that_cannot_be_classified(tmp_path, coloured, problem):
    folder = {"missing": tmp_path / "gone", "no pictures": tmp_path / "empty"}.get(problem, coloured)
    (tmp_path / "empty").mkdir()
    if problem == "one class":
        folder = coloured / ".."
    if problem == "flat":
        folder = coloured / "the_red_ones"
    with pytest.raises(UserError, match=r"not a folder|no pictures in|different classes in"):
        open_labelled(folder, ["red", "red"] if problem == "twice" else [])


def test_digits_are_scans_on_paper():
    pytest.importorskip("sklearn")
    data = open_labelled("digits")
    assert len(data.pictures) == 1797 and data.classes[7] == "seven"
    # Ink on paper: mostly light.
    assert data.pictures[0].size == (32, 32) and np.asarray(data.pictures[0]).mean() > 180
    with pytest.raises(UserError, match="10 classes, zero to nine, got 2"):
        open_labelled("digits", ["a", "b"])


def test_split_takes_a_share_of_each_class(coloured):
    data = open_labelled(coloured)
    train, test = split(data, 0.25, seed=0)
    assert torch.bincount(test.labels).tolist() == [1, 1, 1] and torch.bincount(train.labels).tolist() == [3, 3, 3]
    assert sorted([*train.names, *test.names]) == sorted(data.names)
    assert all(
        Path(path).parent.name == f"the_{data.classes[label].split()[1]}_ones"
        for path, label in zip(test.pictures, test.labels.tolist(), strict=True)
    )
    again = split(data, 0.25, seed=0)
    assert again[1].names == test.names and split(data, 0.25, seed=1)[1].names != test.names
    # Never all of a class.
    assert torch.bincount(split(data, 0.99, seed=0)[0].labels).tolist() == [1, 1, 1]
