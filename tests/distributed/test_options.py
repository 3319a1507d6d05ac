"""Every option of the losses over several ranks gives what it gives in one process, statistics included.

In float64, so that the limit is a few units in the last place. Features are leaves here: averaged over the ranks, the
gradient of a rank's own rows is 1/W of what it holds, and a number's is the mean of all ranks'.
"""

import pytest
import torch
from rank_cases import compiled_step, only, pairs_steps

import fastclip

X_SIZES, Y_SIZES = (5, 1, 6), (5, 3, 9)  # a rank with one pair; more keys than queries where a loss allows it
N, M, D = sum(X_SIZES), sum(Y_SIZES), 6
SCALES = (0.0, 8.0, -20.0, 300.0, 1e4)
LIMIT = 2e-13  # relative to the largest entry, or to 0.01 where all of them cancel; sums of fewer than 20 terms

GENERATOR = torch.Generator().manual_seed(0)
X, Y = (torch.randn(n, D, generator=GENERATOR, dtype=torch.float64) for n in (N, M))
Y[:N] += X
PAIR_IDS = torch.tensor([0, 1, 1, 2, 3, 1, 4, 5, 0, 6, 7, 7])  # within a rank and across ranks, some alone
# Over ranks query i belongs to key i of its own rank; in one process `labels` say so.
LABELS = torch.cat([torch.arange(n) + sum(Y_SIZES[:rank]) for rank, n in enumerate(X_SIZES)])
KEY_IDS = torch.tensor([1, 8, 2, 9, 9]).repeat(4)[:M].index_put((LABELS,), PAIR_IDS)
# Labels as users give them: keys of other ranks, shared by queries of one rank and of several, some nobody's.
SHARED = torch.tensor([16, 0, 6, 6, 0, 6, 3, 12, 5, 6, 16, 1])
FEW = torch.tensor([1, 5, 5, 0, 2, 5, 3, 3, 0, 4, 1, 1])  # more queries than keys
WEIGHT = torch.rand(N, generator=GENERATOR, dtype=torch.float64)

PAIRED = {
    "weight": {"weight": WEIGHT},
    "weighted sum": {"weight": WEIGHT, "reduction": "sum"},
    "none": {"reduction": "none"},
    "weighted none": {"weight": WEIGHT, "reduction": "none"},
    "sum": {"reduction": "sum"},
    "ids": {"ids": PAIR_IDS},
    "all one id": {"ids": torch.zeros_like(PAIR_IDS)},
    "each its own id": {"ids": torch.arange(N)},
    "ignore": {"ids": PAIR_IDS, "ids_mode": "ignore"},
    "not normalised": {"normalize": False},
    "eager": {"backend": "eager"},
}
SOFTMAX = {
    "smoothing": {"label_smoothing": 0.1, "return_stats": True},
    "ids and smoothing": {"ids": PAIR_IDS, "label_smoothing": 0.1, "weight": WEIGHT},
    "margin": {"false_negative_margin": 0.1, "return_stats": True},
    "ignore and margin": {"ids": PAIR_IDS, "ids_mode": "ignore", "false_negative_margin": 0.2},
    "hardness": {"hardness": 2.0, "return_stats": True},
    "statistics": {"return_stats": True, "reduction": "none"},
}
INFO_NCE = {
    "plain": {},
    "symmetric": {"symmetric": True, "return_stats": True},
    "query negatives": {"query_negatives": True},
    "key negatives": {"key_negatives": True},
    "NT-Xent": {"query_negatives": True, "key_negatives": True, "symmetric": True},
    "ids": {"ids": PAIR_IDS, "key_ids": KEY_IDS, "symmetric": True, "label_smoothing": 0.1},
    # A query whose own key is called something else, and whose only match is another rank's key.
    "ids elsewhere": {"ids": PAIR_IDS.roll(3), "key_ids": KEY_IDS, "weight": WEIGHT},
    "ignore": {"ids": PAIR_IDS, "key_ids": KEY_IDS, "ids_mode": "ignore", "reduction": "none"},
    "margin": {"false_negative_margin": 0.1, "symmetric": True},
}
LABELLED = {
    "plain": {},
    "statistics": {"return_stats": True},
    "symmetric": {"symmetric": True, "return_stats": True},
    "smoothing": {"symmetric": True, "label_smoothing": 0.1, "weight": WEIGHT},
    "NT-Xent": {"query_negatives": True, "key_negatives": True, "symmetric": True},
    "key negatives": {"key_negatives": True, "reduction": "none"},
    "ids": {"ids": None, "symmetric": True, "label_smoothing": 0.1},
    "ignore": {"ids": None, "ids_mode": "ignore", "symmetric": True, "return_stats": True},
    "margin": {"false_negative_margin": 0.1, "symmetric": True, "return_stats": True},
    "hardness": {"hardness": 2.0, "symmetric": True, "reduction": "sum"},
    "eager": {"backend": "eager", "symmetric": True},
}


