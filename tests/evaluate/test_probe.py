"""The linear probe: the search for its penalty, and what it learns."""

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from sklearn.datasets import make_classification
from sklearn.linear_model import LogisticRegression

from fastclip.errors import UserError
from fastclip.evaluate.encode import Reading
from fastclip.evaluate.labelled import UNKNOWN, Labelled, open_labelled, split
from fastclip.evaluate.probe import FITS, best_exponent, linear_probe, probe


@pytest.mark.parametrize("peak", [-6.0, -3.3, 0.0, 1.375, 5.2, 6.0])
def test_penalty_is_found_to_an_eighth_of_a_decade(peak):
    tried = []

    def accuracy(exponent):
        tried.append(exponent)
        return -abs(exponent - peak)

    assert abs(best_exponent(accuracy) - peak) <= 0.0625
    assert tried[:7] == [-6, -4, -2, 0, 2, 4, 6] and all(-6 <= exponent <= 6 for exponent in tried)
    assert len(set(tried)) <= FITS == 15


def test_of_equal_penalties_the_one_nearest_to_one_is_taken():
    assert best_exponent(lambda exponent: 1.0) == 0
    assert best_exponent(lambda exponent: exponent >= 1) == 1
    assert best_exponent(lambda exponent: exponent <= -3) == -3


@pytest.fixture(scope="module")
def problem():
    """Four classes in 20 dimensions, 5 of which tell; hard enough that the penalty matters."""
    x, y = make_classification(700, 20, n_informative=5, n_classes=4, flip_y=0.1, random_state=0)
    x = torch.tensor(x / np.linalg.norm(x, axis=1, keepdims=True), dtype=torch.float32)
    return x[:500], torch.tensor(y[:500]), x[500:], torch.tensor(y[500:])


def test_probe_is_the_regression_with_the_chosen_penalty(problem):
    train, labels, test, truth = problem
    fitted = linear_probe(train, labels, test)
    tried = dict(fitted.sweep)
    assert tried[fitted.c] == max(tried.values()) > min(tried.values()) and list(tried) == sorted(tried)
    expected = LogisticRegression(C=fitted.c, max_iter=1000).fit(train.numpy(), labels.numpy())
    np.testing.assert_allclose(fitted.scores.exp().numpy(), expected.predict_proba(test.numpy()), atol=1e-4)
    assert fitted.scores.dtype == torch.float64
    accuracy = (fitted.scores.argmax(1) == truth).double().mean()
    # As good as the best penalty for the test set itself, nearly.
    best = max(
        LogisticRegression(C=10.0**e, max_iter=1000).fit(train, labels).score(test, truth) for e in range(-4, 5, 2)
    )
    assert accuracy > best - 0.03


def test_probe_is_the_same_twice_and_two_classes_have_two_columns(problem):
    train, labels, test, _ = problem
    two = labels < 2
    first, second = (linear_probe(train[two], labels[two], test[:9], seed=3) for _ in range(2))
    assert first.scores.shape == (9, 2) and torch.equal(first.scores, second.scores) and first.sweep == second.sweep


@pytest.mark.parametrize("labels", [[0, 0, 0, 0], [0, 0, 0, 1]], ids=["one class", "a class of one"])
def test_too_few_pictures(labels):
    with pytest.raises(UserError, match="two classes or more, of two pictures or more"):
        linear_probe(torch.eye(4), torch.tensor(labels), torch.eye(4))


def test_two_pictures_a_class_are_enough():
    fitted = linear_probe(torch.eye(6), torch.tensor([0, 1, 2, 0, 1, 2]), torch.eye(6))
    assert fitted.scores.argmax(1).tolist() == [0, 1, 2, 0, 1, 2]


def test_probe_of_a_folder(colours, coloured):
    (coloured / "the_red_ones" / "3.png").write_bytes(b"no")
    train, test = split(open_labelled(coloured), 0.25, 0)
    with pytest.raises(UserError, match=r"cannot be used, more than the 10% that --max-skipped allows"):
        probe(colours, train, test)
    result, _ = probe(colours, train, test, Reading(max_skipped=0.5))
    assert result.figures["top-1"] == 1 and list(result.skipped) == ["the_red_ones/3.png"]


def test_class_that_is_not_learnt_is_never_the_answer(colours, coloured):
    data = open_labelled(coloured, ["the red ones", "black", "the blue ones"])
    assert UNKNOWN in data.labels
    result, _ = probe(colours, data, data)
    assert set(result.scores.argmax(1).tolist()) <= {0, 2} and result.figures["top-1"] == 1
    for row in result.predictions():
        assert {entry["class"] for entry in row["top"]} == {"the red ones", "the blue ones"}


def test_labels_must_be_there(colours, coloured):
    data = open_labelled(coloured)
    unknown = Labelled(data.pictures, data.names, torch.full((12,), UNKNOWN), data.classes)
    with pytest.raises(UserError, match="two classes or more"):
        probe(colours, unknown, data)
