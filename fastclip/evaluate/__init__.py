"""What a model knows: zero-shot classification, retrieval, search and probes. Nothing here imports the trainer.

    loaded = open_model("ViT-B-32.pt")
    result = zero_shot(loaded, open_labelled("pictures"), templates_for(loaded))
    result.figures                                    {"top-1": ..., "top-5": ..., "mean per class": ...}

docs/evaluation.md has the rest.
"""

from fastclip.evaluate.classify import Classified, templates_for, zero_shot
from fastclip.evaluate.encode import Encoded, Reading, encode_images, encode_texts
from fastclip.evaluate.index import FolderIndex, open_index
from fastclip.evaluate.labelled import Labelled, open_labelled
from fastclip.evaluate.loaded import LoadedModel, open_model
from fastclip.evaluate.pairs import evaluate_pairs
from fastclip.evaluate.probe import linear_probe
from fastclip.evaluate.recommend import similar
from fastclip.evaluate.retrieval import retrieval_figures

__all__ = [
    "Classified",
    "Encoded",
    "FolderIndex",
    "Labelled",
    "LoadedModel",
    "Reading",
    "encode_images",
    "encode_texts",
    "evaluate_pairs",
    "linear_probe",
    "open_index",
    "open_labelled",
    "open_model",
    "retrieval_figures",
    "similar",
    "templates_for",
    "zero_shot",
]
