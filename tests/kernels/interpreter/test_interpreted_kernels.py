"""Parts of the Triton backend on their own: shifts, the exact path, ranks, products, codes, operands, the gain."""

import pytest
import torch
import torch.nn.functional as F
from cases import features

from fastclip import backends, ops, reference
from fastclip.kernels import configs, masked
from fastclip.kernels.operands import operand
from fastclip.kernels.sigmoid import SigmoidPass

TRITON, EAGER = backends._load("triton"), backends._load("eager")


def sums(x, y, scale, positive, backend=TRITON, normalize=True, mask=ops.NO_MASK):
    scale = torch.tensor(scale, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    return backend.similarity_sums(x, y, scale, positive, normalize, mask)


def log_sums(out):
    row_sum, col_sum, row_shift, col_shift, pos = (t.double() for t in out)
    return row_sum.log() + row_shift, col_sum.log() + col_shift, pos


def test_sums_come_out_near_one_under_exact_shifts():
    x, y = features(70, 33, "cpu")
    row_sum, col_sum, row_shift, col_shift, _ = sums(x, y, 100.0, torch.arange(70))
    for total, shift in ((row_sum, row_shift), (col_sum, col_shift)):
        assert (total > 0.7).all() and (total < 1.42).all()
        assert (shift * 16 == (shift * 16).round()).all()


@pytest.mark.parametrize("scale", [100.0, 1e4, -300.0])
def test_the_exact_path_takes_over(scale):
    # Nearly antipodal rows: every negative of a row is far below the bound that the fixed shift is made from.
    x, _ = features(70, 33, "cpu")
    x = F.normalize(1 + 0.05 * x, dim=1)
    y = -torch.sign(torch.tensor(scale)) * x.flip(0)
    out = sums(x, y, scale, torch.arange(70))
    assert (out[2] != out[2].round(decimals=1)).any(), "a row's own maximum, not a multiple of the fixed step"
    want = log_sums(sums(x.double(), y.double(), scale, torch.arange(70), EAGER))
    for got, truth in zip(log_sums(out), want, strict=True):
        torch.testing.assert_close(got, truth, rtol=1e-6, atol=1e-6 * abs(scale))


@pytest.mark.parametrize(("n", "m"), [(2, 40), (40, 2), (7, 70), (70, 7), (1, 1), (1, 9), (9, 1)])
def test_rectangles_with_shared_positives(n, m):
    x, y = features(max(n, m), 9, "cpu")
    x, y = x[:n], y[:m]
    positive = torch.randint(0, m, (n,), generator=torch.Generator().manual_seed(n))
    got = sums(x, y, 5.0, positive)
    want = sums(x.double(), y.double(), 5.0, positive, EAGER)
    for g, w in zip(log_sums(got), log_sums(want), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)
    upstream = [torch.linspace(0.5, 1.5, length) for length in (n, m, n)]
    args = (positive, *got[2:4], *upstream, True, [True] * 3, ops.NO_MASK)
    grads = TRITON.similarity_sums_backward(x, y, torch.tensor(5.0), *args)
    double = [t.double() if t.is_floating_point() else t for t in args[:6]]
    truths = EAGER.similarity_sums_backward(x.double(), y.double(), torch.tensor(5.0).double(), *double, *args[6:])
    for g, w in zip(grads, truths, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-4, atol=1e-5)


def test_shifts_far_apart_take_two_exps():
    # As after the exact path at a large scale: one common shift could not represent both ends.
    x, y = features(40, 9, "cpu")
    positive, scale = torch.arange(40), torch.tensor(1000.0)
    out = sums(x, y, 1000.0, positive)
    assert out[2].max() - out[2].min() > 110
    upstream = [torch.linspace(0.5, 1.5, 40) for _ in range(3)]
    grads = TRITON.similarity_sums_backward(x, y, scale, positive, *out[2:4], *upstream, True, [True] * 3, ops.NO_MASK)
    double = [t.double() for t in (*out[2:4], *upstream)]
    truths = EAGER.similarity_sums_backward(
        x.double(), y.double(), scale.double(), positive, *double, True, [True] * 3, ops.NO_MASK
    )
    for g, w in zip(grads, truths, strict=True):
        assert (g - w).norm() <= 2e-4 * w.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("scale", [3.0, -3.0, 0.0])
def test_ranks_and_ties(scale, dtype):
    # Small integers: every product is exact, so that ties are ties, and many.
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.randint(-2, 3, (n, 33), generator=draw).to(dtype) for n in (70, 50))
    rows = torch.cat([torch.arange(50), torch.arange(10)])
    cols = torch.cat([torch.randperm(50, generator=draw), torch.arange(10)])
    got = TRITON.similarity_ranks(x, y, torch.tensor(scale), rows, cols, False)
    want = EAGER.similarity_ranks(x.double(), y.double(), torch.tensor(scale).double(), rows, cols, False)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    assert (got[0][50:] == 50).all(), "a row without a correct pair is beaten by all"


def test_nan_never_ranks_first():
    x, y = features(40, 33, "cpu")
    x[3] = torch.nan
    index = torch.arange(40)
    row_rank, col_rank = TRITON.similarity_ranks(x, y, torch.tensor(1.0), index, index, False)
    assert row_rank[3] == 40 and (col_rank >= 1).all()


