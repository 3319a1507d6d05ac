"""docs/recipes.md: each section's snippets run in order, in one namespace, on what the section takes for granted."""

import re
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"
SECTIONS = {
    part.splitlines()[0]: re.findall(r"^```python\n(.*?)^```", part, re.DOTALL | re.MULTILINE)
    for part in PAGE.read_text().split("\n## ")[1:]
}
N = 8  # pairs; the page's list of products has as many


def run(section: str, namespace: dict) -> dict:
    """The namespace after all snippets of a section."""
    assert SECTIONS[section]
    for snippet in SECTIONS[section]:
        exec(compile(snippet, f"{PAGE.name}: {section}", "exec"), namespace)
    return namespace


@pytest.fixture
def loop() -> dict:
    """A user's own training loop: encoders, a batch, a learnable scale and bias."""
    torch.manual_seed(0)
    return {
        "torch": torch,
        "image_encoder": nn.Linear(6, 4),
        "text_encoder": nn.Linear(5, 4),
        "images": torch.randn(N, 6),
        "texts": torch.randn(N, 5),
        "hard_negatives": torch.randn(3, 5),
        "log_scale": nn.Parameter(torch.tensor(2.0)),
        "bias": nn.Parameter(torch.tensor(-5.0)),
    }


def dense_logits(loop: dict) -> torch.Tensor:
    image, text = loop["image_encoder"](loop["images"]), loop["text_encoder"](loop["texts"])
    return loop["log_scale"].exp() * F.normalize(image) @ F.normalize(text).T


def test_my_own_loop(loop, capsys):
    after = run("My own loop", loop)
    S, labels = dense_logits(loop), torch.arange(N)
    torch.testing.assert_close(after["loss"], (F.cross_entropy(S, labels) + F.cross_entropy(S.T, labels)) / 2)
    assert loop["image_encoder"].weight.grad.abs().max() > 0 and loop["log_scale"].grad != 0
    assert "of the images find their text" in capsys.readouterr().out


def test_siglip(loop):
    after = run("SigLIP: the sigmoid loss", loop)
    z = 2 * torch.eye(N) - 1
    torch.testing.assert_close(after["loss"], -F.logsigmoid(z * (dense_logits(loop) + loop["bias"])).sum() / N)
    assert loop["bias"].grad != 0


def test_more_negatives(loop):
    after = run("More negatives than pairs", loop)
    loop["texts"] = torch.cat([loop["texts"], loop["hard_negatives"]])
    torch.testing.assert_close(after["loss"], F.cross_entropy(dense_logits(loop), torch.arange(N)))


def test_duplicates(loop):
    from fastclip import clip_loss

    after = run("The same caption twice in a batch", loop | {"clip_loss": clip_loss})
    targets = (after["product"][:, None] == after["product"]).float()
    targets = targets / targets.sum(1)
    S = dense_logits(loop)
    torch.testing.assert_close(after["loss"], (F.cross_entropy(S, targets) + F.cross_entropy(S.T, targets)) / 2)


def test_open_clip(monkeypatch):
    open_clip = pytest.importorskip("open_clip")
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    import fastclip.integrations.open_clip as ours

    # OpenCLIP's script needs more packages than its losses: here it only says which loss it would have found.
    script, found = types.ModuleType("open_clip_train.main"), []
    script.main = lambda arguments: found.append((arguments, open_clip.ClipLoss))
    monkeypatch.setitem(sys.modules, "open_clip_train.main", script)
    monkeypatch.setattr(sys, "argv", ["train.py", "--model", "RN50"])
    vision = CLIPVisionCfg(layers=1, width=32, head_width=16, patch_size=8, image_size=16)
    text = CLIPTextCfg(context_length=8, vocab_size=64, width=32, heads=2, layers=1)
    model = CLIP(16, vision, text, output_dict=True)
    batch = {"images": torch.randn(N, 3, 16, 16), "tokens": torch.randint(1, 64, (N, 8))}
    try:
        after = run("OpenCLIP", {"model": model, **batch})
    finally:
        ours.unpatch()
    assert found == [(["--model", "RN50"], ours.ClipLoss)]
    torch.testing.assert_close(after["total"], open_clip.ClipLoss()(**model(*batch.values())))
    assert model.logit_scale.grad != 0


def test_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = {"vocab_size": 32, "max_position_embeddings": 8, "eos_token_id": 31, "bos_token_id": 30, "pad_token_id": 29}
    pixels = {"image_size": 16, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=small | words, vision_config=small | pixels, projection_dim=8)
    stock = transformers.CLIPModel(config).eval()
    stock.save_pretrained(tmp_path)
    batch = {"input_ids": torch.randint(0, 29, (N, 8)), "pixel_values": torch.randn(N, 3, 16, 16)}
    after = run("Hugging Face transformers", {"checkpoint": tmp_path, "batch": batch})
    assert after["outputs"].logits_per_image is None and after["outputs"].image_embeds.shape == (N, 8)
    torch.testing.assert_close(after["outputs"].loss, stock(**batch, return_loss=True).loss)


def test_sentence_transformers():
    pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer import losses

    after = run("sentence-transformers", {"model": None})
    embeddings = [torch.randn(N, 4) for _ in range(2)]
    settings = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
    want = losses.MultipleNegativesRankingLoss(None, **settings).compute_loss_from_embeddings(embeddings, None)
    torch.testing.assert_close(after["loss"].compute_loss_from_embeddings(embeddings, None), want)


def test_lightning(loop, monkeypatch):
    """The module's own part of training; where Lightning is not installed, on the two things it asks of its base."""
    logged = {}
    try:
        import lightning
    except ModuleNotFoundError:
        lightning = types.ModuleType("lightning")
        lightning.LightningModule = type("LightningModule", (nn.Module,), {"log_dict": None})
        monkeypatch.setitem(sys.modules, "lightning", lightning)
    monkeypatch.setattr(lightning.LightningModule, "log_dict", lambda self, values: logged.update(values))
    module = run("PyTorch Lightning", {})["ContrastiveModule"](loop["image_encoder"], loop["text_encoder"])
    optimizer = module.configure_optimizers()
    losses = []
    for step in range(5):
        optimizer.zero_grad()
        loss = module.training_step((loop["images"], loop["texts"]), step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert set(logged) == {"loss", "image_accuracy", "logit_scale"}


def test_retrieval(capsys):
    image, text = torch.randn(40, 4), torch.randn(40, 4)
    image[:10] = text[:10]
    after = run("Retrieval over a whole test set", {"image_embeddings": image, "text_embeddings": text})
    cosines = F.normalize(image) @ F.normalize(text).T
    ranks = (cosines > cosines.diag()[:, None] + 1e-6).sum(1)
    assert torch.equal(after["image_to_text"], ranks)
    assert f"{(ranks < 5).float().mean():.1%} image to text" in capsys.readouterr().out


def test_every_section_has_its_test():
    source = Path(__file__).read_text()
    assert [section for section in SECTIONS if f'run("{section}"' not in source] == []
