"""fastclip.integrations.transformers against Hugging Face's own models, built from a configuration.

Legend: N pairs, a prime that divides no other dimension, so that accounting.NoSquares knows N x N by its size.
"""

import copy

import pytest
import torch
from accounting import NoSquares, SquareMadeError, saved_bytes

transformers = pytest.importorskip("transformers")

from fastclip.integrations import transformers as ours  # noqa: E402

N = 97
TEXT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT |= {"max_position_embeddings": 8, "projection_dim": 16, "bos_token_id": 61, "eos_token_id": 62, "pad_token_id": 63}
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 16, "patch_size": 8, "projection_dim": 16}
KINDS = {
    "CLIPModel": (transformers.CLIPModel, transformers.CLIPConfig, {"projection_dim": 16}),
    "SiglipModel": (transformers.SiglipModel, transformers.SiglipConfig, {}),
}


@pytest.fixture(params=KINDS)
def stock(request):
    """A small Hugging Face model with random weights."""
    torch.manual_seed(0)
    model, config, more = KINDS[request.param]
    return model(config(text_config=TEXT, vision_config=VISION, **more)).train()


@pytest.fixture
def fast(stock):
    """The same model, weight for weight, without the logits."""
    return ours.patch(copy.deepcopy(stock))


def batch(n: int = N) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(0, 60, (n, 8), generator=generator)
    words[:, -1] = 62  # the end token, whose place CLIP reads
    return {
        "input_ids": words,
        "attention_mask": torch.ones_like(words),
        "pixel_values": torch.randn(n, 3, 16, 16, generator=generator),
    }


def grads(model) -> dict[str, torch.Tensor]:
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def test_loss_gradients_and_embeddings_are_hugging_faces(stock, fast):
    want, got = stock(**batch(), return_loss=True), fast(**batch(), return_loss=True)
    want.loss.backward()
    got.loss.backward()
    torch.testing.assert_close(got.loss, want.loss)
    torch.testing.assert_close(got.image_embeds, want.image_embeds)
    torch.testing.assert_close(got.text_embeds, want.text_embeds)
    assert got.logits_per_image is None and got.logits_per_text is None
    assert type(got) is type(want)
    assert grads(fast).keys() == grads(stock).keys() and "logit_scale" in grads(fast)
    for name, value in grads(stock).items():
        limit = 1e-5 * max(value.abs().max().item(), 1e-2)
        torch.testing.assert_close(
            grads(fast)[name], value, rtol=0, atol=limit, msg=lambda t, name=name: f"{name}: {t}"
        )


def test_no_n_by_n_tensor_is_made(stock, fast):
    with NoSquares(N):
        fast(**batch(), return_loss=True).loss.backward()
    with pytest.raises(SquareMadeError), NoSquares(N):
        stock(**batch(), return_loss=True)


def test_memory_kept_for_backward_is_linear_where_hugging_faces_is_not(stock, fast):
    def extra(model) -> int:
        """Bytes beyond two batches of half: what grows faster than the batch, less what does not grow with it."""
        many, few = (saved_bytes(lambda n=n: model(**batch(n), return_loss=True).loss) for n in (22 * N, 11 * N))
        return many - 2 * few

    assert extra(fast) < 0 < extra(stock)


def test_without_return_loss_the_logits_are_hugging_faces(stock, fast):
    with torch.no_grad():
        want, got = stock(**batch(5)), fast(**batch(5))
    assert got.loss is None
    torch.testing.assert_close(got.logits_per_image, want.logits_per_image)
    torch.testing.assert_close(got.logits_per_text, want.logits_per_text)


def test_return_dict_false_gives_a_tuple_that_starts_with_the_loss(stock, fast):
    want, got = (model(**batch(5), return_loss=True, return_dict=False) for model in (stock, fast))
    assert isinstance(got, tuple)
    torch.testing.assert_close(got[0], want[0])
    torch.testing.assert_close(got[1:3], want[3:5])  # the embeddings follow; no logits between


def test_patch_and_unpatch_swap_the_class_and_nothing_else(stock):
    theirs, weights = type(stock), {name: value.clone() for name, value in stock.state_dict().items()}
    for _ in range(2):
        assert ours.patch(stock) is stock
        assert type(stock) is getattr(ours, theirs.__name__) and isinstance(stock, theirs)
    for _ in range(2):
        assert ours.unpatch(stock) is stock
        assert type(stock) is theirs
    for name, value in stock.state_dict().items():
        assert torch.equal(value, weights[name])


def test_a_model_of_another_class_is_refused():
    with pytest.raises(TypeError, match="CLIPModel or SiglipModel, got Linear"):
        ours.patch(torch.nn.Linear(2, 2))


def test_checkpoints_go_both_ways(stock, fast, tmp_path):
    theirs = type(stock)
    fast.save_pretrained(tmp_path)
    assert fast.config.architectures == [theirs.__name__]  # so that AutoModel finds Hugging Face's class
    for loaded in (theirs.from_pretrained(tmp_path), type(fast).from_pretrained(tmp_path)):
        with torch.no_grad():
            torch.testing.assert_close(
                loaded.train()(**batch(5), return_loss=True).loss, stock(**batch(5), return_loss=True).loss
            )


def test_autocast(stock, fast):
    with torch.autocast("cpu", torch.bfloat16):
        want, got = (model(**batch(), return_loss=True).loss for model in (stock, fast))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want.float(), rtol=2e-2, atol=0.0)  # bfloat16 has 8 bits
