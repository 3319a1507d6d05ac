"""Loading and saving: what a file may do, what is refused, and what is said then."""

import json
import pickle
import shutil
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from small_models import CONFIGS, batch, small

from fastclip import clip
from fastclip.clip.archive import is_torchscript, read_torchscript
from fastclip.clip.convert import OPENAI_EXTRAS

KINDS = list(CONFIGS)


class OpenAiLayout(torch.nn.Module):
    """A module whose parameters have OpenAI's names, in float16 where OpenAI's are, with its three extra numbers."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, tensor in state.items():
            *path, last = name.split(".")
            module = self
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, torch.nn.Module())
                module = getattr(module, part)
            if tensor.is_floating_point() and "running" not in last:
                module.register_parameter(last, torch.nn.Parameter(tensor.half() if tensor.ndim > 1 else tensor))
            else:
                module.register_buffer(last, tensor)
        for name in OPENAI_EXTRAS:
            self.register_buffer(name, torch.tensor(64))
        self.sizes = [3, 4]  # lists have a marker of their own in the pickle

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.logit_scale * self.sizes[0]


@pytest.fixture(scope="module", params=["vit-quickgelu", "resnet"])
def openai(request, tmp_path_factory):
    """(archive, state dict file, the model with its weights rounded to float16)."""
    folder = tmp_path_factory.mktemp("openai")
    model = small(request.param).eval()
    module = OpenAiLayout(clip.export_openclip(model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(module).save(folder / "archive.pt")
    torch.save(module.state_dict(), folder / "state.pt")
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data = parameter.data.half().float()
    return folder / "archive.pt", folder / "state.pt", model


def assert_same_model(found: clip.Clip, expected: clip.Clip) -> None:
    """Bit for bit."""
    ours, theirs = found.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("which", [0, 1], ids=["archive", "state dict"])
def test_openais_files_give_its_model_with_quick_gelu(openai, which):
    expected = openai[2]
    found = clip.load(openai[which])
    assert found.config.text.quick_gelu and getattr(found.config.image, "quick_gelu", True)
    assert_same_model(found, expected)
    assert not clip.load(openai[which], quick_gelu=False).config.text.quick_gelu


@pytest.mark.filterwarnings("ignore:.*torch.jit.load.*:DeprecationWarning")
def test_archive_holds_what_torch_itself_reads_from_it(openai):
    path = openai[0]
    expected = torch.jit.load(path).state_dict()
    found = read_torchscript(path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) and found[name].dtype == expected[name].dtype for name in found)
    assert is_torchscript(path) and not is_torchscript(openai[1])


def rewritten(source: Path, target: Path, change) -> Path:
    """A copy of a zip whose entries went through change(name, bytes) -> bytes."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, change(entry.filename, old.read(entry)))
    return target


@pytest.mark.filterwarnings("ignore:.*torch.jit.load.*:DeprecationWarning")
def test_code_in_an_archive_is_never_read(openai, tmp_path):
    spoilt = rewritten(
        openai[0], tmp_path / "spoilt.pt", lambda name, data: b"no program" if "/code/" in name else data
    )
    with pytest.raises(RuntimeError):
        torch.jit.load(spoilt)
    assert_same_model(clip.load(spoilt), openai[2])


