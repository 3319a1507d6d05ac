"""Triton kernels of the loss. Read tiles.py, forward.py and backward.py, in that order; equations: docs/math.md.

Legend of every file: x [N, D], y [M, D] features; x~, y~ the operands the tensor cores read (operands.py);
S = scale * x~ y~^T; positive [N] int64, the column of each row's positive. `i_n` is a program index, `o_n` offsets,
`m_n` a mask, `p_x` a pointer, `b_x` a loaded block, BN BM BD the tile of rows, columns and width.
"""
