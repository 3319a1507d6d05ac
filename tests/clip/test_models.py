"""The towers and the models by name: shapes, counts, initial weights, and what each option promises."""

import math

import pytest
import torch
from small_models import CONFIGS, END, batch, small
from torch import nn
from torch.nn import functional as F

from fastclip import clip
from fastclip.clip.causal import end_of_text
from fastclip.clip.inputs import check_ids
from fastclip.clip.transformer import Block, LayerNorm, QuickGELU
from fastclip.clip.vit import drop_patches

each_kind = pytest.mark.parametrize("kind", CONFIGS)

# Millions of parameters: all, image tower, text tower (the logit scale, one more, does not show).
# github.com/mlfoundations/open_clip, docs/model_profile.csv, columns mparams, image_mparams and text_mparams.
PUBLISHED = {
    "RN50": (102.01, 38.32, 63.69),
    "RN101": (119.69, 56.26, 63.43),
    "RN50x4": (178.3, 87.14, 91.16),
    "RN50x16": (290.98, 167.33, 123.65),
    "RN50x64": (623.26, 420.38, 202.88),
    "ViT-B/32": (151.28, 87.85, 63.43),
    "ViT-B/16": (149.62, 86.19, 63.43),
    "ViT-L/14": (427.62, 303.97, 123.65),
    "ViT-L/14@336px": (427.94, 304.29, 123.65),
    "ViT-H/14": (986.11, 632.08, 354.03),
    "ViT-g/14": (1366.68, 1012.65, 354.03),
    "ViT-bigG/14": (2539.57, 1844.91, 694.66),
}


def millions(module: nn.Module) -> float:
    return round(sum(p.numel() for p in module.parameters()) / 1e6, 2)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name):
    with torch.device("meta"):
        model = clip.create_model(name)
    assert (millions(model), millions(model.image), millions(model.text)) == PUBLISHED[name]


def test_all_published_models_are_listed_and_the_small_ones_run():
    assert set(PUBLISHED) < set(clip.list_models())
    for name in set(clip.list_models()) - set(PUBLISHED):
        model = clip.create_model(name).eval()
        images, ids = batch(model.config, 2)
        image, text, scale = model(images, ids)
        assert image.shape == text.shape == (2, model.config.embed_dim)
        assert scale.item() == pytest.approx(1 / 0.07)


@pytest.mark.parametrize(
    "names",
    [
        ("ViT-B/32", "ViT-B-32"),
        ("ViT-L/14@336px", "ViT-L-14@336px", "ViT-L/14-336", "ViT-L-14-336"),
        ("ViT-Ti/4@32px", "ViT-Ti-4-32"),
    ],
    ids=lambda names: names[0],
)
def test_every_spelling_names_the_same_model(names):
    assert len({clip.model_config(name) for name in names}) == 1


def test_unknown_names_say_what_there_is():
    with pytest.raises(ValueError, match=r"ViT-B/33.*ViT-B/32"):
        clip.create_model("ViT-B/33")


def test_overrides_go_to_the_tower_that_has_them():
    config = clip.model_config(
        "ViT-B/32",
        embed_dim=64,
        image_size=64,
        patch_dropout=0.5,
        context=9,
        image_layers=2,
        text_width=64,
        init_scale=2.0,
    )
    assert (config.embed_dim, config.init_scale) == (64, 2.0)
    assert (config.image.image_size, config.image.patch_dropout, config.image.layers) == (64, 0.5, 2)
    assert (config.text.context, config.text.width, config.text.layers) == (9, 64, 12)
    assert clip.model_config("RN50", text=clip.CbowConfig(width=8)).text.width == 8


