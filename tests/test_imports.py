"""The layering of design: imports go one way, and what is optional is imported when it is first needed.

cli -> commands -> train -> {clip, data, evaluate, modules, loss, distributed, grad_cache, metrics} -> ops -> backends
-> {kernels, checks}
"""

import ast
from pathlib import Path

import pytest
from cases import run_python

import fastclip

PACKAGE = Path(fastclip.__file__).parent
KERNELS = PACKAGE.parent / "kernels"

# Each part may import from its own level and from those below it.
LEVELS = {
    "__main__": 8,
    "cli": 7,
    "commands": 6,
    "benchmarks": 6,
    "train": 5,
    "evaluate": 4,
    "env": 5,
    "plan": 5,
    "tune": 5,
    "integrations": 5,
    "": 4,  # fastclip itself: the public names
    "clip": 4,
    "data": 4,
    "grad_cache": 4,
    "modules": 4,
    "distributed": 3,
    "loss": 3,
    "distill": 3,
    "softmax": 3,
    "agreement": 3,
    "metrics": 3,
    "ops": 2,
    "sigmoid": 2,
    "plain": 2,
    "registry": 2,
    "backends": 1,
    "errors": 0,
    "checks": 0,  # no import of its own: every level may use it
    "kernels": 0,
    "reference": 0,
}
# Needed by some users only, or slow to import.
OPTIONAL = (
    "triton",
    "matplotlib",
    "sklearn",
    "tyro",
    "tokenizers",
    "safetensors",
    "PIL",
    "tqdm",
    "torchvision",
    "webdataset",
    "tensorboard",
    "datasets",
    "pyarrow",
    "fsspec",
)
LAZY = {
    "cli",
    "commands",
    "evaluate",
    "__main__",
    "clip",
    "data",
    "train",
    "integrations",
    "kernels",
}  # parts that may import them at the top


def part_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def sources() -> list[tuple[str, Path]]:
    found = []
    for path in sorted([*PACKAGE.rglob("*.py"), *KERNELS.glob("*.py")]):
        root, prefix = (PACKAGE, "fastclip") if PACKAGE in path.parents else (KERNELS, "fastclip.kernels")
        names = [*prefix.split("."), *path.relative_to(root).with_suffix("").parts]
        found.append((".".join(names).removesuffix(".__init__"), path))
    return found


each_file = pytest.mark.parametrize(("module", "path"), sources(), ids=[module for module, _ in sources()])


def imports(path: Path, *, only_top: bool = False):
    """Absolute names of the modules a file imports; only_top leaves out those inside functions."""
    tree = ast.parse(path.read_text())
    inside = {id(node) for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.Lambda)) for node in ast.walk(f)}
    for node in ast.walk(tree):
        if only_top and id(node) in inside:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "fastclip":
                yield from (f"fastclip.{alias.name}" if is_module(alias.name) else "fastclip" for alias in node.names)
            else:
                yield node.module


def is_module(name: str) -> bool:
    return (PACKAGE / f"{name}.py").exists() or (PACKAGE / name).is_dir() or name == "kernels"


@each_file
def test_nothing_imports_what_is_above_it(module, path):
    here = part_of(module)
    assert here in LEVELS, f"a new part of fastclip: give {here} a level"
    for name in imports(path):
        if name == "fastclip" or name.startswith("fastclip."):
            there = part_of(name)
            assert LEVELS[there] <= LEVELS[here], f"{module} imports {name}, which is above it"


@each_file
def test_optional_packages_are_imported_where_they_are_used(module, path):
    if part_of(module) in LAZY:
        return
    for name in imports(path, only_top=True):
        assert name.split(".")[0] not in OPTIONAL, f"{module} imports {name} at its top"
        assert not name.startswith("fastclip.kernels"), f"{module} imports Triton kernels at its top"


def test_importing_fastclip_imports_nothing_optional():
    code = f"""
import sys, torch
before = set(sys.modules)
import fastclip
new = {{name.split(".")[0] for name in set(sys.modules) - before}}
assert not new & set({OPTIONAL!r}), new
assert "fastclip.clip" not in sys.modules and "fastclip.backends.triton" not in sys.modules
x = torch.eye(3)
fastclip.clip_loss(x, x, 1.0, backend="eager")
assert "fastclip.backends.triton" not in sys.modules
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
