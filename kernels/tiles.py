"""What every tile kernel shares: the order of tiles, the dot product, the exponent, the positive's place.

Reads: operands [*, DP] (operands.py) and the `constants` below. Writes: the constants. Never holds more than
one BN x BM tile of S.

`constants` [6] float32 live on the device, so that no launch waits for the host:

    SCALE         the logit scale: S = acc * SCALE
    K, C          SCALE * log2(e) and SHIFT * log2(e): log2 of exp(S - SHIFT) = acc * K - C
    SHIFT         c of eq. 7, a natural logarithm
    ONE_SHIFT     1 where one exp per entry serves rows and columns (gradient.py)
    UNGAIN        1 / gain, the power of two that G is stored with (gradient.py)
"""

import triton
import triton.language as tl

SCALE = tl.constexpr(0)
K = tl.constexpr(1)
SHIFT = tl.constexpr(2)
C = tl.constexpr(3)
ONE_SHIFT = tl.constexpr(4)
UNGAIN = tl.constexpr(5)
CONSTANTS = 6

LOG2_E = tl.constexpr(1.4426950408889634)
# log(2) in two terms, the first of so few bits that an exponent times it is exact in float32.
LN2_HIGH = tl.constexpr(0.693359375)
LN2_LOW = tl.constexpr(-2.12194440e-4)


@triton.jit
def tile_of(i_t, tiles_n, tiles_m, GROUP: tl.constexpr):
    """Tile (i_n, i_m) of program i_t: GROUP row tiles at a time walk along the columns, so that y~ stays in L2."""
    width = GROUP * tiles_m
    first = (i_t // width) * GROUP
    height = tl.minimum(tiles_n - first, GROUP)
    inside = i_t % width
    return first + inside % height, inside // height


@triton.jit
def dot_tile(
    p_x, p_y, row, col, N, M,
    DP, BN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x~ y~^T [BN, BM] float32 at (row, col), int64. Rows past the end repeat the last: mask what comes of them."""
    # An int64 base for the tile and int32 offsets inside it: half the registers of int64 offsets.
    o_n = tl.minimum(tl.arange(0, BN), (N - 1 - row).to(tl.int32))
    o_m = tl.minimum(tl.arange(0, BM), (M - 1 - col).to(tl.int32))
    o_d = tl.arange(0, BD)
    p_bx = p_x + row * DP + (o_n[:, None] * DP + o_d[None, :])
    p_by = p_y + col * DP + (o_m[None, :] * DP + o_d[:, None])
    acc = tl.zeros((BN, BM), tl.float32)
    for _ in range(0, DP, BD):
        acc = tl.dot(tl.load(p_bx), tl.load(p_by), acc, input_precision=PRECISION)
        p_bx += BD
        p_by += BD
    return acc


@triton.jit
def exp_minus(S, shift, PRECISION: tl.constexpr):
    """exp(S - shift). For IEEE products to the last bits: 2^n exp(r), since log2(e) times 60 is rounded to 4e-6."""
    r = S - shift
    if PRECISION == "ieee":
        # A comparison, not a maximum, which would drop a NaN. exp(-200) is 0, and -inf has no remainder.
        r = tl.where(r < -200.0, -200.0, r)
        n = tl.floor(r * LOG2_E + 0.5)
        return tl.exp2(((r - n * LN2_HIGH) - n * LN2_LOW) * LOG2_E) * tl.exp2(n)
    return tl.exp2(r * LOG2_E)


@triton.jit
def exp_common(acc, p_const, PRECISION: tl.constexpr):
    """exp(S - SHIFT) of a tile of products; one multiplication and addition where products are coarser than IEEE's."""
    if PRECISION == "ieee":
        return exp_minus(acc * tl.load(p_const + SCALE), tl.load(p_const + SHIFT), PRECISION)
    return tl.exp2(acc * tl.load(p_const + K) - tl.load(p_const + C))


@triton.jit
def store_exponent(p_const, scale, shift):
    """Write SCALE, K, SHIFT and C of the constants from the scale and the shift, float32."""
    tl.store(p_const + SCALE, scale)
    tl.store(p_const + K, (scale.to(tl.float64) * LOG2_E).to(tl.float32))
    tl.store(p_const + SHIFT, shift)
    tl.store(p_const + C, (shift.to(tl.float64) * LOG2_E).to(tl.float32))


@triton.jit
def positive_in_tile(p_positive, row, col, N, BN: tl.constexpr, BM: tl.constexpr):
    """int32 [BN]: where in the tile's BM columns each row's positive lies, -1 where it lies outside."""
    o_n = row + tl.arange(0, BN)
    place = tl.load(p_positive + o_n, mask=o_n < N, other=-1) - col
    return tl.where((place >= 0) & (place < BM), place, -1).to(tl.int32)


@triton.jit
def inside(row, col, N, M, BN: tl.constexpr, BM: tl.constexpr):
    """Mask [BN, BM] of the entries that exist."""
    m_n = row + tl.arange(0, BN) < N
    m_m = col + tl.arange(0, BM) < M
    return m_n[:, None] & m_m[None, :]
