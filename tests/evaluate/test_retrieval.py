"""Retrieval, ties and recommendation against what a loop over all pairs gives."""

import json

import numpy as np
import pytest
import torch
from colour_model import COLOURS, picture
from torch.nn import functional as F

from fastclip.data.config import DataConfig
from fastclip.errors import UserError
from fastclip.evaluate import pairs as pairs_module
from fastclip.evaluate.encode import Reading
from fastclip.evaluate.pairs import describe, evaluate_pairs
from fastclip.evaluate.recommend import similar
from fastclip.evaluate.retrieval import retrieval_figures, ties


def unit(rows: int, width: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.mark.parametrize("captions", [1, 5], ids=["one caption", "five captions"])
def test_figures_are_those_of_a_loop(captions):
    images = unit(30, 8, 0)
    owner = torch.arange(30).repeat_interleave(captions)
    texts = F.normalize(images[owner] + 0.7 * unit(30 * captions, 8, 1), dim=1)
    scores = (images @ texts.T).numpy()
    text_ranks = [(scores[:, j] > scores[owner[j], j]).sum() for j in range(len(texts))]
    image_ranks = [(scores[i] > scores[i][owner.numpy() == i].max()).sum() for i in range(30)]
    figures = retrieval_figures(images, texts, owner)
    assert (figures["images"], figures["texts"]) == (30, 30 * captions)
    for way, ranks in (("text_to_image", text_ranks), ("image_to_text", image_ranks)):
        for k in (1, 5, 10):
            assert figures[way][f"recall@{k}"] == pytest.approx(np.mean(np.array(ranks) < k))
        assert figures[way]["median rank"] == np.median(ranks) + 1
    # Neither all right nor all wrong: the case can tell.
    assert 0.1 < figures["text_to_image"]["recall@1"] < 0.95


def test_ties_are_counted_whatever_the_chunk():
    texts = unit(7, 5, 0)
    images = texts[[0, 0, 0, 3, 4, 5, 5]]
    assert ties(texts, images, chunk=3).tolist() == [2, 2, 2, 0, 0, 1, 1]


@pytest.fixture
def pairs(tmp_path):
    """A folder of six pictures; those of a colour are told apart by the second caption only."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    for i, name in enumerate([*COLOURS, *COLOURS]):
        picture(name, i).save(folder / f"{i}.png")
        (folder / f"{i}.json").write_text(json.dumps({"caption": [f"a {name} thing", name * (1 + i // 3)]}))
    return folder


def test_pairs_of_a_folder(colours, pairs):
    figures = evaluate_pairs(colours, DataConfig(source=str(pairs)), Reading(4))
    assert (figures["images"], figures["texts"], figures["skipped"]) == (6, 12, 0)
    # Two pictures of each colour: the right one is first or second.
    assert figures["image_to_text"]["recall@5"] == 1 and figures["text_to_image"]["recall@5"] == 1
    assert 0.3 < figures["text_to_image"]["recall@1"] < 1
    said = describe(figures, "pairs")
    assert said.startswith("6 pictures and 12 captions of pairs:") and "recall@10 1.000" in said and "\n" in said


def test_pairs_that_cannot_be_used_are_counted(colours, pairs):
    (pairs / "0.png").write_bytes(b"broken")
    (pairs / "1.json").write_text("{}")
    data = DataConfig(source=str(pairs))
    figures = evaluate_pairs(colours, data, Reading(max_skipped=0.4))
    assert (figures["images"], figures["texts"], figures["skipped"]) == (4, 8, 2)
    assert "left out: 2" in describe(figures, "pairs")
    with pytest.raises(UserError, match=r"2 of 6 pictures .* more than the 20% .*; the first: .*not a picture"):
        evaluate_pairs(colours, data, Reading(max_skipped=0.2))
    for path in pairs.glob("*.json"):
        path.write_text("{}")
    with pytest.raises(UserError, match=r"none of the 6 samples can be used; the first: no caption"):
        evaluate_pairs(colours, data, Reading(max_skipped=1.0))


def test_files_that_vanish_are_counted(colours, pairs, monkeypatch):
    found = pairs_module.captions_of

    def vanish(source, row):
        captions = found(source, row)
        (pairs / f"{row}.png").unlink() if row == 2 else None
        return captions

    monkeypatch.setattr(pairs_module, "captions_of", vanish)
    figures = evaluate_pairs(colours, DataConfig(source=str(pairs)), Reading(max_skipped=0.4))
    assert (figures["images"], figures["skipped"]) == (5, 1)


def test_pairs_of_a_table_with_bad_utf8(colours, pairs, tmp_path):
    pytest.importorskip("pyarrow")
    table = tmp_path / "table.csv"
    table.write_bytes(b"path,caption\npairs/0.png,red \xff\xfe\npairs/1.png,green\npairs/0.png,more red\n")
    figures = evaluate_pairs(colours, DataConfig(source=str(table)))
    assert (figures["images"], figures["texts"]) == (2, 3)
    assert figures["text_to_image"]["recall@1"] == figures["image_to_text"]["recall@1"] == 1


@pytest.mark.parametrize(("limit", "images"), [(1, 1), (4, 3), (6, 6), (100, 6)])
def test_limit_takes_pairs_spread_over_all(colours, pairs, limit, images):
    assert evaluate_pairs(colours, DataConfig(source=str(pairs)), limit=limit)["images"] == images


def test_shards_are_refused(colours, tmp_path):
    with pytest.raises(UserError, match="not on tar shards"):
        evaluate_pairs(colours, DataConfig(source=str(tmp_path / "a.tar")))


@pytest.mark.parametrize("liked", [[3], [3, 17, 3], list(range(38))], ids=["one", "some", "all but two"])
def test_similar_items_are_the_nearest_that_are_not_liked(liked):
    features = 3 * unit(40, 6, 2)
    scores, rows = similar(features, liked, 5)
    unit_features = F.normalize(features, dim=1).numpy()
    mean = unit_features[sorted(set(liked))].mean(0)
    cosines = unit_features @ mean / np.linalg.norm(mean)
    expected = [row for row in np.argsort(-cosines) if row not in liked][:5]
    assert rows.tolist() == expected and len(rows) == min(5, 40 - len(set(liked)))
    np.testing.assert_allclose(scores.numpy(), cosines[expected], atol=1e-6)


@pytest.mark.parametrize("liked", [[], [0, 1, 2, 3]], ids=["nothing", "everything"])
def test_nothing_to_recommend(liked):
    with pytest.raises(UserError, match=r"of 4 items are liked"):
        similar(torch.eye(4), liked, 2)
