"""What the ranks run to compare fastclip's sentence-transformers losses with the library's own.

Legend: columns: anchors, positives, hard negatives, each [N, D] of all ranks; each rank cuts out its rows by `sizes`.
"""

import warnings

import torch
from rank_cases import rows
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def library(whose: str):
    """Their losses or ours: both have the same names."""
    import torchvision_stand_in  # noqa: F401
    from sentence_transformers.sentence_transformer import losses

    from fastclip.integrations import sentence_transformers

    return losses if whose == "theirs" else sentence_transformers


class Encoder(nn.Sequential):
    """What these losses ask of a SentenceTransformer: features in, a sentence_embedding added."""

    def __init__(self, width: int) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, 5))
        self.double()

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return features | {"sentence_embedding": super().forward(features["input_ids"])}


def embeddings_step(rank, group, whose: str, sizes, columns: list[Tensor], settings: dict) -> list[Tensor]:
    """The rank's value and the gradients of its rows, before any averaging."""
    loss = library(whose).MultipleNegativesRankingLoss(None, gather_across_devices=True, **settings)
    own = [column[rows(sizes, rank)].clone().requires_grad_() for column in columns]
    value = loss.compute_loss_from_embeddings(own, None)
    return [value.detach(), *torch.autograd.grad(value, own)]


def embeddings_steps(rank, group, cases: list[tuple]) -> list[list[Tensor]]:
    return [embeddings_step(rank, group, *case) for case in cases]


def training_step(rank, group, whose: str, name: str, sizes, columns: list[Tensor], settings: dict) -> list[Tensor]:
    """The rank's value and the encoder's gradients after DDP's averaging, with the encoder wrapped as trainers do."""
    encoder = Encoder(columns[0].shape[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the library is parting with its symmetric forms
        loss = getattr(library(whose), name)(encoder, gather_across_devices=True, **settings)
    loss.model = DistributedDataParallel(encoder)
    value = loss([{"input_ids": column[rows(sizes, rank)]} for column in columns], None)
    value.backward()
    return [value.detach(), *(parameter.grad for parameter in encoder.parameters())]


def outcome(rank, group, columns: dict[int, list[Tensor]], settings: dict[int, dict]) -> tuple[str, str]:
    """(exception's name, message) of our loss, whose arguments differ from rank to rank."""
    loss = library("ours").MultipleNegativesRankingLoss(None, gather_across_devices=True, **settings[rank])
    try:
        loss.compute_loss_from_embeddings(columns[rank])
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""
