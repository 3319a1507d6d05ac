"""Features of pictures and texts, whatever the pictures are, and models that cannot be used."""

import io
import json

import pytest
import torch
from colour_model import COLOURS, picture
from torch.nn import functional as F

pytest.importorskip("tokenizers")

from fastclip import clip
from fastclip.clip.tokenizer import BpeTokenizer, ClipTokenizer
from fastclip.errors import UserError
from fastclip.evaluate.encode import Reading, encode_images, encode_texts
from fastclip.evaluate.loaded import open_model

SMALL = {"image_size": 32, "image_width": 64, "image_layers": 1, "text_width": 64, "text_layers": 1, "context": 8}


@pytest.mark.parametrize("batch", [1, 2, 3, 5], ids=["one", "ragged", "whole", "larger"])
def test_pictures_of_every_source_in_order(colours, tmp_path, batch):
    picture("green").save(tmp_path / "a.png")
    file = io.BytesIO()
    picture("blue").save(file, "PNG")
    encoded = encode_images(colours, [picture("red"), tmp_path / "a.png", file.getvalue()], Reading(batch))
    assert encoded.kept.tolist() == [0, 1, 2] and encoded.skipped == {}
    assert encoded.features.argmax(1).tolist() == [0, 1, 2]
    torch.testing.assert_close(encoded.features.norm(dim=1), torch.ones(3))
    expected = torch.stack([colours.preprocess(picture(name)).mean((1, 2)) for name in COLOURS])
    torch.testing.assert_close(encoded.features, F.normalize(expected, dim=1))


def test_workers_change_nothing(colours, coloured):
    paths = sorted(coloured.rglob("*.png"))
    alone, helped = (encode_images(colours, paths, Reading(5, workers)) for workers in (0, 2))
    assert torch.equal(alone.features, helped.features) and torch.equal(alone.kept, helped.kept)


def test_pictures_that_cannot_be_read_are_left_out_and_named(colours, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"nothing")
    pictures = [picture("red"), tmp_path / "bad.png", picture("blue"), tmp_path / "gone.png"]
    encoded = encode_images(colours, pictures, Reading(2, max_skipped=0.5))
    assert encoded.kept.tolist() == [0, 2] and encoded.features.argmax(1).tolist() == [0, 2]
    assert list(encoded.skipped) == [1, 3] and "bad.png: not a picture" in encoded.skipped[1]
    with pytest.raises(UserError, match=r"2 of 4 pictures cannot be used, more than the 40% .*; the first: .*bad.png"):
        encode_images(colours, pictures, Reading(max_skipped=0.4))
    nothing = encode_images(colours, pictures[1:2], Reading(max_skipped=1.0))
    assert nothing.features.shape == (0, 3) and nothing.kept.dtype == torch.int64


def test_texts_in_chunks(colours):
    texts = ["red", "a green thing", "blue and blue", "red"]
    features = encode_texts(colours, texts, batch=3)
    assert features.argmax(1).tolist() == [0, 1, 2, 0] and torch.equal(features[0], features[3])
    torch.testing.assert_close(features.norm(dim=1), torch.ones(4))


def test_weights_that_are_not_finite_are_named(colours):
    colours.model.image.weight.data[0, 0] = torch.nan
    with pytest.raises(UserError, match="model colours gives features that are not finite"):
        encode_images(colours, [picture("red")])


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(a model with CLIP's kind of tokenizer, the folder it is saved in)."""
    tokenizer = ClipTokenizer.train(["a red thing", "a blue thing"], vocabulary=530, context=8)
    torch.manual_seed(0)
    model = clip.create_model("ViT-B/32", vocabulary=len(tokenizer), **SMALL).eval()
    folder = tmp_path_factory.mktemp("small")
    clip.save(model, folder)
    (folder / "tokenizer.json").write_text(tokenizer.to_json())
    return model, tokenizer, folder


def test_model_folder_gives_the_same_features(small):
    model, tokenizer, folder = small
    loaded = open_model(folder, device="cpu")
    assert not loaded.model.training and (loaded.preprocess.size, loaded.preprocess.channels) == (32, 3)
    with torch.no_grad():
        expected = F.normalize(model.encode_text(tokenizer(["red", "a blue thing"])), dim=1)
        torch.testing.assert_close(encode_texts(loaded, ["red", "a blue thing"]), expected)
        image = F.normalize(model.encode_image(loaded.preprocess(picture("red"))[None]), dim=1)
        torch.testing.assert_close(encode_images(loaded, [picture("red")]).features, image)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_openclip_file_with_the_tokenizer_beside_it(small, tmp_path, suffix):
    from safetensors.torch import save_file

    model, tokenizer, _ = small
    state = clip.export_openclip(model)
    path = tmp_path / f"weights.{suffix}"
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json())
    loaded = open_model(path, device="cpu")
    with torch.no_grad():
        expected = F.normalize(model.encode_text(tokenizer(["red"])), dim=1)
    torch.testing.assert_close(encode_texts(loaded, ["red"]), expected)
    assert loaded.fingerprint() == open_model(path, device="cpu").fingerprint()


def test_fingerprint_tells_weights_apart(small):
    loaded = open_model(small[2], device="cpu")
    before = loaded.fingerprint()
    loaded.model.text.tokens.weight.data[3, 4] += 1e-3
    assert loaded.fingerprint() != before


def test_tokenizer_of_another_model_is_refused(small, tmp_path):
    model, _, _ = small
    clip.save(model, tmp_path)
    other = BpeTokenizer.train([f"word{chr(97 + i)}{chr(97 + j)}" for i in range(26) for j in range(26)], 800, 8)
    (tmp_path / "tokenizer.json").write_text(other.to_json())
    with pytest.raises(UserError, match=rf"{tmp_path} has .* token embeddings, its tokenizer \d+ ids"):
        open_model(tmp_path)


@pytest.mark.parametrize("damage", ["nothing", "empty", "truncated", "bad json", "no tokenizer json"])
def test_models_that_cannot_be_used_are_named(small, tmp_path, damage):
    folder = tmp_path / "model"
    if damage != "nothing":
        folder.mkdir()
    if damage not in ("nothing", "empty"):
        for path in small[2].iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
    if damage == "truncated":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:500])
    if damage == "bad json":
        (folder / "config.json").write_text(json.dumps({"image": 3}))
    if damage == "no tokenizer json":
        (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=str(folder)):
        open_model(folder)
