"""Every kernel with every setting that ships, compiled ahead of time for a chip that need not be here.

A Case names a kernel, a chip and the numbers it is compiled with; `compile_case` gives what ptxas made of it. Needs
Triton's own ptxas and nvdisasm, no GPU.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastclip.kernels import (
    configs,
    exact,
    finish,
    forward,
    gradient,
    masked,
    operands,
    ranks,
    sigmoid,
)

SHARED_LIMIT = {"sm_80": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}  # bytes a block may have

# kernel -> the row of configs.KERNELS that it takes its tiles from
TILED = {
    forward.sums_kernel: "sums",
    exact.exact_sums_kernel: "exact",
    exact.exact_masked_sums_kernel: "exact",
    gradient.gradient_kernel: "gradient",
    gradient.gradient_own_shifts_kernel: "gradient_own",
    ranks.scores_kernel: "ranks",
    ranks.count_kernel: "ranks",
    masked.masked_sums_kernel: "masked",
    masked.masked_gradient_kernel: "masked",
    sigmoid.sigmoid_kernel: "sigmoid",
    sigmoid.sigmoid_gradient_kernel: "sigmoid_gradient",
    sigmoid.matched_sigmoid_kernel: "sigmoid",
    sigmoid.matched_sigmoid_gradient_kernel: "sigmoid_gradient",
}
# The kernels that do O(N D) or O(N) work: their numbers are fixed where they are launched.
LINEAR = {
    operands.normalize_kernel: {"stride_d": 1, "EPS": operands.EPS, "BN": 8, "BD": 512, "num_warps": 8},
    forward.shift_kernel: {"BLOCK": 8 * forward.BLOCK, "num_warps": 8},
    forward.combine_kernel: {"BT": 32, "BL": 64},
    forward.settle_kernel: {"BLOCK": forward.BLOCK},
    gradient.weights_kernel: {"BLOCK": gradient.BLOCK, "num_warps": 8},
    gradient.gain_kernel: {"num_warps": 1},
    finish.finish_rows_kernel: {"stride_d": 1, "BD": 512, "NORMALIZE": True, "EPS": operands.EPS},
    finish.finish_columns_kernel: {"stride_d": 1, "BD": 512, "NORMALIZE": True, "EPS": operands.EPS},
}
FEATURES = {"p_x", "p_y", "p_other", "p_g", "p_out"}
INT64 = {"p_positive", "p_row_key", "p_col_key", "p_order", "p_first"}
INT32 = {"p_flag", "p_row_code", "p_col_code", "p_row_count", "p_col_count"}
FLOAT = {"margin"}


@dataclass(frozen=True)
class Case:
    """product: an entry of configs.PRODUCTS. numbers: constexprs and launch options, as sorted items."""

    kernel: str
    chip: str
    product: str
    numbers: tuple[tuple[str, object], ...]

    def __str__(self) -> str:
        return f"{self.kernel}-{self.product}-{self.chip}"


@dataclass(frozen=True)
class Built:
    """What ptxas made of a case: registers a thread, bytes of stack and of shared memory, SASS opcodes, PTX."""

    case: Case
    registers: int
    stack: int
    shared: int
    sass: Counter
    ptx: str


def cases() -> list[Case]:
    """All of them: tiled kernels for every chip and product, linear ones for every chip."""
    tiled = [
        Case(kernel.__name__, chip, product, _tile_numbers(kernel, row, chip, product))
        for chip in configs.CHIPS
        for product in configs.PRODUCTS
        for kernel, row in TILED.items()
    ]
    linear = [
        Case(kernel.__name__, chip, "half", tuple(sorted(numbers.items())))
        for chip in configs.CHIPS
        for kernel, numbers in LINEAR.items()
    ]
    return tiled + linear


def compile_case(case: Case) -> Built:
    """Compile for the case's chip (from Triton's cache where it has been compiled before)."""
    kernel = next(kernel for kernel in (*TILED, *LINEAR) if kernel.__name__ == case.kernel)
    numbers = dict(case.numbers)
    options = {name: numbers.pop(name) for name in ("num_warps", "num_stages") if name in numbers}
    constants = {name: numbers[name] for name in kernel.arg_names if name in numbers}
    signature = {name: "constexpr" if name in constants else _type(name, case) for name in kernel.arg_names}
    aligned = [["tt.divisibility", 16]]
    attrs = {(i,): aligned for i, name in enumerate(kernel.arg_names) if name.startswith("p_") or name in ("ld", "DP")}
    source = ASTSource(kernel, signature, constants, attrs)
    target = GPUTarget("cuda", int(case.chip.removeprefix("sm_")), 32)
    compiled = triton.compile(source, target=target, options=options)
    registers, stack = _resources(compiled.asm["cubin"])
    return Built(case, registers, stack, compiled.metadata.shared, _opcodes(compiled.asm["cubin"]), compiled.asm["ptx"])


def _tile_numbers(kernel, row: str, chip: str, product: str) -> tuple[tuple[str, object], ...]:
    numbers = configs.built_in(row, chip, product).launch()
    numbers |= {"PRECISION": "ieee" if product == "ieee" else "tf32"}
    wanted = (*kernel.arg_names, "num_warps", "num_stages")
    return tuple(sorted((name, value) for name, value in numbers.items() if name in wanted))


def _type(name: str, case: Case) -> str:
    if name in FEATURES:
        return "*bf16" if case.product == "half" else "*fp32"
    if name in INT64:
        return "*i64"
    if name in INT32:
        return "*i32"
    if name.startswith("p_"):
        return "*fp32"
    if name in FLOAT:
        return "fp32"
    return "i64" if name.startswith("stride") else "i32"


def _resources(cubin: bytes) -> tuple[int, int]:
    text = _tool("cuobjdump", "-res-usage", cubin=cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2])


def _opcodes(cubin: bytes) -> Counter:
    """How often each SASS opcode occurs, without its modifiers, but for the special functions."""
    lines = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", _tool("nvdisasm", cubin=cubin))
    return Counter(line if line.startswith("MUFU") else line.split(".")[0] for line in lines)


def _tool(name: str, *arguments: str, cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, *arguments, file.name], capture_output=True, text=True, check=True).stdout
