"""LossStats over the ranks: lists of this rank's pairs, means of the whole batch.

Legend: x [n_r, D], y [m_r, D] this rank's queries and keys; N, M rows over all ranks.
"""

import torch
from torch import Tensor

from fastclip import ops
from fastclip.distributed.exchange import all_reduce, gather_rows
from fastclip.distributed.positives import Positives, own_keys
from fastclip.distributed.ring import blocks
from fastclip.distributed.ring_sums import place
from fastclip.softmax import Gaps, LossStats, Options, cross_entropy


@torch.no_grad()
def statistics(
    x: Tensor, y: Tensor, scale: Tensor, positives: Positives, options: Options, pairs: Gaps, losses: Tensor
) -> LossStats:
    """Lists of this rank's pairs [n_r]; accuracies and the mean rank of the whole batch."""
    pos, shards = pairs.pos.detach(), positives.shards
    row_rank = _ranks(x, y, scale, positives, options)
    col_rank = _ranks(positives.rows(y), x, scale, _best_queries(pos, positives), options)
    sums = torch.stack([(row_rank == 0).sum(), (col_rank == 0).sum(), row_rank.sum(), col_rank.sum()])
    means = all_reduce(sums, shards.group).to(pos.dtype) / sum(shards.rows)
    return LossStats(
        image_lse=(pos + cross_entropy(pairs.row_gap.detach())).to(pos.dtype),
        text_lse=(pos + cross_entropy(pairs.col_gap.detach())).to(pos.dtype),
        losses=losses.detach().to(pos.dtype),
        image_accuracy=means[0],
        text_accuracy=means[1],
        mean_rank=0.5 * (means[2] + means[3]),
    )


def _best_queries(pos: Tensor, positives: Positives) -> Positives:
    """For each query's key the query that suits it best, of all with that key: its right answer among all queries."""
    shards = positives.shards.of_one_side(positives.shards.rows)
    if positives.labels is None:
        return own_keys(pos, shards)
    by_score = torch.argsort(gather_rows(pos, shards.rows, shards.group), stable=True)
    by_key = by_score[torch.argsort(positives.labels[by_score], stable=True)]
    last = torch.searchsorted(positives.labels[by_key], positives.labels, right=True) - 1
    best = by_key[last]
    return Positives(shards, best.split(shards.rows)[shards.rank], best)


def _ranks(x: Tensor, y: Tensor, scale: Tensor, positives: Positives, options: Options) -> Tensor:
    """[n_r]: how many of all ranks' rows y beat each of this rank's x's own."""
    shards, rows = positives.shards, torch.arange(len(x), device=x.device)

    def rank_among(keys: Tensor, column: Tensor) -> Tensor:
        return ops.similarity_ranks(x, keys, scale, rows, column, options.normalize, options.backend)[0]

    if shards.mode == "gather":
        return rank_among(gather_rows(y, shards.cols, shards.group), positives.column)
    answers, answer = _answers(y, positives)
    among_answers, total = rank_among(answers, answer), torch.zeros_like(rows)
    for block in blocks(y, shards):
        at, here = place(positives.column, block)
        if block.own and positives.labels is None:
            total += rank_among(block.y, at)
            continue
        # A block without a row's right answer gets all answers to compare with. It holds no second copy of that one,
        # which rounding might put above it.
        elsewhere = rank_among(torch.cat([answers, block.y]), answer) - among_answers
        total += elsewhere if positives.labels is None else torch.where(here, rank_among(block.y, at), elsewhere)
    return total


def _answers(y: Tensor, positives: Positives) -> tuple[Tensor, Tensor]:
    """The right answers of this rank's rows, each once [k, D], and which of them is each row's [n_r]."""
    if positives.labels is None:
        return y.detach(), torch.arange(len(positives.column), device=y.device)
    distinct, answer = torch.unique(positives.column, return_inverse=True)
    return Positives(positives.shards, distinct, positives.labels).rows(y.detach()), answer
