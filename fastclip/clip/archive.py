"""Tensors out of a TorchScript archive, without running what is in it.

OpenAI publishes its weights as TorchScript: a zip with the tensors' bytes, a pickle that says which tensor belongs to
which module, and source code, which torch.jit.load would compile and could run. Here the code is never opened. The
pickle is read by an unpickler that knows modules (as empty boxes), tensors, lists and dictionaries, and refuses every
other name.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

DTYPES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
}


def is_torchscript(path: Path) -> bool:
    """Whether the file is a zip with a constants table: torch.jit.save writes one, torch.save does not."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return _root(archive) is not None


def read_torchscript(path: Path) -> dict[str, torch.Tensor]:
    """Name -> tensor of every tensor the archive's modules hold, on the CPU.

    pickle.UnpicklingError for anything that is not a module, a tensor or plain data; other exceptions for a
    damaged file.
    """
    with zipfile.ZipFile(path) as archive:
        root = _root(archive)
        with archive.open(f"{root}/data.pkl") as file:
            module = _Unpickler(file, archive, root).load()
    return dict(_tensors(module, ""))


def _root(archive: zipfile.ZipFile) -> str | None:
    """The folder that everything in a TorchScript archive lies in."""
    paths = (name.split("/") for name in archive.namelist())
    return next((path[0] for path in paths if path[1:] == ["constants.pkl"]), None)


class _Unpickler(pickle.Unpickler):
    """Each one has classes of its own, so that what a pickle does to them ends with it."""

    def __init__(self, file: Any, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(file)
        self.archive = archive
        self.root = root
        self.module = type("Module", (), {})

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return self.module
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: torch.as_strided(storage, size, stride, offset)
        if module == "torch.jit._pickle":
            # Marks the type of a list or a dictionary, which torch's own functions of these names give back too.
            return lambda value, *_: value
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of a model's weights")

    def persistent_load(self, saved: Any) -> torch.Tensor:
        """The storage as a tensor [numel]. `saved`: ("storage", dtype, file name, device, numel)."""
        _, dtype, key, _, numel = saved
        entry = self.archive.getinfo(f"{self.root}/data/{key}")
        # Tensors are stored as they are; a compressed one could unfold to any size.
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != numel * dtype.itemsize:
            raise pickle.UnpicklingError(f"tensor {key} is not {numel} numbers of {dtype}")
        data = self.archive.read(entry)
        return torch.frombuffer(bytearray(data), dtype=dtype) if numel else torch.empty(0, dtype=dtype)


def _tensors(module: Any, prefix: str):
    for name, value in vars(module).items():
        if isinstance(value, torch.Tensor):
            yield prefix + name, value
        elif type(value) is type(module):
            yield from _tensors(value, f"{prefix}{name}.")
