"""The choice of backends, and what a machine without the extension sees."""

import importlib.machinery

import pytest
import torch
from cases import features, run_python

import fastclip
from fastclip import available_backends, backends, clip_loss, set_backend
from fastclip.backends import cpu


@pytest.fixture(autouse=True)
def automatic_choice():
    yield
    set_backend(None)


def chosen(x, name=""):
    return backends.choose(x, name).__name__.rpartition(".")[2]


def test_eager_serves_everywhere():
    assert available_backends()[-1] == "eager"
    assert set(available_backends()) <= set(backends.NAMES)


def test_the_first_that_can_is_chosen():
    x = torch.randn(3, 2)
    assert chosen(x) == available_backends(x)[0]
    assert chosen(x, "eager") == "eager"


def test_set_backend_and_back():
    x = torch.randn(3, 2)
    set_backend("eager")
    assert chosen(x) == "eager"
    assert chosen(x, available_backends()[0]) == available_backends()[0]  # a call's own wish goes first
    set_backend(None)
    assert chosen(x) == available_backends(x)[0]


def test_unknown_backends_are_refused():
    for ask in (lambda: set_backend("gpu"), lambda: clip_loss(torch.ones(2, 2), torch.ones(2, 2), 1.0, backend="gpu")):
        with pytest.raises(ValueError, match=r"backend must be one of .*cpu, eager or None, got 'gpu'"):
            ask()


def test_a_named_backend_that_cannot_run_these_tensors_says_why():
    x = torch.ones(2, 2, device="meta")
    with pytest.raises(RuntimeError, match="backend 'cpu' cannot run this: it runs on CPU tensors, got meta"):
        backends.choose(x, "cpu")


@pytest.fixture
def no_extension(monkeypatch):
    """As if the install had found no compiler."""
    monkeypatch.setattr(importlib.machinery.PathFinder, "find_spec", lambda *args, **options: None)
    cpu._load_error.cache_clear()
    yield
    monkeypatch.undo()
    cpu._load_error.cache_clear()


def test_without_the_extension_eager_takes_over(no_extension):
    assert "was not built" in cpu.why_not(None)
    assert "cpu" not in available_backends()
    assert "cpu" in backends.report() and "was not built" in backends.report()
    image, text = features(9, 4, "eager")
    backends._warn_once.cache_clear()
    with pytest.warns(UserWarning, match=r"backend 'cpu' cannot run here .*was not built.*; using 'eager'"):
        assert chosen(image) == "eager"
    # Said once: from here on a warning would be an error.
    assert torch.equal(clip_loss(image, text, 5.0), clip_loss(image, text, 5.0, backend="eager"))


def test_without_the_extension_asking_for_it_raises_with_the_reason(no_extension):
    x = torch.ones(2, 2)
    with pytest.raises(RuntimeError, match=r"backend 'cpu' cannot run this: the extension fastclip\._C was not built"):
        clip_loss(x, x, 1.0, backend="cpu")
    with pytest.raises(RuntimeError, match="was not built"):
        set_backend("cpu")


def test_one_warning_names_the_fallback():
    code = """
import importlib.machinery, warnings, torch
importlib.machinery.PathFinder.find_spec, plain = (
    lambda name, *args: None if name == "_C" else plain(name, *args)), importlib.machinery.PathFinder.find_spec
from fastclip import clip_loss
x = torch.eye(3)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for _ in range(3):
        clip_loss(x, x, 1.0)
said = [str(w.message) for w in seen if "eager" in str(w.message)]
assert len(said) == 1, [str(w.message) for w in seen]
assert "was not built" in said[0], said
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_a_broken_extension_is_a_reason_and_no_crash(tmp_path, monkeypatch):
    broken = tmp_path / ("_C" + importlib.machinery.EXTENSION_SUFFIXES[0])
    broken.write_bytes(b"not a shared library")
    spec = importlib.machinery.ModuleSpec("_C", None, origin=str(broken))
    monkeypatch.setattr(importlib.machinery.PathFinder, "find_spec", lambda *args, **options: spec)
    cpu._load_error.cache_clear()
    try:
        assert "does not load" in cpu.why_not(None)
    finally:
        monkeypatch.undo()
        cpu._load_error.cache_clear()


def test_report_has_a_line_for_every_backend():
    lines = backends.report().splitlines()
    assert [line.split()[0] for line in lines] == list(backends.NAMES)
    assert all((" yes: " in line) != (" no: " in line) for line in lines)


def test_public_names_exist():
    assert fastclip.__version__.count(".") == 2
    for name in fastclip.__all__:
        assert getattr(fastclip, name).__doc__
