"""The cases "ranks" and "topk": exact retrieval over N images and N texts, and the k best of each image.

Legend: image, text [N, D] of unit length, S = image text^T; rank of an image: how many texts score above its own.
"""

import functools

import torch
from torch import Tensor

from fastclip import retrieval_ranks, topk
from fastclip.benchmarks.case import Call, Case, Found, Peer, Problem, Truth, by_name
from fastclip.benchmarks.config import Config
from fastclip.benchmarks.peers import why_not_backend
from fastclip.benchmarks.problems import batch, feature_mib
from fastclip.benchmarks.truth import sample_rows

D, K, SAMPLE, BLOCK = 256, 10, 256, 1024  # BLOCK: rows of S that the chunked form holds
# A score within rounding of the positive's may fall on either side: one place, of ranks in the hundreds.
RANK_ROUNDING = {"fp32": 2e-3}
RANKS, TOP_K = "both directions", f"the {K} best"
QUICK, FULL_RANKS, FULL_TOP_K = (4096,), (4096, 16384, 100_000), (4096, 16384)


def dense_ranks(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """The matrix and two comparisons."""
    S = image @ text.T
    positive = S.diagonal()
    return (S > positive[:, None]).sum(1), (S > positive).sum(0)


def chunked_ranks(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """The same by blocks of rows: what one writes when the matrix does not fit."""
    positive = (image * text).sum(1)
    by_image, by_text = [], torch.zeros(len(text), dtype=torch.int64)
    for start in range(0, len(image), BLOCK):
        S = image[start : start + BLOCK] @ text.T
        S.diagonal(start).copy_(positive[start : start + BLOCK])  # rounded as in the comparison
        by_image.append((S > positive[start : start + BLOCK, None]).sum(1))
        by_text += (S > positive).sum(0)
    return torch.cat(by_image), by_text


def dense_topk(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    return torch.topk(image @ text.T, min(K, len(text)), dim=1)


def _features(problem: Problem) -> tuple[Tensor, Tensor]:
    image, text, _ = batch(problem).leaves
    return image.detach(), text.detach()


def _ranks_call(compute) -> callable:
    def prepare(problem: Problem) -> Call:
        image, text = _features(problem)

        def call() -> Found:
            image_to_text, text_to_image = compute(image, text)
            return {"image_to_text": image_to_text, "text_to_image": text_to_image}

        return call

    return prepare


def _topk_call(compute) -> callable:
    def prepare(problem: Problem) -> Call:
        image, text = _features(problem)

        def call() -> Found:
            scores, indices = compute(image, text)
            return {"scores": scores, "indices": indices}

        return call

    return prepare


class _Retrieval(Case):
    reference = "dense"

    def floor(self, problem: Problem) -> tuple[float, float]:
        """FLOP: S once. Bytes: both sides read."""
        return 2 * problem.n**2 * problem.d, 2 * feature_mib(problem) * 2**20


class RanksCase(_Retrieval):
    """recall@K of a whole test set comes from these ranks."""

    name = "ranks"
    title = "Retrieval ranks, both directions"
    rounding = RANK_ROUNDING
    patience = 2.0  # 100,000 x 100,000
    peers = by_name(
        Peer(
            "cpu",
            "fastclip cpu",
            _ranks_call(functools.partial(retrieval_ranks, normalize=False, backend="cpu")),
            why_not=lambda: why_not_backend("cpu"),
        ),
        Peer(
            "eager",
            "fastclip eager",
            _ranks_call(functools.partial(retrieval_ranks, normalize=False, backend="eager")),
        ),
        Peer("dense", "dense", _ranks_call(dense_ranks), matrices=1.25),  # scores, and a comparison in bytes
        Peer("chunked", "blocks of 1,024 rows", _ranks_call(chunked_ranks)),
    )

    def problems(self, config: Config) -> list[Problem]:
        sizes = config.sizes or (QUICK if config.quick else FULL_RANKS)
        return [Problem(self.name, n, D, "fp32", RANKS) for n in sorted(sizes)]

    def truth(self, problem: Problem) -> Truth:
        image, text = (side.double() for side in _features(problem))
        rows = sample_rows(problem.n, SAMPLE)
        values = {}
        for name, x, y in (("image_to_text", image, text), ("text_to_image", text, image)):
            S = x[rows] @ y.T
            values[name] = (S > S[torch.arange(len(rows)), rows, None]).sum(1).double()
        return Truth(values, rows=dict.fromkeys(values, rows))

    def results_mib(self, problem: Problem) -> float:
        return 2 * 8 * problem.n / 2**20


class TopkCase(_Retrieval):
    """Search: the best texts of every image, best first."""

    name = "topk"
    title = f"Top {K} of a gallery"
    peers = by_name(
        Peer(
            "fastclip",
            "fastclip",
            _topk_call(lambda image, text: topk(image, text, min(K, len(text)), normalize=False)),
        ),
        Peer("dense", "dense, torch.topk", _topk_call(dense_topk), matrices=1),
    )

    def problems(self, config: Config) -> list[Problem]:
        sizes = config.sizes or (QUICK if config.quick else FULL_TOP_K)
        return [Problem(self.name, n, D, "fp32", TOP_K) for n in sorted(sizes)]

    def truth(self, problem: Problem) -> Truth:
        """The k best scores, and again as those of the texts that were found: of equal ones any may come first."""
        image, text = (side.double() for side in _features(problem))
        rows = sample_rows(problem.n, SAMPLE)
        scores, _ = dense_topk(image[rows], text)
        return Truth({"scores": scores, "found_scores": scores}, rows={"scores": rows})

    def observe(self, found: Found, problem: Problem) -> Found:
        image, text = (side.double() for side in _features(problem))
        rows = sample_rows(problem.n, SAMPLE)
        chosen = text[found["indices"][rows]]  # [rows, k, D]
        return {"scores": found["scores"], "found_scores": torch.einsum("rd,rkd->rk", image[rows], chosen)}

    def results_mib(self, problem: Problem) -> float:
        return (4 + 8) * K * problem.n / 2**20
