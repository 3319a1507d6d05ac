"""Characters as pictures: what is rendered, how it is split and cached, and the batches drawn from it."""

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")

from fastclip.data import cache as cache_module
from fastclip.data import glyphs as glyphs_module
from fastclip.data.augment import Augment, coarsen
from fastclip.data.digits import load_digit_scans
from fastclip.data.glyphs import FACES, Glyphs, font_path, load_glyphs, render_face
from fastclip.data.pairs import UniqueCaptions, to_float

SMALL = ("DejaVuSansDisplay", "DejaVuSerifDisplay", "STIXGeneralItalic")


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Glyphs:
    return load_glyphs(24, SMALL, cache=tmp_path_factory.mktemp("glyphs"))


def same(a: Glyphs, b: Glyphs) -> bool:
    return a.fingerprint() == b.fingerprint()


def test_serif_has_over_3000_named_pictures_and_each_has_ink():
    images, names = render_face(font_path("DejaVuSerif"), 16)
    assert len(images) == len(names) == len(set(names)) > 3000
    assert images.dtype == np.uint8 and images.shape[1:] == (16, 16)
    assert images.reshape(len(images), -1).max(1).min() > 0
    assert "greek small letter alpha with tonos" in names


def test_every_face_is_in_matplotlibs_wheel():
    assert all(font_path(face).is_file() for face in FACES)
    assert len(set(FACES)) == 18


def test_case_and_position_stay_visible():
    images, names = render_face(font_path("DejaVuSans"), 32)
    picture = dict(zip(names, images, strict=True))
    rows = {
        name: np.flatnonzero(picture[name].max(1))
        for name in ("latin small letter x", "latin capital letter x", "superscript two", "subscript two")
    }
    assert np.ptp(rows["latin capital letter x"]) > np.ptp(rows["latin small letter x"])
    assert rows["superscript two"].mean() < rows["subscript two"].mean() - 4


def test_rendering_is_deterministic(small, tmp_path):
    assert same(small, load_glyphs(24, SMALL, cache=tmp_path))


def test_split_never_mixes_faces(small):
    training, held_out = small.split(["STIXGeneralItalic"])
    italic = small.faces.index("STIXGeneralItalic")
    assert len(training) + len(held_out) == len(small)
    assert set(held_out.face_of) == {italic}
    assert italic not in training.face_of and len(training) > 0
    with pytest.raises(ValueError, match="unknown face 'Comic'"):
        small.split(["Comic"])


def test_gallery_shows_the_chosen_face_and_every_other_name_once(small):
    shown = small.gallery(["DejaVuSerifDisplay"])
    chosen = small.faces.index("DejaVuSerifDisplay")
    assert (shown.face_of == chosen).sum() == (small.face_of == chosen).sum() > 0
    names, counts = np.unique(shown.name_of, return_counts=True)
    assert len(names) == len(small.names) and set(counts) == {1}
    assert not set(shown.name_of[shown.face_of != chosen]) & set(small.name_of[small.face_of == chosen])


def test_cache_is_used_keyed_by_settings_and_leaves_no_temporary_file(small, tmp_path, monkeypatch):
    load_glyphs(24, SMALL, cache=tmp_path)
    monkeypatch.setattr(glyphs_module, "render_face", lambda *_: pytest.fail("rendered although cached"))
    assert same(small, load_glyphs(24, SMALL, cache=tmp_path))
    monkeypatch.undo()
    load_glyphs(16, SMALL, cache=tmp_path)
    monkeypatch.setattr(glyphs_module, "version", lambda package: "another")
    load_glyphs(16, SMALL, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == len(list(tmp_path.glob("glyphs-*.npz"))) == 3


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage"])
def test_damaged_cache_is_rendered_anew(small, tmp_path, damage):
    load_glyphs(24, SMALL, cache=tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "garbage": b"x" * 100}[damage])
    assert same(small, load_glyphs(24, SMALL, cache=tmp_path))
    assert len(path.read_bytes()) == len(whole)


def test_unwritable_cache_is_done_without(small, tmp_path):
    (tmp_path / "file").touch()
    assert same(small, load_glyphs(24, SMALL, cache=tmp_path / "file"))


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTCLIP_CACHE", str(tmp_path / "own"))
    assert cache_module.cache_dir() == tmp_path / "own"
    monkeypatch.delenv("FASTCLIP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_module.cache_dir() == tmp_path / "fastclip"


def test_interrupted_write_keeps_the_previous_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def die(file):
        file.write(b"new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache_module.write_atomic(path, die)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_batches_have_unique_captions_and_pictures_of_their_names(small):
    training, _ = small.split(["DejaVuSerifDisplay"])
    batches = UniqueCaptions(training, 500, seed=3)
    images, names = batches.draw()
    assert images.shape == (500, 1, 24, 24) and images.dtype == torch.float32 and 0 <= images.min() < images.max() <= 1
    assert len(names.unique()) == 500
    pictures = {(int(n), image.tobytes()) for n, image in zip(training.name_of, training.images, strict=True)}
    assert all(
        (int(n), (255 * i[0]).round().byte().numpy().tobytes()) in pictures for n, i in zip(names, images, strict=True)
    )
    assert torch.equal(UniqueCaptions(training, 500, seed=3).draw()[1], names)
    assert not torch.equal(batches.draw()[1], names)


def test_batch_larger_than_the_names_is_refused(small):
    with pytest.raises(ValueError, match="5000 unique captions needs as many names"):
        UniqueCaptions(small, 5000, seed=0)


def test_augment_repeats_with_its_seed_changes_pictures_and_leaves_its_input(small):
    images = to_float(small.images[:64])
    before = images.clone()
    first, again = (Augment()(images, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, again) and torch.equal(images, before)
    assert first.shape == images.shape and first.isfinite().all()
    assert ((first - images).abs().amax((1, 2, 3)) > 0.05).all()


def test_augment_of_zero_strength_is_the_identity(small):
    images = to_float(small.images[:16])
    none = Augment(rotate=0, shear=0, scale=0, shift=0, warp=0, thicken=0, thin=0, coarse=0, noise=0)
    torch.testing.assert_close(none(images, torch.Generator()), images, atol=1e-4, rtol=0)


def test_coarsen_keeps_shape_and_mean():
    images = torch.rand(4, 1, 32, 32)
    assert coarsen(images).shape == images.shape
    torch.testing.assert_close(coarsen(images).mean(), images.mean(), atol=0.02, rtol=0)


def test_digit_scans_stand_where_a_printed_digit_stands():
    pytest.importorskip("sklearn")
    images, labels = load_digit_scans(32)
    assert images.shape == (1797, 1, 32, 32) and labels.unique().tolist() == list(range(10))
    glyphs, names = render_face(font_path("DejaVuSans"), 32)
    printed = np.flatnonzero(glyphs[names.index("digit eight")].max(1) > 64)
    written = np.flatnonzero(images[labels == 8].mean((0, 1)).amax(1) > 0.25)
    assert abs(printed[0] - written[0]) <= 3 and abs(printed[-1] - written[-1]) <= 3
