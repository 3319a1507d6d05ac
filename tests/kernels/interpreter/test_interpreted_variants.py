"""Random cases of every variant through the interpreted Triton backend, beside the float64 definition.

FASTCLIP_SLOW=1 runs 100 cases of each, a few minutes; otherwise some of them.
"""

import os
from functools import partial

import pytest
import torch
from variants import VARIANTS, case, value_and_gradients

CASES = 100 if os.environ.get("FASTCLIP_SLOW") else 4
ROWS = (1, 2, 17, 40)  # tiles are 32 x 64: one pair, a few, under a tile, two tiles
EPS = torch.finfo(torch.float32).eps


@pytest.mark.parametrize("variant", VARIANTS)
def test_against_the_dense_definition(variant):
    for seed in range(CASES):
        loss = case(variant, seed, ROWS)
        got = value_and_gradients(partial(loss.fast, backend="triton"), loss.inputs, torch.float32)
        want = value_and_gradients(loss.dense, loss.inputs, torch.float64)
        dense = value_and_gradients(loss.dense, loss.inputs, torch.float32)
        # S is rounded to eps times its largest entry, whoever computes it.
        largest = loss.inputs[2] * loss.inputs[0].norm(dim=1).max() * loss.inputs[1].norm(dim=1).max()
        for g, w, d in zip(got, want, dense, strict=True):
            natural = w.norm().clamp_min(1.0) * (1.0 + largest)
            assert (g - w).norm() <= 2 * (d - w).norm() + 16 * EPS * natural, (variant, seed)