def test_quick_gelu_is_for_both_towers_and_may_be_in_the_name():
    for config in (clip.model_config("ViT-B-32-quickgelu"), clip.model_config("ViT-B/32", quick_gelu=True)):
        assert config.image.quick_gelu and config.text.quick_gelu
    assert not clip.model_config("ViT-B/32").image.quick_gelu
    assert clip.model_config("RN50-quickgelu").text.quick_gelu
    assert not clip.model_config("ViT-B-32-quickgelu", image_quick_gelu=False).image.quick_gelu


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("ViT-B/32", {"width": 64}, "image_width or text_width"),
        ("ViT-B/32", {"depth": 3}, "depth.*patch_size"),
        ("RN50", {"patch_dropout": 0.5}, "patch_dropout"),
        ("glyph-conv", {"quick_gelu": True}, "quick_gelu"),
    ],
)
def test_overrides_that_no_tower_has_are_named(name, overrides, message):
    with pytest.raises(TypeError, match=message):
        clip.model_config(name, **overrides)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: clip.VitConfig(image_size=100), "image_size.*100"),
        (lambda: clip.VitConfig(width=100), "width.*100"),
        (lambda: clip.VitConfig(patch_dropout=1.0), "patch_dropout"),
        (lambda: clip.ResNetConfig(image_size=100), "image_size.*100"),
        (lambda: clip.CausalTextConfig(width=100), "width.*100"),
    ],
)
def test_impossible_configurations_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@each_kind
def test_configurations_survive_json_and_the_kind_is_checked(kind):
    values = CONFIGS[kind].to_dict()
    assert clip.ClipConfig.from_dict(values) == CONFIGS[kind]
    values["image"]["kind"] = "mlp"
    with pytest.raises(ValueError, match="mlp"):
        clip.ClipConfig.from_dict(values)


def test_configurations_written_before_there_were_kinds_are_the_glyph_models():
    values = CONFIGS["glyph"].to_dict()
    del values["image"]["kind"], values["text"]["kind"], values["init_bias"]
    assert clip.ClipConfig.from_dict(values) == CONFIGS["glyph"]


@each_kind
def test_every_parameter_gets_a_finite_gradient(kind):
    model = small(kind)
    image, text, scale = model(*batch(model.config))
    assert image.shape == text.shape == (3, 24) and image.dtype == text.dtype == torch.float32
    (image * text.roll(1, 0)).sum().mul(scale).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        # A key's bias adds the same to all of a query's scores: softmax does not see it.
        assert parameter.grad.any() or name.endswith("key.bias"), name


