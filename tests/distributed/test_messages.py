"""What the ranks send each other and keep: the formulas of docs/distributed.md, counted."""

import pytest
import torch
from rank_cases import kept, traffic

D = 64
FLOAT, HEADER = 4, 4 * 8


@pytest.mark.parametrize("sizes", [(8, 8), (8, 8, 8, 8), (5, 2, 8)], ids=str)
@pytest.mark.parametrize(
    ("loss", "mode", "keys_forward", "keys_backward"),
    # How often the keys, or gradients of their size, go to all other ranks.
    [
        ("clip_loss", "gather", 1, 1),
        ("clip_loss", "ring", 1, 2),
        ("siglip_loss", "gather", 1, 1),
        ("siglip_loss", "ring", 2, 0),
    ],
)
def test_bytes_sent(pool, loss, mode, keys_forward, keys_backward, sizes):
    world, largest = len(sizes), max(sizes)
    x = torch.randn(sum(sizes), D)
    sent = pool.run(traffic, loss, mode, sizes, x, x.flip(0), world=world)
    vectors = 2 * FLOAT if loss == "clip_loss" else 0  # a sum and its shift for each column, and back a gradient
    for rank, got in enumerate(sent):
        others = sum(sizes) - sizes[rank]
        want = {"header": (world - 1) * HEADER, "all_reduce": 8}
        if mode == "gather":
            want["gather"] = (world - 1) * largest * (D * FLOAT + vectors)
            want["to_owners"] = others * (D * FLOAT + vectors)
        else:
            # Keys leave in turn: those of every rank but the next one; gradients: those of every rank but this one.
            following = sum(sizes) - sizes[(rank + 1) % world]
            keys = following * (keys_forward + keys_backward - 1) + others
            want["ring"] = keys * D * FLOAT
            if vectors:
                want |= {"gather": (world - 1) * largest * vectors, "to_owners": others * vectors}
        assert got == want, f"rank {rank}"


@pytest.mark.parametrize("loss", ["clip_loss", "siglip_loss"])
def test_memory_kept_for_backward_is_linear(pool, loss):
    """The matrix of each rank has 768 x 3072 entries, more than the CPU kernels keep of small ones."""
    width = 8
    for mode in ("gather", "ring"):
        small, large = (max(pool.run(kept, loss, mode, n, width)) for n in (768, 1536))
        assert large < 2.1 * small, mode
        rows = 768 * width * FLOAT
        everyone = 4 * rows if mode == "gather" else 0
        vectors = 20 * 4 * 768 * FLOAT
        assert small < 3 * rows + everyone + vectors, mode
