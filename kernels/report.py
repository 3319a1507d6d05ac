"""`python -m fastclip.kernels.report [words]`: registers, spills, shared memory and instructions of what ships.

Prints one line for every case whose name holds all the words, such as `sums_kernel sm_90 half`. No GPU is needed.
"""

import argparse
import os
from concurrent.futures import ProcessPoolExecutor

from fastclip.kernels.shipped import Built, cases, compile_case

# Column -> opcodes counted in it. Tensor-core products are HGMMA on sm_90, HMMA on sm_80, UTC*MMA on sm_100.
COLUMNS = {
    "MMA": ("HGMMA", "HMMA", "UTCHMMA", "UTCQMMA", "UTCMMA"),
    "FFMA": ("FFMA",),
    "EX2": ("MUFU.EX2",),
    "SHFL": ("SHFL",),
    "LDGSTS": ("LDGSTS",),
    "spills": ("STL", "LDL"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="print only cases whose name holds all of these")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile")
    args = parser.parse_args()
    wanted = [case for case in cases() if all(word in str(case) for word in args.words)]
    print(f"{'kernel':28s} {'chip':7s} {'product':8s} {'tile':>14s} {'warps':>5s} {'stages':>6s}", end="")
    print(f" {'regs':>5s} {'stack':>6s} {'shared':>7s}" + "".join(f" {name:>7s}" for name in COLUMNS))
    with ProcessPoolExecutor(args.jobs) as pool:
        for built in pool.map(compile_case, wanted):
            print(line(built), flush=True)


def line(built: Built) -> str:
    """One row of the table."""
    case, numbers = built.case, dict(built.case.numbers)
    tile = "x".join(str(numbers[name]) for name in ("BN", "BM", "BD") if name in numbers)
    counts = "".join(f" {sum(built.sass[code] for code in codes):7d}" for codes in COLUMNS.values())
    options = f"{numbers.get('num_warps', 4):5d} {numbers.get('num_stages', 3):6d}"
    return (
        f"{case.kernel:28s} {case.chip:7s} {case.product:8s} {tile:>14s} {options}"
        f" {built.registers:5d} {built.stack:6d} {built.shared:7d}{counts}"
    )


if __name__ == "__main__":
    main()