def test_quick_gelu_is_its_definition():
    x = torch.linspace(-9, 9, 101, dtype=torch.float64, requires_grad=True)
    expected = x * torch.sigmoid(1.702 * x)
    torch.testing.assert_close(QuickGELU()(x), expected, rtol=1e-14, atol=1e-14)
    ours, theirs = (torch.autograd.grad(y.sum(), x)[0] for y in (QuickGELU()(x), expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


def plain_block(block: Block, x: torch.Tensor) -> torch.Tensor:
    """The block from its equations: one head at a time, softmax of the scores."""
    length, width = x.shape[1:]
    y = F.layer_norm(x, (width,), block.norm_attention.weight, block.norm_attention.bias)
    parts = (y @ block.query_key_value.weight.T + block.query_key_value.bias).chunk(3, dim=2)
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    heads = []
    for query, key, value in zip(*(part.chunk(block.heads, dim=2) for part in parts), strict=True):
        scores = query @ key.transpose(1, 2) / math.sqrt(query.shape[2])
        if block.causal:
            scores = scores.masked_fill(later, -math.inf)
        heads.append(scores.softmax(2) @ value)
    x = x + torch.cat(heads, 2) @ block.project.weight.T + block.project.bias
    return x + block.mlp(block.norm_mlp(x))


@pytest.mark.parametrize("causal", [False, True])
def test_block_is_its_equations_and_one_token_of_it_is_that_token(causal):
    torch.manual_seed(0)
    block = Block(32, 8, 2.5, quick_gelu=True, causal=causal).double()
    x = torch.randn(4, 7, 32, dtype=torch.float64)
    expected = plain_block(block, x)
    torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)
    pooled = torch.tensor([0, 3, 6, 3])  # the first, one inside, the last
    torch.testing.assert_close(block(x, pooled), expected[torch.arange(4), pooled], rtol=1e-12, atol=1e-12)


def test_text_after_the_end_token_changes_nothing_and_before_it_does():
    text = small("vit").text.eval()
    ids = torch.tensor([[1, 7, 8, END, 0, 0, 0], [1, 7, END, 0, 0, 0, 0]])
    features = text(ids)
    after = ids.clone()
    after[0, 4:], after[1, 3:] = torch.tensor([5, 6, 9]), torch.tensor([3, 4, 5, 6])
    torch.testing.assert_close(text(after), features, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(text(ids[:, :4]), features, rtol=1e-5, atol=1e-5)
    before = ids.clone()
    before[:, 1] = 9
    assert ((text(before) - features).abs() > 1e-2).any(dim=1).all()


def test_end_of_text_is_the_highest_id_or_the_first_of_the_named_one():
    ids = torch.tensor([[1, 59, 4, 59], [4, 4, 9, 1]])
    assert end_of_text(ids, None).tolist() == [1, 2]
    assert end_of_text(ids, 4).tolist() == [2, 0]


def test_cutting_the_padding_off_is_exact(monkeypatch):
    # A compiled tower has one length and cuts nothing: the same tower both ways.
    model = small("vit").double()
    ids = batch(model.config)[1][1:]
    assert end_of_text(ids, None).max() + 1 < ids.shape[1]
    cut = model.text(ids)
    grads = torch.autograd.grad(cut.square().sum(), list(model.text.parameters()))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    whole = model.text(ids)
    torch.testing.assert_close(cut, whole, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(
        grads, torch.autograd.grad(whole.square().sum(), list(model.text.parameters())), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_cbow_is_the_mean_of_the_tokens_that_are_not_padding():
    text = small("cbow").text
    ids = torch.tensor([[3, 4, 4, 0, 0], [0, 0, 0, 0, 0]])
    w = text.tokens.weight
    expected = torch.stack([(w[3] + 2 * w[4]) / 3, torch.zeros(24)]) @ text.project.weight.T
    torch.testing.assert_close(text(ids), expected)
    torch.testing.assert_close(text(ids.flip(1)), expected)


@pytest.mark.parametrize("kind", ["vit", "vit-quickgelu", "resnet"])
def test_fresh_weights_are_spread_as_open_clips(kind):
    """Each tensor's mean and standard deviation over OpenCLIP's, which begins as OpenAI's code does."""
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    ours = clip.export_openclip(clip.Clip(CONFIGS[kind]))
    theirs = open_clip.CLIP(**clip.openclip_config(CONFIGS[kind])).state_dict()
    for name, expected in theirs.items():
        got = ours[name]
        if expected.numel() < 2 or expected.std() == 0:
            assert torch.equal(got.float(), expected.float()), name
            continue
        assert got.std() / expected.std() == pytest.approx(1, abs=5 / math.sqrt(got.numel())), name
        error = expected.std() / math.sqrt(got.numel())
        assert abs(got.mean() - expected.mean()) < 5 * math.sqrt(2) * error, name


def kept(model: nn.Module, *inputs: torch.Tensor) -> tuple[list[torch.Tensor], int]:
    """The loss's gradients, and the bytes that autograd keeps besides the parameters."""
    storages, own = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        image, text, _ = model(*inputs)
    loss = (image * text.roll(1, 0)).sum()
    bytes_kept = sum(storage.nbytes() for storage in storages.values())
    return list(torch.autograd.grad(loss, [*model.image.parameters(), *model.text.parameters()])), bytes_kept


@each_kind
def test_gradient_checkpointing_keeps_less_and_changes_nothing(kind):
    plain, checkpointed = small(kind), small(kind)
    checkpointed.set_grad_checkpointing()
    inputs = batch(plain.config, 6)
    expected, most = kept(plain, *inputs)
    found, least = kept(checkpointed, *inputs)
    assert least < 0.6 * most
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    # Running statistics of the batch normalisations: moved once, not once more by the second forward pass.
    for (name, ours), theirs in zip(checkpointed.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}")
    checkpointed.set_grad_checkpointing(False)
    assert kept(checkpointed, *inputs)[1] == most


def test_attention_is_never_a_matrix_of_scores():
    """16 patches and a class token: were the scores kept, there would be a tensor of 17 x 17 a head."""
    model, shapes = small("vit"), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        model(*batch(model.config))
    assert not [shape for shape in shapes if shape[-2:] == (17, 17) or shape[-2:] == (11, 11)]
    assert [shape for shape in shapes if 17 in shape]


def test_patch_dropout_keeps_whole_patches_each_as_likely_as_the_others():
    torch.manual_seed(0)
    n, patches = 4000, 10
    x = torch.arange(patches).repeat(n, 1)[:, :, None].expand(n, patches, 3).float()
    kept_patches = drop_patches(x, 0.75)
    assert kept_patches.shape == (n, 2, 3) and (kept_patches == kept_patches[:, :, :1]).all()
    assert (kept_patches[:, 0, 0] != kept_patches[:, 1, 0]).all()
    shares = kept_patches[:, :, 0].long().flatten().bincount(minlength=patches) / n
    assert shares.sub(0.2).abs().max() < 5 * math.sqrt(0.2 * 0.8 / n)
    assert drop_patches(x, 0.99).shape == (n, 1, 3)


def test_patch_dropout_is_for_training_only_and_repeats_with_the_seed():
    config = clip.model_config("ViT-Ti/4@32px", patch_dropout=0.5, image_layers=1, vocabulary=60, text_layers=1)
    model, lengths = clip.Clip(config), []
    images, _ = batch(config)
    model.image.norm_before.register_forward_hook(lambda module, inputs, x: lengths.append(x.shape[1]))
    torch.manual_seed(0)
    one, other = model.encode_image(images), model.encode_image(images)
    torch.manual_seed(0)
    again = model.encode_image(images)
    assert torch.equal(one, again) and not torch.allclose(one, other)
    model.eval()
    assert torch.equal(model.encode_image(images), model.encode_image(images))
    assert lengths == [33, 33, 33, 65, 65]


def test_every_map_of_the_resnet_is_channels_last():
    image, found = small("resnet").image, {}

    def note(name):
        def hook(module, inputs, output):
            found[name] = output.is_contiguous(memory_format=torch.channels_last)

        return hook

    for name, module in image.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(note(name))
    image(torch.randn(2, 3, 64, 64))
    assert len(found) > 15 and all(found.values())


@each_kind
def test_towers_compile_to_one_graph(kind):
    model = small(kind).eval()
    images, ids = batch(model.config)
    with torch.no_grad():
        expected = model(images, ids)
        # The glyph model packs its tokens, whose number is in the data: its text tower is no single graph.
        compiled = torch.compile(model.image if kind == "glyph" else model, backend="eager", fullgraph=True)
        found = (compiled(images),) if kind == "glyph" else compiled(images, ids)
    for ours, theirs in zip(found, expected, strict=False):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "recomputed"), [("vit", False), ("vit", True), ("resnet", True)], ids=["vit", "vit-again", "resnet-again"]
)
def test_compiled_training_step_has_the_same_gradients(kind, recomputed):
    compiled, eager = small(kind).image, small(kind).image
    images = batch(CONFIGS[kind])[0]
    compiled.set_grad_checkpointing(recomputed)
    towers = (torch.compile(compiled, backend="aot_eager", fullgraph=True), eager)
    found, expected = (torch.autograd.grad(tower(images).square().sum(), list(tower.parameters())) for tower in towers)
    for ours, theirs in zip([*found, *compiled.buffers()], [*expected, *eager.buffers()], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_autocast_and_bfloat16_models_are_close_to_float32(kind):
    model = small(kind).eval()
    images, ids = batch(model.config)
    with torch.no_grad():
        expected = model.encode_image(images), model.encode_text(ids)
        with torch.autocast("cpu", torch.bfloat16):
            cast = model.encode_image(images), model.encode_text(ids)
        narrow = model.bfloat16()
        stored = narrow.encode_image(images), narrow.encode_text(ids)
    for found in (cast, stored):
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.dtype == torch.bfloat16
            assert F.cosine_similarity(ours.float(), theirs).min() > 0.999


def test_layer_norm_hands_back_the_dtype_it_got_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert LayerNorm(8)(torch.randn(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["vit", "resnet", "glyph"])
def test_images_of_the_wrong_size_or_type_are_named(kind):
    model = small(kind)
    channels, size = model.config.image.channels, model.config.image.image_size
    with pytest.raises(ValueError, match=rf"\[N, {channels}, {size}, {size}\], got \[2, {channels}, 96, 96\]"):
        model.encode_image(torch.zeros(2, channels, 96, 96))
    with pytest.raises(ValueError, match=rf"got \[{channels}, {size}, {size}\]"):
        model.encode_image(torch.zeros(channels, size, size))
    with pytest.raises(TypeError, match="uint8"):
        model.encode_image(torch.zeros(2, channels, size, size, dtype=torch.uint8))


@pytest.mark.parametrize("kind", ["vit", "cbow", "glyph"])
def test_ids_of_the_wrong_shape_or_type_are_named(kind):
    text = small(kind).text
    for ids in (torch.zeros(2, 12), torch.zeros(2, 3, dtype=torch.bool)):
        with pytest.raises(TypeError, match="int64"):
            text(ids)
    for ids in (torch.zeros(2, 12), torch.zeros(5), torch.zeros(2, 0)):
        with pytest.raises(ValueError, match=r"L <= 11"):
            text(ids.long())
    check_ids(torch.zeros(2, 11, dtype=torch.int32), 11)


def test_logit_bias_is_there_when_asked_for():
    assert small("vit").logit_bias is None
    model = clip.create_model("glyph-conv", init_bias=-10)
    assert model.logit_bias.shape == () and model.logit_bias.item() == -10
    assert "logit_bias" in dict(model.named_parameters())
