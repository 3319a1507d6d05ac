"""Every tile number, and nothing else: settings keyed by kernel, chip, product and width, and the workspace.

A user's own table, written by `fastclip tune`, comes first; the built-in one is second. Nothing is measured here.
"""

import contextlib
import functools
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

DEFAULT_WORKSPACE_MIB = 512


@dataclass(frozen=True)
class Tiles:
    """BN x BM entries of S a program, BD elements of the width a step, GROUP row tiles walking together."""

    BN: int
    BM: int
    BD: int
    GROUP: int
    warps: int
    stages: int

    def launch(self) -> dict[str, int]:
        """Keyword arguments of a launch."""
        tile = {"BN": self.BN, "BM": self.BM, "BD": self.BD, "GROUP": self.GROUP}
        return {**tile, "num_warps": self.warps, "num_stages": self.stages}

    def count(self, rows: int, columns: int) -> int:
        """Tiles of rows x columns entries."""
        return -(-rows // self.BN) * -(-columns // self.BM)


# product: "half" (float16 and bfloat16), "tf32", "ieee" (both float32). The kernels that walk all tiles of S.
KERNELS = (
    "sums", "exact", "gradient", "gradient_own", "ranks", "masked", "sigmoid", "sigmoid_gradient",
)  # fmt: skip
PRODUCTS = ("half", "tf32", "ieee")
# chip: sm_80 stands for every chip but the two data centre families after it; its tiles fit 99 KiB of shared memory.
CHIPS = ("sm_80", "sm_90", "sm_100")

_HALF = Tiles(BN=128, BM=128, BD=64, GROUP=16, warps=8, stages=3)
_TF32 = Tiles(BN=128, BM=128, BD=32, GROUP=16, warps=8, stages=3)
_IEEE = Tiles(BN=64, BM=64, BD=16, GROUP=16, warps=4, stages=2)
# The kernels with long epilogues: half the entries a thread, so that their registers hold them.
_HALF_LEAN = Tiles(BN=128, BM=64, BD=64, GROUP=16, warps=8, stages=3)
_TF32_LEAN = Tiles(BN=128, BM=64, BD=32, GROUP=16, warps=8, stages=3)
# Four warps a program and two programs a multiprocessor: one's exp runs beside the other's products.
_HALF_PAIRED = Tiles(BN=128, BM=128, BD=64, GROUP=16, warps=4, stages=3)

# (kernel, chip, product) -> tiles; "*" fits all. `built_in` says which entry wins.
BUILT_IN: dict[tuple[str, str, str], Tiles] = {
    ("*", "*", "half"): _HALF,
    ("*", "*", "tf32"): _TF32,
    ("*", "*", "ieee"): _IEEE,
    ("sums", "sm_90", "half"): _HALF_PAIRED,
    ("gradient", "sm_90", "half"): _HALF_PAIRED,
    ("masked", "sm_100", "half"): Tiles(BN=64, BM=64, BD=64, GROUP=16, warps=8, stages=3),
    ("masked", "sm_100", "tf32"): Tiles(BN=64, BM=64, BD=32, GROUP=16, warps=8, stages=3),
    **{
        (kernel, "*", product): lean
        for kernel in ("exact", "gradient_own", "masked", "sigmoid_gradient")
        for product, lean in (("half", _HALF_LEAN), ("tf32", _TF32_LEAN))
    },
}


def choose(kernel: str, x: Tensor, precision: str, rows: int) -> Tiles:
    """The tiles of `kernel` for operands like x [*, DP] and a batch of `rows`."""
    assert kernel in KERNELS
    if kernel in _forced:
        return _forced[kernel]
    product = product_of(x.dtype, precision)
    chip = chip_of(x.device)
    own = user_table().get(user_key(kernel, chip, product, x.shape[1], rows))
    return own or built_in(kernel, chip, product)


_forced: dict[str, Tiles] = {}


@contextlib.contextmanager
def forced(kernel: str, tiles: Tiles) -> Iterator[None]:
    """Within the block `kernel` takes these tiles, whatever the tables say: for measuring."""
    before = dict(_forced)
    _forced[kernel] = tiles
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def built_in(kernel: str, chip: str, product: str) -> Tiles:
    """The shipped tiles."""
    for key in ((kernel, chip, product), ("*", chip, product), (kernel, "*", product)):
        if key in BUILT_IN:
            return BUILT_IN[key]
    return BUILT_IN["*", "*", product]


def product_of(dtype: torch.dtype, precision: str) -> str:
    return precision if dtype == torch.float32 else "half"


@functools.cache
def chip_of(device: torch.device) -> str:
    """The entry of CHIPS whose tiles a device gets."""
    if device.type != "cuda" or torch.version.hip:
        return "sm_80"
    return {9: "sm_90", 10: "sm_100"}.get(torch.cuda.get_device_capability(device)[0], "sm_80")


def user_key(kernel: str, chip: str, product: str, width: int, rows: int) -> str:
    """kernel/chip/product/D/N: D rounded up to 128, N to a power of two between 4,096 and 131,072."""
    bucket = min(max(1 << (rows - 1).bit_length(), 4096), 131072)
    return f"{kernel}/{chip}/{product}/D{-(-width // 128) * 128}/N{bucket}"


def user_file() -> Path:
    """$FASTCLIP_TUNE_FILE, or ~/.config/fastclip/tiles.json."""
    named = os.environ.get("FASTCLIP_TUNE_FILE")
    return Path(named) if named else Path.home() / ".config" / "fastclip" / "tiles.json"


@functools.cache
def user_table() -> dict[str, Tiles]:
    """The user's table, read once a process; empty where there is none. ValueError for a file that is not one."""
    path = user_file()
    if not path.is_file():
        return {}
    try:
        entries = json.loads(path.read_text())["tiles"]
        return {key: Tiles(**{field.name: int(entry[field.name]) for field in fields(Tiles)})
                for key, entry in entries.items()}  # fmt: skip
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a table of `fastclip tune`: {error!r}. Delete it or tune again") from error


def save_user_table(entries: dict[str, Tiles], machine: str) -> Path:
    """Add the entries to the user's table; returns the file."""
    path = user_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    merged = {**user_table(), **entries}
    text = json.dumps({"machine": machine, "tiles": {k: asdict(v) for k, v in sorted(merged.items())}}, indent=1)
    path.with_suffix(".new").write_text(text + "\n")
    path.with_suffix(".new").replace(path)
    user_table.cache_clear()
    return path


def workspace() -> int:
    """Bytes of scratch memory a call may hold beyond operands and results: $FASTCLIP_WORKSPACE_MIB, 512 by default."""
    return int(os.environ.get("FASTCLIP_WORKSPACE_MIB", DEFAULT_WORKSPACE_MIB)) * 2**20


def partial_rows(tiles: Tiles, columns: int, workspace: int) -> int:
    """Rows of a forward group, so that a group's partial sums, 4 bytes x rows x columns x (1/BN + 1/BM), fit."""
    per_row = 4 * columns * (1 / tiles.BN + 1 / tiles.BM)
    unit = tiles.BN * tiles.GROUP
    return max(1, int(workspace / per_row) // unit) * unit


def wave(rows: int, columns: int, width: int, element_size: int, workspace: int) -> tuple[int, int]:
    """Rows and columns of one block of G, rows x columns x element_size <= workspace (at least 256 x 256).

    About 4.2M / D rows fill a large GPU with the tiles of dx = G y~; then as many columns as fit. Both are multiples of
    256, room for whole tiles.
    """
    step_n = min(max(256, 2**22 // width // 256 * 256), -(-rows // 256) * 256)
    step_m = max(256, workspace // (step_n * element_size) // 256 * 256)
    return step_n, min(step_m, -(-columns // 256) * 256)


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU: programs of a kernel that loops over tiles."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
