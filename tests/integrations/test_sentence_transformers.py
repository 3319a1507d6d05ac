"""fastclip.integrations.sentence_transformers against the library's own losses.

Legend: N anchors, each with a positive and K - 1 hard negatives; embeddings [N, D].
"""

import itertools
import warnings

import pytest
import torch
from accounting import NoSquares, SquareMadeError, saved_bytes

pytest.importorskip("sentence_transformers")

from sentence_transformers import SentenceTransformer, util
from sentence_transformers.sentence_transformer import losses as theirs
from sentence_transformers.sentence_transformer import modules
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from fastclip.integrations import sentence_transformers as ours

WORDS = ["[PAD]", "[UNK]", *(f"w{i}" for i in range(30))]
ONE_WAY = ("query_to_doc",)
BOTH_WAYS = ("query_to_doc", "doc_to_query")
OTHERS = ("query_to_query", "doc_to_query", "doc_to_doc")
DIRECTIONS = [ONE_WAY + more for count in range(4) for more in itertools.combinations(OTHERS, count)]
HARDNESS = (None, "in_batch_negatives", "hard_negatives", "all_negatives")
LAYOUTS = [("joint", directions) for directions in DIRECTIONS] + [
    ("per_direction", directions) for directions in (ONE_WAY, BOTH_WAYS)
]
NEGATIVES = pytest.mark.parametrize("negatives", [0, 1, 3])


def embeddings(n: int, negatives: int, dtype: torch.dtype = torch.float64, d: int = 6) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(n + negatives)
    anchors = torch.randn(n, d, generator=generator, dtype=torch.float64)
    noise = torch.randn(1 + negatives, n, d, generator=generator, dtype=torch.float64)
    return [t.to(dtype).requires_grad_() for t in (anchors, *(anchors + noise))]