def joined(ranks: list[dict]) -> dict:
    """The ranks' shares as one process has them: rows one after the other and 1/W of the gradients of each."""
    world, out = len(ranks), {}
    for name in ranks[0]:
        shares = [got[name] for got in ranks]
        if name == "value":
            assert shares[0].ndim or all(torch.equal(share, shares[0]) for share in shares), "the ranks' values differ"
            out[name] = torch.cat(shares) if shares[0].ndim else shares[0]
        else:
            out[name] = torch.cat(shares) / world if shares[0].ndim else sum(shares) / world
    return out


def in_one_process(loss: str, y, numbers: dict, options: dict) -> tuple[dict, dict | None]:
    x, y = X.clone().requires_grad_(), y.clone().requires_grad_()
    numbers = {name: torch.tensor(value, dtype=x.dtype, requires_grad=True) for name, value in numbers.items()}
    options = dict(options)
    weight = None
    if "weight" in options and loss != "siglip_loss":
        weight = options["weight"] = options["weight"].clone().requires_grad_()
    if loss == "info_nce":
        options.setdefault("labels", LABELS)
    out = getattr(fastclip, loss)(x, y, *numbers.values(), **options)
    value, stats = out if options.get("return_stats") else (out, None)
    value.sum().backward()
    want = {"value": value.detach(), "x": x.grad, "y": y.grad} | {name: n.grad for name, n in numbers.items()}
    if weight is not None:
        want["weight"] = weight.grad
    return want, stats and vars(stats)


def assert_same(got: dict, want: dict, what: str, limit: float = LIMIT) -> None:
    assert got.keys() == want.keys()
    for name, expected in want.items():
        far = (got[name] - expected).abs().max() / expected.abs().max().clamp_min(0.01)
        assert far < limit, f"{what}, {name}: {far:.1e}"


def check(pool, loss: str, sizes, y, options: dict, mode: str, bias: bool = False) -> None:
    numbers = [{"scale": scale} | ({"bias": -3.0} if bias else {}) for scale in SCALES]
    if options.get("false_negative_margin") is not None or "hardness" in options:
        numbers = [number for number in numbers if number["scale"] > 0]
    cases = [(loss, mode, (X_SIZES, sizes), X, y, number, options) for number in numbers]
    ranks = pool.run(pairs_steps, cases, world=len(sizes))
    for number, shares in zip(numbers, zip(*ranks, strict=True), strict=True):
        want, stats = in_one_process(loss, y, number, options)
        # A logit near 1e4 is known to 1e4 units in the last place of 1.
        limit = LIMIT * max(1.0, number["scale"] / 100.0, options.get("teacher_logit_scale", 0.0) / 100.0)
        assert_same(joined([got for got, _ in shares]), want, str(number), limit)
        if stats:
            lists = ("image_lse", "text_lse", "losses")
            got = {
                name: torch.cat([s[name] for _, s in shares]) if name in lists else shares[0][1][name] for name in stats
            }
            assert_same(got, stats, str(number), limit)


modes = pytest.mark.parametrize("mode", ["gather", "ring"])


@modes
@pytest.mark.parametrize("options", [*PAIRED.values(), *SOFTMAX.values()], ids=[*PAIRED, *SOFTMAX])
def test_clip_loss(pool, options, mode):
    check(pool, "clip_loss", X_SIZES, Y[:N], options, mode)


@modes
@pytest.mark.parametrize("options", PAIRED.values(), ids=PAIRED)
def test_siglip_loss(pool, options, mode):
    check(pool, "siglip_loss", X_SIZES, Y[:N], options, mode, bias=True)