def dense_products(x, y, scale, positive, row_shift, col_shift, a, b, d, x_values, y_values):
    """(G y_values, G^T x_values) as plain PyTorch writes it: the products of x and y in their own dtype."""
    S = (scale.to(x.dtype) * F.normalize(x, dim=1) @ F.normalize(y, dim=1).T).to(a.dtype)
    G = torch.exp(S - row_shift[:, None]) * a[:, None] + torch.exp(S - col_shift) * b
    G[torch.arange(len(x)), positive] = d
    return G @ y_values, G.T @ x_values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_products_are_as_exact_as_dense_ones(dtype):
    ours, plain = torch.zeros(2), torch.zeros(2)  # summed squares of the relative errors, by row and by column
    for seed in range(8):
        x, y = features(40, 33, "cpu", dtype, seed=seed)
        positive, scale = torch.randint(0, 40, (40,)), torch.tensor(20.0)
        shifts = sums(x, y, 20.0, positive)[2:4]
        vectors, values = [torch.rand(40) for _ in range(3)], [torch.randn(40, 5) for _ in range(2)]
        args = x, y, scale, positive, *shifts, *vectors
        double = [t.double() if t.is_floating_point() else t for t in (*args, *values)]
        truth = dense_products(*double)
        for total, products in (
            (ours, TRITON.similarity_products(*args, True, *values)),
            (plain, dense_products(*args, *values)),
        ):
            total += torch.stack([((p - t).norm() / t.norm()) ** 2 for p, t in zip(products, truth, strict=True)])
    assert (ours.sqrt() <= 2 * plain.sqrt()).all(), (ours.sqrt(), plain.sqrt())


@pytest.mark.parametrize("bias", [-25.0, -10.0, 0.0, 20.0])
def test_sigmoid_sums_keep_their_relative_accuracy(bias):
    # Of the negatives alone: at bias -25 each adds 1e-11, which 1 + exp(t) would round away.
    x, y = features(40, 33, "cpu")
    index, zero = torch.arange(40), torch.tensor(bias)
    run = SigmoidPass(operand(x, True), operand(y, True), torch.tensor(1.0), zero, index, "ieee", None, None, False)
    run.value(slice(0, 40))
    t = reference.logits(x.double(), y.double(), 1.0) + bias
    want = torch.where(torch.eye(40, dtype=torch.bool), 0.0, torch.log1p(t.exp())).sum(1)
    torch.testing.assert_close(run.loss.double(), want, rtol=2e-6, atol=0.0)


def test_codes_are_equal_where_ids_are():
    draw = torch.Generator().manual_seed(0)
    row, col = (torch.randint(-3, 4, (n,), generator=draw) * 2**33 for n in (50, 70))
    row_code, col_code = masked.codes(row, col)
    assert row_code.dtype == torch.int32
    assert torch.equal(row_code[:, None] == col_code, row[:, None] == col)


@pytest.mark.parametrize("d", [1, 33, 64, 1500])
def test_operands_are_normalised_rounded_once_and_padded(d):
    x = features(9, d, "cpu", torch.float16)[0]
    x[4] = 0
    got = operand(x, True)
    want = F.normalize(x.double(), dim=1)
    assert got.rows.shape[1] * 2 % 128 == 0 and (got.rows[:, d:] == 0).all()
    assert (got.rows[:, :d].double() - want).abs().max() <= 2.0**-11
    torch.testing.assert_close(got.norm.double(), got.rows.double().norm(dim=1), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(got.length.double(), x.double().norm(dim=1).clamp_min(1e-12), rtol=1e-6, atol=0.0)


def test_operands_that_are_ready_are_not_copied():
    x = features(9, 64, "cpu", torch.float16)[0]
    assert operand(x, False).rows.data_ptr() == x.data_ptr()
    assert operand(x[:, :33], False).rows.data_ptr() != x.data_ptr()


def test_runs_are_bitwise_equal():
    x, y = features(70, 33, "cpu", torch.float16)
    first = sums(x, y, 50.0, torch.arange(70))
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, sums(x, y, 50.0, torch.arange(70)), strict=True))


def test_workspace_bounds_what_they_say(monkeypatch):
    monkeypatch.setenv("FASTCLIP_WORKSPACE_MIB", "64")
    limit = configs.workspace()
    assert limit == 64 * 2**20
    tiles = configs.BUILT_IN["*", "*", "half"]
    for columns in (1000, 2**17, 2**20):
        rows = configs.partial_rows(tiles, columns, limit)
        unit = tiles.BN * tiles.GROUP
        assert rows == unit or 4 * rows * columns * (1 / tiles.BN + 1 / tiles.BM) <= limit
        step_n, step_m = configs.wave(2**20, columns, 512, 2, limit)
        assert step_n % 256 == step_m % 256 == 0 and step_n * step_m * 2 <= limit


def test_reference_ranks_agree_on_random_data():
    x, y = features(40, 33, "cpu")
    index = torch.arange(40)
    row_rank, _ = TRITON.similarity_ranks(x, y, torch.tensor(5.0), index, index, True)
    want = reference.ranks(reference.logits(x.double(), y.double(), 5.0), index, index)[0]
    # The interpreter's products differ in their last bits from place to place, so that a pair may beat itself.
    assert (row_rank - want).abs().max() <= 1
