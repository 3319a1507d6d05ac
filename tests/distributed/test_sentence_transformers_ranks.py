"""sentence-transformers' losses with gather_across_devices=True, beside the library's own on the same two ranks.

Legend: N anchors of all ranks, each with a positive and K - 1 hard negatives; embeddings [N, D], in float64.
"""

import importlib.util
import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from pool import Pool
from sentence_cases import embeddings_steps, library, outcome, training_step

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("sentence_transformers") is None, reason="needs sentence-transformers"
)
ONE_WAY = ("query_to_doc",)
OTHERS = ("query_to_query", "doc_to_query", "doc_to_doc")
DIRECTIONS = [ONE_WAY + more for count in range(4) for more in itertools.combinations(OTHERS, count)]
LAYOUTS = [("joint", directions) for directions in DIRECTIONS]
LAYOUTS += [("per_direction", directions) for directions in (ONE_WAY, ("query_to_doc", "doc_to_query"))]
HARDNESS = (None, "in_batch_negatives", "hard_negatives", "all_negatives")
EVEN = (5, 5)


@pytest.fixture(scope="module")
def two():
    """The library gathers over the default group, and that is the whole pool."""
    pool = Pool(2)
    yield pool
    pool.close()


def columns(n: int, negatives: int, d: int = 6, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(n + negatives)
    anchors = torch.randn(n, d, generator=generator, dtype=torch.float64)
    noise = torch.randn(1 + negatives, n, d, generator=generator, dtype=torch.float64)
    return [column.to(dtype) for column in (anchors, *(anchors + noise))]


def settings(mode: str, directions: tuple, hardness: str | None) -> dict:
    chosen = {"directions": directions, "partition_mode": mode, "hardness_mode": hardness}
    return chosen | {"hardness_strength": 5.0 if hardness else 0.0}


def assert_same(got: list[torch.Tensor], want: list[torch.Tensor], what: object, limit: float = 1e-11) -> None:
    assert len(got) == len(want)
    for place, (g, w) in enumerate(zip(got, want, strict=True)):
        far = (g - w).abs().max() / w.abs().max().clamp_min(1.0)
        assert far < limit, f"{what}, [value, gradients...][{place}]: {far:.1e}"


@pytest.mark.parametrize("negatives", [0, 1, 3])
@pytest.mark.parametrize("hardness", HARDNESS)
def test_every_direction_partition_and_hardness(two, hardness, negatives):
    chosen = [settings(*layout, hardness) for layout in LAYOUTS]
    ours, theirs = (
        two.run(embeddings_steps, [(whose, EVEN, columns(10, negatives), options) for options in chosen])
        for whose in ("ours", "theirs")
    )
    for rank in range(2):
        for options, got, want in zip(chosen, ours[rank], theirs[rank], strict=True):
            assert_same(got, want, (rank, options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dot_products_in_the_dtypes_that_users_have(two, dtype):
    library("theirs")  # imports what has to come before
    from sentence_transformers.util import dot_score

    options = {"scale": 1.0, "similarity_fct": dot_score, "directions": DIRECTIONS[-1]}
    ours, theirs = (
        two.run(embeddings_steps, [(whose, (65, 65), columns(130, 1, dtype=dtype), options)])
        for whose in ("ours", "theirs")
    )
    for rank in range(2):
        assert_same(ours[rank][0], theirs[rank][0], rank, 1e-11 if dtype == torch.float64 else 1e-5)


FORMS = {
    "MultipleNegativesRankingLoss": {"directions": DIRECTIONS[-1]},
    "CachedMultipleNegativesRankingLoss": {"mini_batch_size": 2, "directions": DIRECTIONS[-1]},
    "MultipleNegativesSymmetricRankingLoss": {"scale": 30.0},
    "CachedMultipleNegativesSymmetricRankingLoss": {"mini_batch_size": 2},
}


@pytest.mark.parametrize("negatives", [0, 2])
@pytest.mark.parametrize("name", FORMS)
def test_training_under_ddp(two, name, negatives):
    ours, theirs = (
        two.run(training_step, whose, name, EVEN, columns(10, negatives), FORMS[name]) for whose in ("ours", "theirs")
    )
    for rank in range(2):
        assert_same(ours[rank], theirs[rank], rank)
        assert all(torch.equal(a, b) for a, b in zip(ours[rank][1:], ours[0][1:], strict=True)), "not averaged"
    assert ours[0][0] != ours[1][0], "each rank returns the mean over its own anchors"
    assert max(gradient.abs().max() for gradient in ours[0][1:]) > 1e-4  # else nothing was compared


@pytest.mark.parametrize("negatives", [0, 2])
@pytest.mark.parametrize("hardness", HARDNESS)
def test_uneven_shares_have_the_loss_of_the_whole_batch(two, hardness, negatives):
    """Which the library cannot: each anchor's loss is as in one process, and a rank returns the mean of its own."""
    sizes, batch = (7, 3), columns(10, negatives)
    chosen = [settings(*layout, hardness) for layout in LAYOUTS]
    ranks = two.run(embeddings_steps, [("ours", sizes, batch, options) for options in chosen])
    for at, options in enumerate(chosen):
        want = library("theirs").MultipleNegativesRankingLoss(None, **options).compute_loss_from_embeddings(batch, None)
        got = sum(n * ranks[rank][at][0] for rank, n in enumerate(sizes)) / sum(sizes)
        assert_same([got], [want], options)


def test_uneven_shares_have_the_gradients_of_the_ranks_mean(two):
    sizes, batch = (7, 3), [column.requires_grad_() for column in columns(10, 1)]
    anchors, docs = F.normalize(batch[0]), F.normalize(torch.cat(batch[1:]))
    losses = F.cross_entropy(20.0 * anchors @ docs.T, torch.arange(10), reduction="none")
    want = torch.autograd.grad(sum(part.mean() for part in losses.split(sizes)) / 2, batch)
    plain = [column.detach() for column in batch]
    ranks = two.run(embeddings_steps, [("ours", sizes, plain, {})])
    got = [torch.cat([ranks[rank][0][1 + at] for rank in range(2)]) / 2 for at in range(len(batch))]
    assert_same(got, want, sizes)


def test_a_mistake_on_one_rank_is_an_error_on_both(two):
    good, plain = columns(4, 1), {"scale": 20.0}
    for bad, options, told in (
        ([good[0], good[1][:2], good[2]], plain, "must have one shape"),
        (good[:1], plain, "anchors and positives"),
        (good[:2], plain, r"rank 0: .*3 columns.* rank 1: .*2 columns"),
        (good, {"scale": 30.0}, r"rank 0: .*20\.0.* rank 1: .*30\.0"),
    ):
        results = two.run(outcome, {0: good, 1: bad}, {0: plain, 1: options})
        assert all(name == "ValueError" and re.search(told, message) for name, message in results), results
    assert two.run(outcome, {0: good, 1: good}, {0: plain, 1: plain}) == [("", "")] * 2, "the group works afterwards"