class Touch:
    """Unpickled as pickle would, it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("form", ["archive", "torch.save", "pickle"])
def test_a_pickle_that_calls_something_is_refused_and_not_run(form, openai, tmp_path):
    witness, path = tmp_path / "ran", tmp_path / "bad.pt"
    bomb = Touch(witness)
    if form == "archive":
        rewritten(openai[0], path, lambda n, data: pickle.dumps(bomb, 2) if n.endswith("/data.pkl") else data)
    elif form == "torch.save":
        torch.save({"state_dict": {"a": torch.zeros(2)}, "extra": bomb}, path)
    else:
        path.write_bytes(pickle.dumps({"a": bomb}))
    with pytest.raises(ValueError, match=r"bad\.pt cannot be read"):
        clip.load(path)
    assert not witness.exists()
    pickle.loads(pickle.dumps(bomb))  # the bomb is live
    assert witness.exists()


@pytest.mark.parametrize("size", [3, 5], ids=["short", "long"])
def test_archive_whose_tensors_are_not_the_bytes_they_say_is_refused(size, openai, tmp_path):
    path = rewritten(openai[0], tmp_path / "bad.pt", lambda n, data: b"x" * size if n.endswith("/data/0") else data)
    with pytest.raises(ValueError, match=r"bad\.pt cannot be read.*tensor 0"):
        clip.load(path)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_models_come_back_bit_for_bit(kind, tmp_path):
    model = small(kind)
    clip.save(model, tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    for path in (tmp_path / "model", tmp_path / "model" / "model.safetensors"):
        found = clip.load(path)
        assert found.config == model.config and not found.training
        assert_same_model(found, model)
    model.eval()
    inputs = batch(model.config)
    assert all(torch.equal(a, b) for a, b in zip(found(*inputs), model(*inputs), strict=True))


def test_folder_written_before_there_were_kinds_still_loads(tmp_path):
    model = small("glyph")
    clip.save(model, tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    del values["image"]["kind"], values["text"]["kind"], values["init_bias"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert_same_model(clip.load(tmp_path), model)


def test_loaded_weights_do_not_hang_on_the_file(tmp_path):
    model = small("vit")
    clip.save(model, tmp_path / "model")
    found = clip.load(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    path.write_bytes(b"\0" * path.stat().st_size)
    shutil.rmtree(tmp_path / "model")
    assert_same_model(found, model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_precision_is_as_asked_but_for_the_scale(dtype, tmp_path):
    model = clip.Clip(clip.ClipConfig(24, CONFIGS["resnet"].image, CONFIGS["resnet"].text, init_bias=-10.1))
    clip.save(model, tmp_path)
    found = clip.load(tmp_path, dtype=dtype)
    for name, tensor in found.state_dict().items():
        scalar = name in ("log_scale", "logit_bias")
        assert not tensor.is_floating_point() or tensor.dtype == (torch.float32 if scalar else dtype), name
    assert torch.equal(found.log_scale, model.log_scale) and torch.equal(found.logit_bias, model.logit_bias)
    assert all(parameter.requires_grad for parameter in found.parameters())


def test_loaded_resnets_are_channels_last(tmp_path):
    clip.save(small("resnet"), tmp_path)
    weight = clip.load(tmp_path, dtype=torch.bfloat16).image.layer1[0].conv2.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


def test_a_mismatch_lists_every_name_and_shape(tmp_path):
    state = clip.export_openclip(small("vit"))
    del state["visual.proj"], state["transformer.resblocks.1.ln_2.bias"]
    state["visual.ln_pre.gamma"] = torch.zeros(3)
    state["visual.ln_post.weight"] = torch.zeros(5)
    torch.save(state, tmp_path / "m.pt")
    with pytest.raises(clip.CheckpointMismatchError) as caught:
        clip.load(tmp_path / "m.pt")
    error = caught.value
    assert isinstance(error, ValueError)
    assert sorted(error.missing) == ["transformer.resblocks.1.ln_2.bias", "visual.proj"]
    assert error.unexpected == ["visual.ln_pre.gamma"]
    assert error.shapes == {"visual.ln_post.weight": ((5,), (128,))}
    for part in ("m.pt", *error.missing, *error.unexpected, "visual.ln_post.weight [5] instead of [128]"):
        assert part in str(error)


def test_a_checkpoint_of_another_model_than_the_named_one_is_a_mismatch(tmp_path):
    clip.save(small("vit"), tmp_path / "ours")
    torch.save(clip.export_openclip(small("vit")), tmp_path / "theirs.pt")
    for path, name in (("ours", "image.blocks.2.mlp.0.bias"), ("theirs.pt", "visual.transformer.resblocks.2")):
        with pytest.raises(clip.CheckpointMismatchError, match=r"and \d+ more") as caught:
            clip.load(tmp_path / path, name="ViT-B/32")
        assert any(missing.startswith(name) for missing in caught.value.missing)
        assert len(caught.value.shapes) > 12
    with pytest.raises(ValueError, match="no model named"):
        clip.load(tmp_path / "ours", name="ViT-B/33")


def test_the_named_model_is_taken_and_its_name_may_ask_for_quick_gelu(tmp_path):
    model = clip.create_model("ViT-Ti/4@32px-quickgelu", vocabulary=60)
    clip.save(clip.create_model("glyph-conv"), tmp_path / "glyph")
    torch.save(clip.export_openclip(clip.create_model("RN-Ti@64px")), tmp_path / "theirs.pt")
    assert clip.load(tmp_path / "glyph", name="glyph-conv").config == clip.model_config("glyph-conv")
    for name, quick in (("RN-Ti@64px", False), ("RN-Ti-64-quickgelu", True)):
        assert clip.load(tmp_path / "theirs.pt", name=name).config == clip.model_config(name)
        assert clip.load(tmp_path / "theirs.pt", name=name).config.text.quick_gelu == quick
    # The file of a configuration knows: its word counts, not the name's.
    clip.save(model, tmp_path / "quick")
    assert clip.load(tmp_path / "quick").config.text.quick_gelu
    assert not clip.load(tmp_path / "quick", quick_gelu=False).config.image.quick_gelu


def test_patch_dropout_may_be_set_on_loading(tmp_path):
    clip.save(small("vit"), tmp_path)
    model = clip.load(tmp_path, patch_dropout=0.5)
    assert model.image.config.patch_dropout == model.config.image.patch_dropout == 0.5


def test_a_configuration_that_is_not_the_weights_is_a_mismatch(tmp_path):
    clip.save(small("vit"), tmp_path)
    values = CONFIGS["vit"].to_dict()
    values["image"]["layers"] = 3
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(clip.CheckpointMismatchError, match=r"image\.blocks\.2"):
        clip.load(tmp_path)


@pytest.mark.parametrize("form", ["safetensors", "torch.save", "archive"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999], ids=["empty", "head", "half", "tail"])
def test_truncated_files_are_named(form, share, openai, tmp_path):
    path = tmp_path / "model.safetensors"
    if form == "safetensors":
        clip.save(small("vit"), tmp_path)
    else:
        path = tmp_path / "cut.pt"
        shutil.copy(openai[0 if form == "archive" else 1], path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match=f"{path.name} cannot be read as a checkpoint: "):
        clip.load(path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "config.json"),
        ("[]", "holds no checkpoint"),
        ('{"image": {}, "text": {"heads": 3}}', "config.json.*heads"),
        ('{"image": {"kind": "mlp"}, "text": {}}', "config.json.*mlp"),
        ('{"image": {}}', "config.json.*text"),
        ('{"model_type": "bert"}', "config.json.*bert"),
        (None, "holds no checkpoint"),
    ],
    ids=["cut", "list", "field", "kind", "missing", "bert", "none"],
)
def test_bad_configurations_are_named(config, message, tmp_path):
    clip.save(small("glyph"), tmp_path)
    (tmp_path / "config.json").unlink()
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=message):
        clip.load(tmp_path)


def test_what_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.pt"):
        clip.load(tmp_path / "nothing.pt")
    with pytest.raises(ValueError, match=r"holds no checkpoint.*open_clip_config\.json"):
        clip.load(tmp_path)
    for value, message in (
        ({"weight": torch.zeros(2)}, "known layout; it has weight"),
        ([torch.zeros(2)], "no state dict"),
        ({"epoch": 3}, "no state dict"),
        ({}, "known layout"),
    ):
        torch.save(value, tmp_path / "other.pt")
        with pytest.raises(ValueError, match=message):
            clip.load(tmp_path / "other.pt")
    torch.save(small("vit").state_dict(), tmp_path / "alone.pt")
    with pytest.raises(ValueError, match=r"config\.json must be in the same folder"):
        clip.load(tmp_path / "alone.pt")
    state = clip.export_openclip(small("vit"))
    torch.save({"token_embedding.weight": state["token_embedding.weight"]}, tmp_path / "part.pt")
    with pytest.raises(ValueError, match="cannot be read off"):
        clip.load(tmp_path / "part.pt")


def test_the_glyph_tower_has_one_size(tmp_path):
    clip.save(small("glyph"), tmp_path)
    with pytest.raises(ValueError, match="20 pixels only"):
        clip.load(tmp_path, image_size=40)
