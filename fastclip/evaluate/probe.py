"""Linear probe: how well a logistic regression on the frozen image features tells classes apart.

The strength of the L2 penalty is searched as in Radford et al., arXiv 2103.00020, appendix A.3: on a part of the
training pictures, first at seven strengths two decades apart, then around the best one in halving steps, down to eight
a decade. Their features come from before the projection; these are encode_image's, as in the example of OpenAI's
README.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from fastclip.errors import UserError
from fastclip.evaluate.classify import Classified
from fastclip.evaluate.encode import READING, Reading, encode_images
from fastclip.evaluate.labelled import UNKNOWN, Labelled
from fastclip.evaluate.loaded import LoadedModel
from fastclip.evaluate.progress import progress

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

# Exponents of ten of C, scikit-learn's inverse of the penalty.
LOWEST, HIGHEST, FIRST_STEP, LAST_STEP = -6.0, 6.0, 2.0, 0.125
# Most fits of a search: the first ones, and two for each halving of the step.
FITS = round((HIGHEST - LOWEST) / FIRST_STEP) + 1 + 2 * round(math.log2(FIRST_STEP / LAST_STEP))


@dataclass(frozen=True)
class Fitted:
    """`scores` float64 [N, C], log-probabilities of the test pictures; `c`: the chosen inverse of the penalty.

    `sweep`: (C, accuracy on the validation part) of each that was tried, by C.
    """

    scores: torch.Tensor
    c: float
    sweep: list[tuple[float, float]]


def probe(
    loaded: LoadedModel, train: Labelled, test: Labelled, reading: Reading = READING, *, seed: int = 0
) -> tuple[Classified, Fitted]:
    """linear_probe on the features of the pictures that can be read; `test` has the classes of `train`.

    Pictures of unknown class are not trained on. UserError as from encode_images and linear_probe.
    """
    learnt = encode_images(loaded, train.pictures, reading)
    judged = encode_images(loaded, test.pictures, reading)
    labels = train.labels[learnt.kept]
    known = labels != UNKNOWN
    fitted = linear_probe(learnt.features[known], labels[known], judged.features, seed=seed)
    scores = torch.full((len(judged.kept), len(train.classes)), -torch.inf, dtype=torch.float64)
    # A class without a picture to learn from is never the answer.
    scores[:, labels[known].unique()] = fitted.scores
    skipped = {
        data.names[i]: why for data, part in ((train, learnt), (test, judged)) for i, why in part.skipped.items()
    }
    return Classified(test, scores, judged.kept, skipped, scale=1.0), fitted


def linear_probe(
    train: torch.Tensor,
    train_labels: torch.Tensor,
    test: torch.Tensor,
    *,
    validation: float = 0.2,
    seed: int = 0,
    iterations: int = 1000,
) -> Fitted:
    """Fit on features [M, D] with labels int64 [M], score `test` [N, D]; columns are the labels in order.

    The share `validation` of each class chooses C; then all of `train` is fitted. UserError if a class has fewer than
    two pictures, or there is one class only.
    """
    from sklearn.model_selection import train_test_split

    classes, counts = train_labels.unique(return_counts=True)
    if len(classes) < 2 or counts.min() < 2:
        raise UserError(f"a probe needs two classes or more, of two pictures or more each; there are {counts.tolist()}")
    # Every class needs a picture in both parts.
    share = max(validation, len(classes) / len(train))
    x, held_out, y, truth = train_test_split(
        train.numpy(), train_labels.numpy(), test_size=share, random_state=seed, stratify=train_labels.numpy()
    )
    tried: dict[float, float] = {}

    with progress(None, "fits", FITS) as bar:

        def accuracy(exponent: float) -> float:
            if exponent not in tried:
                tried[exponent] = float((fit(x, y, exponent, iterations).predict(held_out) == truth).mean())
                bar.update()
            return tried[exponent]

        best = best_exponent(accuracy)
        model = fit(train.numpy(), train_labels.numpy(), best, iterations)
    # In float64: with a strong penalty all are nearly equal.
    scores = torch.from_numpy(model.predict_log_proba(test.numpy().astype(np.float64)))
    return Fitted(scores, 10**best, [(10**exponent, right) for exponent, right in sorted(tried.items())])


def best_exponent(accuracy: Callable[[float], float]) -> float:
    """Where `accuracy` is highest, as far as halving the step shows; of equals the one nearest to 0 (C = 1)."""

    def key(exponent: float) -> tuple[float, float]:
        return accuracy(exponent), -abs(exponent)

    step = FIRST_STEP
    tries = [LOWEST + step * i for i in range(round((HIGHEST - LOWEST) / step) + 1)]
    best = max(tries, key=key)
    while step > LAST_STEP:
        step /= 2
        around = (best - step, best, best + step)
        best = max((exponent for exponent in around if LOWEST <= exponent <= HIGHEST), key=key)
    return best


def fit(features: np.ndarray, labels: np.ndarray, exponent: float, iterations: int) -> LogisticRegression:
    """L-BFGS for at most `iterations`, converged or not, as CLIP's authors did it."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=10**exponent, max_iter=iterations).fit(features, labels)
