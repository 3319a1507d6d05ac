"""Checkpoints of OpenAI, OpenCLIP and transformers: the same features here, and the same weights back there.

Small random models of every kind, and two real sizes; FASTCLIP_LARGE_MODELS=1 adds the others (minutes, 8 GiB).
"""

import json
import os

import pytest
import torch
from small_models import CONFIGS, END, batch, scrambled, small
from torch import nn

from fastclip import clip

open_clip = pytest.importorskip("open_clip")
transformers = pytest.importorskip("transformers")

OPENCLIP_KINDS = ["vit", "vit-quickgelu", "resnet"]
LARGE = ["RN101", "RN50x4", "RN50x16", "RN50x64", "ViT-B-16", "ViT-L-14", "ViT-L-14-336"]
large = pytest.mark.skipif("FASTCLIP_LARGE_MODELS" not in os.environ, reason="FASTCLIP_LARGE_MODELS is not set")


def open_clips(kind: str, seed: int = 3, build=open_clip.CLIP, **changes) -> nn.Module:
    torch.manual_seed(seed)
    return scrambled(build(**{**clip.openclip_config(CONFIGS[kind]), **changes})).eval()


def huggings(**changes) -> nn.Module:
    """A CLIPModel of two layers a tower. Heads of 32, not 64: they are read from the configuration."""
    torch.manual_seed(3)
    tower = {"hidden_size": 128, "intermediate_size": 200, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {"vocab_size": 60, "max_position_embeddings": 11, "bos_token_id": 58, "eos_token_id": END}
    config = transformers.CLIPConfig(
        projection_dim=24,
        text_config={**tower, **text, **changes},
        vision_config={**tower, "image_size": 64, "patch_size": 16, **changes},
    )
    return scrambled(transformers.CLIPModel(config)).eval()


def tensor_of(features) -> torch.Tensor:
    return features if isinstance(features, torch.Tensor) else features.pooler_output


@torch.no_grad()
def features_of(model: nn.Module, images: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if isinstance(model, transformers.CLIPModel):
        return tensor_of(model.get_image_features(images)), tensor_of(model.get_text_features(ids))
    return model.encode_image(images), model.encode_text(ids)


def assert_same_features(ours: clip.Clip, theirs: nn.Module, n: int = 3) -> None:
    """Before normalisation, within 1e-5 of the features' length: closer than 1e-5 once they have length 1."""
    assert not ours.training
    inputs = batch(ours.config, n)
    for found, expected in zip(features_of(ours, *inputs), features_of(theirs, *inputs), strict=True):
        length = expected.norm(dim=1, keepdim=True)
        assert (length > 1).all()
        torch.testing.assert_close(found / length, expected / length, rtol=0, atol=1e-5)


def assert_same_state(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def wrapped(kind: str, theirs: nn.Module, path):
    """One model as each kind of OpenCLIP's files."""
    state = theirs.state_dict()
    if kind == "training":
        optimizer = torch.optim.AdamW(theirs.parameters())
        state = {f"module.{name}": tensor for name, tensor in state.items()}
        state = {"epoch": 3, "name": "run", "state_dict": state, "optimizer": optimizer.state_dict()}
    elif kind == "compiled":
        state = {f"_orig_mod.{name}": tensor for name, tensor in state.items()}
    elif kind == "scale-of-one-number":
        state["logit_scale"] = state["logit_scale"].reshape(1)
    if kind == "safetensors":
        from safetensors.torch import save_file

        path = path / "model.safetensors"
        save_file(state, path)
    elif kind == "folder":
        save = {"model_cfg": clip.openclip_config(CONFIGS["vit-quickgelu"]), "preprocess_cfg": {"mean": [0, 0, 0]}}
        (path / "open_clip_config.json").write_text(json.dumps(save))
        torch.save(state, path / "open_clip_pytorch_model.bin")
    else:
        path = path / "checkpoint.pt"
        torch.save(state, path, _use_new_zipfile_serialization=kind != "before-zip")
    return path


@pytest.mark.parametrize("kind", OPENCLIP_KINDS)
def test_open_clips_weights_give_its_features_and_go_back_unchanged(kind, tmp_path):
    theirs = open_clips(kind)
    quick = kind == "vit-quickgelu"
    ours = clip.load(wrapped("plain", theirs, tmp_path), quick_gelu=quick)
    assert ours.config == CONFIGS[kind]
    assert_same_features(ours, theirs)
    back = open_clips(kind, seed=4)
    back.load_state_dict(clip.export_openclip(ours), strict=True)
    assert_same_state(back.state_dict(), theirs.state_dict())


def test_gelu_and_quick_gelu_are_told_apart(tmp_path):
    """The shapes are the same and the features are not: what the argument is for."""
    path = wrapped("plain", open_clips("vit-quickgelu"), tmp_path)
    with pytest.raises(AssertionError, match="not close"):
        assert_same_features(clip.load(path), open_clips("vit-quickgelu"))


@pytest.mark.parametrize("kind", ["training", "compiled", "scale-of-one-number", "safetensors", "folder", "before-zip"])
def test_every_file_of_open_clip_is_recognised(kind, tmp_path):
    theirs = open_clips("vit-quickgelu")
    path = wrapped(kind, theirs, tmp_path)
    quick = None if kind == "folder" else True  # the folder's configuration says so
    ours = clip.load(tmp_path if kind == "folder" else path, quick_gelu=quick)
    assert ours.config == CONFIGS["vit-quickgelu"]
    assert_same_features(ours, theirs)


def test_open_clips_model_with_a_separate_text_tower_and_a_bias(tmp_path):
    theirs = open_clips("vit", build=open_clip.CustomTextCLIP, init_logit_bias=-10.0)
    ours = clip.load(wrapped("plain", theirs, tmp_path))
    assert ours.logit_bias.item() == theirs.logit_bias.item() and ours.config.init_bias is not None
    assert_same_features(ours, theirs)


@pytest.mark.parametrize("name", ["RN50", "ViT-B-32", *(pytest.param(name, marks=large) for name in LARGE)])
def test_open_clips_own_models_load_and_go_back(name, tmp_path):
    torch.manual_seed(0)
    theirs = scrambled(open_clip.create_model(name)).eval()
    ours = clip.load(wrapped("plain", theirs, tmp_path))
    assert ours.config == clip.model_config(name)
    assert_same_features(ours, theirs, n=1)
    assert_same_state(clip.export_openclip(ours), theirs.state_dict())


@pytest.mark.parametrize("name", ["ViT-H/14", "ViT-g/14", "ViT-bigG/14"])
def test_configurations_of_open_clips_largest_models_are_read_from_shapes_and_json(name):
    """Their heads are not 64 wide, and their MLPs not 4 widths. On the meta device: shapes only."""
    from fastclip.clip.convert_config import config_from_shapes, from_openclip

    expected = clip.model_config(name)
    values = open_clip.get_model_config(name.replace("/", "-"))
    with torch.device("meta"):
        theirs = open_clip.CLIP(**values).state_dict()
        ours = clip.Clip(expected)
    found, stated = config_from_shapes(theirs, openai=False), from_openclip(values)
    assert found == expected
    assert {name: t.shape for name, t in clip.export_openclip(ours).items()} == {n: t.shape for n, t in theirs.items()}
    assert (stated.image.head_width, stated.text) == (expected.image.head_width, expected.text)
    assert round(stated.image.mlp_ratio * stated.image.width) == round(expected.image.mlp_ratio * expected.image.width)


@pytest.mark.parametrize(
    ("entry", "value"), [("pool_type", "avg"), ("timm_model_name", "convnext_base"), ("ls_init_value", 1e-5)]
)
def test_open_clips_other_architectures_are_named(entry, value, tmp_path):
    values = clip.openclip_config(CONFIGS["vit"])
    values["vision_cfg"][entry] = value
    torch.save({"a": torch.zeros(1)}, tmp_path / "open_clip_pytorch_model.bin")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": values}))
    with pytest.raises(ValueError, match=f"open_clip_config.json.*{entry}"):
        clip.load(tmp_path)


def test_positions_are_resized_as_open_clip_does(tmp_path):
    theirs = open_clips("vit")
    path = wrapped("plain", theirs, tmp_path)
    values = clip.openclip_config(CONFIGS["vit"])
    values["vision_cfg"]["image_size"] = 96
    wider = open_clip.CLIP(**values)
    open_clip.load_checkpoint(wider, str(path))
    ours = clip.load(path, image_size=96)
    assert ours.config.image.image_size == 96
    assert_same_features(ours, wider.eval())
    assert_same_features(clip.load(path, image_size=64), theirs)


def test_positions_of_the_resnets_pooling_are_resized_too(tmp_path):
    theirs = open_clips("resnet")
    with torch.no_grad():
        theirs.visual.attnpool.positional_embedding[1:] = 0.25  # of a constant, every interpolation is the constant
    ours = clip.load(wrapped("plain", theirs, tmp_path), image_size=128)
    positions = ours.image.pool.positions
    assert torch.equal(positions[0], theirs.visual.attnpool.positional_embedding[0])
    torch.testing.assert_close(positions[1:], torch.full((16, 512), 0.25))
    assert ours.encode_image(torch.randn(2, 3, 128, 128)).isfinite().all()


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("form", ["safetensors", "bin", "file", "old"])
def test_transformers_weights_give_its_features_and_go_back_unchanged(activation, form, tmp_path):
    theirs = huggings(hidden_act=activation)
    theirs.save_pretrained(tmp_path)
    path = tmp_path
    if form in ("bin", "old"):
        (tmp_path / "model.safetensors").unlink()
        # Until 2023 the places were saved too.
        places = {"text_model.embeddings.position_ids": torch.arange(11)[None]} if form == "old" else {}
        torch.save({**theirs.state_dict(), **places}, tmp_path / "pytorch_model.bin")
    if form == "old":
        values = json.loads((tmp_path / "config.json").read_text())
        values["text_config_dict"], values["text_config"] = values["text_config"], {"hidden_act": "?"}
        (tmp_path / "config.json").write_text(json.dumps(values))
    if form == "file":
        path = tmp_path / "model.safetensors"
    ours = clip.load(path)
    assert ours.config.image.head_width == 32 and ours.config.text.quick_gelu == (activation == "quick_gelu")
    assert_same_features(ours, theirs)
    clip.export_transformers(ours, tmp_path / "back")
    back = transformers.CLIPModel.from_pretrained(tmp_path / "back")
    assert_same_state(back.state_dict(), theirs.state_dict())
    assert_same_features(ours, back.eval())


@pytest.mark.parametrize("end", [2, 7, END], ids=["old", "inside", "highest"])
def test_the_end_token_is_the_one_that_transformers_takes(end, tmp_path):
    theirs = huggings()
    theirs.text_model.eos_token_id = theirs.config.text_config.eos_token_id = end
    theirs.save_pretrained(tmp_path)
    ours = clip.load(tmp_path)
    assert ours.config.text.end_token == (7 if end == 7 else None)
    images, ids = batch(ours.config)
    ids[:, 1], ids[:, 5], ids[:, 9] = 7, 7, END
    expected = features_of(theirs, images, ids)[1]
    torch.testing.assert_close(features_of(ours, images, ids)[1], expected, rtol=1e-5, atol=1e-5)


@large
@pytest.mark.parametrize("model", ["base", "large"])
def test_transformers_models_of_real_size(model, tmp_path):
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    config = {"vision_config": {**sizes, "patch_size": 14}, "text_config": text, "projection_dim": 768}
    torch.manual_seed(0)
    theirs = scrambled(transformers.CLIPModel(transformers.CLIPConfig(**(config if model == "large" else {})))).eval()
    theirs.save_pretrained(tmp_path)
    name = "ViT-B/32" if model == "base" else "ViT-L/14"
    ours = clip.load(tmp_path, name=name)
    assert ours.config == clip.model_config(name, quick_gelu=True)
    assert_same_features(ours, theirs, n=1)


@pytest.mark.parametrize(("entry", "value"), [("layer_norm_eps", 1e-6), ("hidden_act", "relu")])
def test_settings_of_transformers_that_are_not_here_are_named(entry, value, tmp_path):
    huggings(**{entry: value}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"config.json.*{entry}"):
        clip.load(tmp_path)


@pytest.mark.parametrize(
    ("kind", "openclip", "hugging"),
    [("resnet", None, "ResNetConfig"), ("cbow", "CbowConfig", "CbowConfig"), ("glyph", "ConvConfig", "ConvConfig")],
)
def test_models_that_others_do_not_have_are_not_exported(kind, openclip, hugging, tmp_path):
    model = small(kind)
    with pytest.raises(ValueError, match=hugging):
        clip.export_transformers(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    if openclip:
        with pytest.raises(ValueError, match=openclip):
            clip.export_openclip(model)


def test_export_is_a_copy():
    model = small("vit")
    exported = clip.export_openclip(model)
    model.text.tokens.weight.data.zero_()
    assert exported["token_embedding.weight"].any()