def value_and_grads(loss, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    value = loss.compute_loss_from_embeddings(inputs, None)
    return [value.detach(), *torch.autograd.grad(value, inputs)]


def agree(got: list[torch.Tensor], want: list[torch.Tensor], tolerance: float = 1e-11) -> None:
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        limit = tolerance * max(1.0, w.abs().max().item())
        torch.testing.assert_close(
            g, w, rtol=0.0, atol=limit, msg=lambda text, i=i: f"[loss, gradients...][{i}]: {text}"
        )


@NEGATIVES
@pytest.mark.parametrize("hardness", HARDNESS)
@pytest.mark.parametrize("mode, directions", LAYOUTS)
def test_every_direction_partition_and_hardness(mode, directions, hardness, negatives):
    settings = {"directions": directions, "partition_mode": mode, "hardness_mode": hardness}
    settings |= {"hardness_strength": 5.0 if hardness else 0.0}
    inputs = embeddings(9, negatives)
    got, want = (
        value_and_grads(library.MultipleNegativesRankingLoss(None, **settings), inputs) for library in (ours, theirs)
    )
    agree(got, want)


@NEGATIVES
@pytest.mark.parametrize("n", [1, 2, 65], ids=["one", "two", "panel+1"])
@pytest.mark.parametrize("similarity", [util.cos_sim, util.dot_score])
def test_similarities_and_sizes(n, negatives, similarity):
    scale = 20.0 if similarity is util.cos_sim else 1.0
    inputs = embeddings(n, negatives)
    settings = {"scale": scale, "similarity_fct": similarity, "directions": DIRECTIONS[-1]}
    got, want = (
        value_and_grads(library.MultipleNegativesRankingLoss(None, **settings), inputs) for library in (ours, theirs)
    )
    agree(got, want)


def test_float32_on_the_backend_that_users_get():
    inputs = embeddings(130, 2, torch.float32)
    got, want = (value_and_grads(library.MultipleNegativesRankingLoss(None), inputs) for library in (ours, theirs))
    agree(got, want, 1e-5)


@pytest.mark.parametrize("directions", [ONE_WAY, DIRECTIONS[-1]], ids=["one", "all"])
def test_no_n_by_n_tensor_is_made_and_memory_is_linear(directions):
    settings = {"directions": directions, "hardness_mode": "in_batch_negatives", "hardness_strength": 3.0}
    fast, stock = (library.MultipleNegativesRankingLoss(None, **settings) for library in (ours, theirs))

    def growth(loss) -> float:
        """How many times more is kept for a batch twice as large."""
        many, few = (embeddings(n, 1, torch.float32) for n in (3000, 1500))
        return saved_bytes(lambda: loss.compute_loss_from_embeddings(many, None)) / saved_bytes(
            lambda: loss.compute_loss_from_embeddings(few, None)
        )

    assert growth(fast) < 2.1
    assert growth(stock) > 3.0
    inputs = embeddings(97, 1)  # a prime that divides nothing else
    with NoSquares(97):
        fast.compute_loss_from_embeddings(inputs, None).backward()
    with pytest.raises(SquareMadeError), NoSquares(97):
        stock.compute_loss_from_embeddings(inputs, None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny BERT with random weights and a tokenizer of 30 words, as a checkpoint on disk."""
    path = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    sizes = {"vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 16}
    config = BertConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
    BertModel(config).save_pretrained(path)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer(), pad_token="[PAD]", unk_token="[UNK]").save_pretrained(path)
    return str(path)


def tokenizer() -> Tokenizer:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return words


def transformer(folder: str) -> SentenceTransformer:
    encoder = modules.Transformer(folder)
    return SentenceTransformer(modules=[encoder, modules.Pooling(encoder.get_embedding_dimension())], device="cpu")


def columns(model: SentenceTransformer, n: int, negatives: int) -> list[dict[str, torch.Tensor]]:
    """The tokenised texts: anchors, positives, hard negatives."""
    generator = torch.Generator().manual_seed(3)
    texts = torch.randint(2, len(WORDS), (2 + negatives, n, 4), generator=generator)
    return [model.preprocess([" ".join(WORDS[i] for i in row) for row in column]) for column in texts]


def train_once(model: SentenceTransformer, loss, n: int, negatives: int) -> list[torch.Tensor]:
    model.zero_grad()
    value = loss(columns(model, n, negatives), torch.arange(n))
    value.backward()
    return [value.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


FORMS = {
    "MultipleNegativesRankingLoss": {},
    "CachedMultipleNegativesRankingLoss": {"mini_batch_size": 4, "directions": DIRECTIONS[-1]},
    "MultipleNegativesSymmetricRankingLoss": {"scale": 30.0},
    "CachedMultipleNegativesSymmetricRankingLoss": {"mini_batch_size": 4},
}


@pytest.mark.parametrize("negatives", [0, 2])
@pytest.mark.parametrize("name", FORMS)
def test_training_a_transformer(name, negatives, folder):
    model = transformer(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the library is parting with its symmetric forms
        stock = getattr(theirs, name)(model, **FORMS[name])
    want = train_once(model, stock, 10, negatives)
    got = train_once(model, getattr(ours, name)(model, **FORMS[name]), 10, negatives)
    assert len(got) > 10 and max(g.abs().max() for g in got[1:]) > 1e-4  # else nothing was compared
    agree(got, want, 1e-5)


def test_cached_without_gradients(folder):
    model = transformer(folder)
    with torch.no_grad():
        got, want = (
            library.CachedMultipleNegativesRankingLoss(model, mini_batch_size=4)(columns(model, 10, 1), None)
            for library in (ours, theirs)
        )
    torch.testing.assert_close(got, want)


def test_cached_uses_the_loss_of_this_module_with_every_option(folder):
    settings = {"scale": 7.0, "similarity_fct": util.dot_score, "directions": BOTH_WAYS, "partition_mode": "joint"}
    settings |= {"hardness_mode": "all_negatives", "hardness_strength": 2.0}
    loss = ours.CachedMultipleNegativesRankingLoss(transformer(folder), mini_batch_size=4, **settings)
    assert type(loss.loss) is ours.MultipleNegativesRankingLoss
    assert {name: getattr(loss.loss, name) for name in settings} == settings
    assert loss.get_config_dict()["similarity_fct"] == "dot_score"


def test_a_static_embedding():
    torch.manual_seed(0)
    model = SentenceTransformer(modules=[modules.StaticEmbedding(tokenizer(), embedding_dim=8)], device="cpu")
    got, want = (train_once(model, library.MultipleNegativesRankingLoss(model), 10, 1) for library in (ours, theirs))
    agree(got, want, 1e-5)


def test_gathering_without_processes_is_the_loss_of_this_one():
    inputs = embeddings(9, 1)
    settings = {"gather_across_devices": True, "directions": DIRECTIONS[-1]}
    got, want = (
        value_and_grads(library.MultipleNegativesRankingLoss(None, **settings), inputs) for library in (ours, theirs)
    )
    agree(got, want)


def test_what_cannot_be_mapped_raises():
    with pytest.raises(ValueError, match="cos_sim or dot_score, got euclidean_sim"):
        ours.MultipleNegativesRankingLoss(None, similarity_fct=util.euclidean_sim)
    with pytest.raises(ValueError, match="one shape"):
        ours.MultipleNegativesRankingLoss(None).compute_loss_from_embeddings([torch.ones(3, 2), torch.ones(4, 2)])
    with pytest.raises(ValueError, match="anchors and positives"):
        ours.MultipleNegativesRankingLoss(None).compute_loss_from_embeddings([torch.ones(3, 2)])
