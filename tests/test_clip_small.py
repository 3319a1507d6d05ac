"""The small towers, the tokenizer and the model that joins them."""

import json
import math

import pytest
import torch

pytest.importorskip("tokenizers")

from fastclip.clip.config import ClipConfig, ConvConfig, TextConfig
from fastclip.clip.convnet import ConvTower
from fastclip.clip.model import Clip
from fastclip.clip.text import TextTower
from fastclip.clip.tokenizer import BpeTokenizer

NAMES = ["black chess queen", "white chess king", "snowman", "braille pattern dots-1234", "digit seven"] * 3
SMALL = ClipConfig(
    embed_dim=24,
    image=ConvConfig(image_size=20, widths=(4, 8), blocks=(0, 1), hidden=16),
    text=TextConfig(vocabulary=50, context=8, width=16, layers=2, head_width=8),
)


@pytest.fixture
def tokenizer() -> BpeTokenizer:
    return BpeTokenizer.train(NAMES, vocabulary=200, context=8)


def test_tokenizer_pads_with_zero_truncates_and_ignores_case(tokenizer):
    ids = tokenizer(["SNOWMAN", "black chess queen", "digit " * 50])
    assert ids.dtype == torch.int64 and ids.shape == (3, 8)
    assert torch.equal(tokenizer("snowman")[0], ids[0][ids[0] != 0])
    assert (ids[0] == 0).sum() > 0 and (ids[2] != 0).all()


def test_tokenizer_spells_words_it_has_not_seen_and_splits_digits(tokenizer):
    pieces = tokenizer.tokenizer.encode("dots-1234").tokens
    assert pieces == ["dots", "-", "1", "2", "3", "4"]
    # "h", "i", "s", "s" occur inside other names.
    assert tokenizer.tokenizer.encode("hiss").tokens != ["[UNK]"]
    assert "[UNK]" in tokenizer.tokenizer.encode("\N{SNOWMAN}").tokens


def test_tokenizer_trains_the_same_twice_and_survives_json(tokenizer, tmp_path):
    assert BpeTokenizer.train(NAMES, 200, 8).to_json() == tokenizer.to_json()
    (tmp_path / "t.json").write_text(tokenizer.to_json(), encoding="utf-8")
    assert torch.equal(BpeTokenizer.load(tmp_path / "t.json", 8)(NAMES), tokenizer(NAMES))
    assert len(tokenizer) <= 200


@pytest.mark.parametrize("side", [16, 20, 33], ids=["halves", "one odd half", "odd"])
def test_image_tower_shapes_and_gradients(side):
    tower = ConvTower(ConvConfig(image_size=side, channels=3, widths=(4, 8, 8), blocks=(1, 0, 1), hidden=12), 24)
    features = tower(torch.rand(5, 3, side, side))
    assert features.shape == (5, 24) and features.dtype == torch.float32
    features.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tower.parameters())
    assert tower.features[0].weight.grad.abs().sum() > 0


def test_text_tower_shapes_and_gradients():
    tower = TextTower(SMALL.text, 24)
    ids = torch.tensor([[3, 4, 5, 0], [6, 0, 0, 0], [7, 8, 9, 10]])
    features = tower(ids)
    assert features.shape == (3, 24)
    features.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tower.parameters())
    used = tower.tokens.weight.grad.abs().sum(1) > 0
    assert used.nonzero().flatten().tolist() == list(range(3, 11))


def test_text_features_do_not_depend_on_padding_or_neighbours():
    tower = TextTower(SMALL.text, 24).eval()
    together = tower(torch.tensor([[3, 4, 5, 0, 0, 0], [7, 8, 9, 10, 11, 12]]))
    torch.testing.assert_close(tower(torch.tensor([[3, 4, 5]])), together[:1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tower(torch.tensor([[7, 8, 9, 10, 11, 12]])), together[1:], atol=1e-5, rtol=1e-5)


def test_text_tower_knows_word_order():
    tower = TextTower(SMALL.text, 24).eval()
    one, other = tower(torch.tensor([[3, 4, 5], [5, 4, 3]]))
    assert not torch.allclose(one, other, atol=1e-4)


def test_empty_caption_is_finite():
    assert TextTower(SMALL.text, 24)(torch.zeros(2, 4, dtype=torch.int64)).isfinite().all()


def test_model_gives_the_losss_arguments_and_learns_its_scale():
    model = Clip(SMALL)
    image, text, scale = model(torch.rand(6, 1, 20, 20), torch.randint(1, 50, (6, 5)))
    assert image.shape == text.shape == (6, 24)
    assert scale.shape == () and scale.item() == pytest.approx(1 / 0.07)
    scale.backward()
    assert model.log_scale.grad.item() == pytest.approx(scale.item())


@pytest.mark.parametrize(("before", "after"), [(500.0, 100.0), (0.1, 1.0), (20.0, 20.0)])
def test_scale_is_clamped(before, after):
    model = Clip(SMALL)
    model.log_scale.data.fill_(math.log(before))
    model.clamp_scale()
    assert model.logit_scale.item() == pytest.approx(after, rel=1e-5)


def test_config_survives_json_and_refuses_unknown_fields():
    values = json.loads(json.dumps(SMALL.to_dict()))
    assert ClipConfig.from_dict(values) == SMALL
    values["text"]["heads"] = 3
    with pytest.raises(TypeError, match="heads"):
        ClipConfig.from_dict(values)
