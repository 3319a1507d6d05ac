"""The operands of the tile kernels: x~ [N, DP], rows normalised in float32, rounded once and padded with zeros.

Reads: x [N, D], any strides. Writes: x~ [N, DP] contiguous in x's dtype, DP the next multiple of 128 bytes; length [N]
float32, what the row was divided by; norm [N] float32, the length of the row as rounded. Never holds: a float32 copy.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

EPS = 1e-12  # F.normalize's
ROW_BYTES = 128  # tile kernels read rows in pieces of this many bytes, without masks


@dataclass(frozen=True)
class Operand:
    """rows [N, DP]: x~. norm [N] float32: |x~|. length [N] float32: |x|, at least EPS; None where x~ = x."""

    rows: Tensor
    norm: Tensor
    length: Tensor | None


@triton.jit(do_not_specialize=["N"])
def normalize_kernel(
    p_x, p_out, p_length, p_norm, N, stride_n, stride_d,
    D, DP, EPS: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BN
    o_n = row + tl.arange(0, BN)
    m_n = o_n < N
    squares = tl.zeros((BN,), tl.float32)
    for start in range(0, D, BD):
        o_d = start + tl.arange(0, BD)
        m_x = m_n[:, None] & (o_d < D)[None, :]
        p_bx = p_x + o_n[:, None] * stride_n + o_d.to(tl.int64)[None, :] * stride_d
        b_x = tl.load(p_bx, mask=m_x, other=0.0).to(tl.float32)
        squares += tl.sum(b_x * b_x, 1)
    # A comparison, not a maximum: a NaN length must stay NaN.
    length = tl.sqrt_rn(squares)
    length = tl.where(length < EPS, EPS, length)
    rounded = tl.zeros((BN,), tl.float32)
    for start in range(0, DP, BD):
        o_d = start + tl.arange(0, BD)
        m_x = m_n[:, None] & (o_d < D)[None, :]
        p_bx = p_x + o_n[:, None] * stride_n + o_d.to(tl.int64)[None, :] * stride_d
        b_x = tl.load(p_bx, mask=m_x, other=0.0).to(tl.float32)
        b_out = tl.div_rn(b_x, tl.broadcast_to(length[:, None], (BN, BD))).to(p_out.dtype.element_ty)
        tl.store(p_out + o_n[:, None] * DP + o_d[None, :], b_out, mask=m_n[:, None] & (o_d < DP)[None, :])
        b_out = b_out.to(tl.float32)
        rounded += tl.sum(b_out * b_out, 1)
    tl.store(p_length + o_n, length, mask=m_n)
    tl.store(p_norm + o_n, tl.sqrt(rounded), mask=m_n)


def operand(x: Tensor, normalize: bool) -> Operand:
    """x~ with its lengths. Where nothing is to be normalised and x already is an operand, x~ is x, not a copy."""
    rows, width = x.shape
    unit = ROW_BYTES // x.element_size()
    padded = -(-width // unit) * unit
    if not normalize:
        ready = width == padded and x.stride() == (padded, 1) and x.data_ptr() % 16 == 0
        if not ready:
            copy = x.new_zeros(rows, padded)
            copy[:, :width] = x
            x = copy
        return Operand(x, torch.linalg.vector_norm(x, dim=1, dtype=torch.float32), None)
    out = x.new_empty(rows, padded)
    length, norm = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))
    BD = min(1024, triton.next_power_of_2(padded))
    BN = 4096 // BD
    normalize_kernel[(triton.cdiv(rows, BN),)](
        p_x=x, p_out=out, p_length=length, p_norm=norm, N=rows, stride_n=x.stride(0), stride_d=x.stride(1),
        D=width, DP=padded, EPS=EPS, BN=BN, BD=BD, num_warps=8,
    )  # fmt: skip
    return Operand(out, norm, length)
