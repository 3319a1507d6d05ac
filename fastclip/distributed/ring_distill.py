"""Distillation round the ring (ring.py): the teacher's and the student's texts travel together, once.

Legend: image [n_r, D], text [m_r, D] this rank's unit rows of the student, the teacher's [n_r, E] and [m_r, E]; P the
teacher's softmax over rows and over columns, averaged (math.md, eq. 14).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastclip import ops
from fastclip.distributed.ring import Gradients, blocks
from fastclip.distributed.ring_sums import place, stand_in_weights
from fastclip.distributed.scaled import Scaled, lift
from fastclip.distributed.shards import Shards
from fastclip.softmax import unit_rows


class Teacher(NamedTuple):
    """What makes this rank's rows of P / N as eq. 6's G: (a, shift) of its rows, (b, shift) of all columns, and d."""

    image: Tensor
    text: Tensor
    scale: Tensor
    column: Tensor
    row: Scaled
    col: Scaled
    d: Tensor


def ring_agreement(
    image: Tensor, text: Tensor, teacher: Teacher, shards: Shards, normalize: bool, backend: str | None
) -> Tensor:
    """sum_ij P_ij <image_i, text_j> / N over this rank's rows i and all columns j, 0-d, differentiable."""
    wants_text = torch.is_grad_enabled() and text.requires_grad
    return _RingAgreement.apply(image, text, teacher, shards, normalize, backend, wants_text)


class _RingAgreement(torch.autograd.Function):
    """Bilinear: the two products that the value needs are its gradients, and have been round when forward ends."""

    @staticmethod
    def forward(ctx, image, text, teacher, shards, normalize, backend, wants_text):
        by_row, by_col = torch.zeros_like(image), Gradients(shards)
        row, col = lift(teacher.row, teacher.col)
        t_image, widths = unit_rows(teacher.image, normalize), [teacher.text.shape[1], text.shape[1]]
        for block in blocks(torch.cat([teacher.text, text], 1), shards):
            t_text, keys = (part.contiguous() for part in block.y.split(widths, 1))
            at, here = place(teacher.column, block)
            of_block = Scaled(*(part[block.cols] for part in col))
            score = teacher.scale * (t_image * unit_rows(t_text, normalize)[at]).sum(1)
            weight = torch.where(here, teacher.d, stand_in_weights(score, at, row, of_block, ops.NO_MASK))
            shifts, weights = (row.shift, of_block.shift), (row.total, of_block.total, weight)
            products = ops.similarity_products(
                teacher.image, t_text, teacher.scale, at, shifts, weights, normalize, image, keys, backend
            )
            by_row += products[0]
            if wants_text:
                by_col.add(products[1])
        ctx.save_for_backward(by_row, by_col.home() if wants_text else None)
        return (image * by_row).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        by_row, by_col = ctx.saved_tensors
        return upstream * by_row, None if by_col is None else upstream * by_col, *(None,) * 5
