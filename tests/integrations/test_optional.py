"""The libraries are optional: `import fastclip` needs none of them, and an integration says which one it misses."""

import importlib
import sys

import pytest
from cases import run_python

LIBRARIES = {
    "open_clip": "open_clip_torch",
    "transformers": "transformers",
    "sentence_transformers": "'sentence-transformers>=6.2'",
}


def test_import_fastclip_imports_none_of_them():
    done = run_python(f"import sys, fastclip; print([name for name in {list(LIBRARIES)} if name in sys.modules])")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_missing_library_is_named(name, monkeypatch):
    for module in [name, *(module for module in sys.modules if module.startswith(f"{name}."))]:
        monkeypatch.setitem(sys.modules, module, None)  # what Python takes for a module that is not there
    ours = f"fastclip.integrations.{name}"
    monkeypatch.delitem(sys.modules, ours, raising=False)
    with pytest.raises(ModuleNotFoundError, match=f"{ours} needs .*: pip install {LIBRARIES[name]}"):
        importlib.import_module(ours)