@modes
@pytest.mark.parametrize("options", INFO_NCE.values(), ids=INFO_NCE)
def test_info_nce(pool, options, mode):
    check(pool, "info_nce", Y_SIZES, Y, options, mode)


@modes
@pytest.mark.parametrize("options", LABELLED.values(), ids=LABELLED)
@pytest.mark.parametrize(("sizes", "labels"), [(Y_SIZES, SHARED), ((2, 1, 3), FEW)], ids=["more keys", "fewer keys"])
def test_labels(pool, sizes, labels, options, mode):
    """Labels number the keys of all ranks. Ids: most queries are called otherwise than their key, and like another."""
    keys = sum(sizes)
    if "ids" in options:
        options = options | {"ids": labels.roll(1) % 5, "key_ids": torch.arange(keys) % 5}
    check(pool, "info_nce", sizes, Y[:keys], options | {"labels": labels}, mode)


TEACHER = {
    "teacher_image_features": torch.randn(N, 4, generator=GENERATOR, dtype=torch.float64),
    "teacher_text_features": torch.randn(N, 4, generator=GENERATOR, dtype=torch.float64),
}


@modes
@pytest.mark.parametrize(
    "options", [{}, {"normalize": False}, {"backend": "eager"}], ids=["plain", "as they are", "eager"]
)
@pytest.mark.parametrize("teacher_scale", [0.0, 20.0, 1e4])
def test_distill_loss(pool, teacher_scale, options, mode):
    options = options | TEACHER | {"teacher_logit_scale": teacher_scale}
    check(pool, "distill_loss", X_SIZES, Y[:N], options, mode)


@modes
def test_torch_compile_runs_it(pool, mode):
    for eager, compiled in pool.run(compiled_step, mode, world=2):
        torch.testing.assert_close(compiled, eager, rtol=0.0, atol=0.0)


@modes
@pytest.mark.parametrize("loss", ["clip_loss", "siglip_loss"])
def test_twice_gives_the_same_bits(pool, loss, mode):
    case = (loss, mode, (X_SIZES, X_SIZES), X.float(), Y[:N].float(), {"scale": 8.0}, {"ids": PAIR_IDS})
    first, second = (pool.run(pairs_steps, [case], world=3) for _ in range(2))
    for (a, _), (b, _) in zip((steps[0] for steps in first), (steps[0] for steps in second), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


@modes
@pytest.mark.parametrize("loss", ["clip_loss", "siglip_loss"])
def test_a_nan_on_one_rank_reaches_every_rank(pool, loss, mode):
    """As in one process: the value is NaN, and so is every gradient that the NaN touches."""
    x = X.clone()
    x[7, 2] = torch.nan  # the third rank's
    ranks = pool.run(pairs_steps, [(loss, mode, (X_SIZES, X_SIZES), x, Y[:N], {"scale": 8.0}, {})], world=3)
    leaf, y = x.clone().requires_grad_(), Y[:N].clone().requires_grad_()
    getattr(fastclip, loss)(leaf, y, 8.0).backward()
    got = [steps[0][0] for steps in ranks]
    assert all(share["value"].isnan() for share in got)
    assert torch.equal(torch.cat([share["x"] for share in got]).isnan(), leaf.grad.isnan())
    assert torch.equal(torch.cat([share["y"] for share in got]).isnan(), y.grad.isnan())


ALONE = {
    "clip_loss": {},
    "siglip_loss": {},
    "info_nce": {"labels": FEW, "symmetric": True},
    "distill_loss": TEACHER | {"teacher_logit_scale": 20.0},
}


@modes
@pytest.mark.parametrize("wanted", ["x", "y", "scale"])
@pytest.mark.parametrize("loss", ALONE)
def test_a_gradient_for_one_input_alone(pool, loss, wanted, mode):
    """As with a locked tower: no rank sends or waits for what nobody wants."""
    shares = pool.run(only, loss, mode, X_SIZES, X, Y[:N], wanted, ALONE[loss], world=3)
    want, _ = in_one_process(loss, Y[:N], {"scale": 8.0}, ALONE[loss])
    assert_same(joined([{wanted: share} for share in shares]), {wanted: want[wanted]}, wanted)
