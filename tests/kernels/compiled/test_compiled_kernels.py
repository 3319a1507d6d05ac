"""Every Triton kernel with every setting that ships, compiled for chips that need not be here (kernels/shipped.py)."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from fastclip.kernels import report
from fastclip.kernels.configs import CHIPS, PRODUCTS, built_in
from fastclip.kernels.shipped import LINEAR, SHARED_LIMIT, TILED, cases, compile_case

CASES = cases()
# What a tensor-core product is called in each chip's machine code.
TENSOR_CORE = {"sm_80": ("HMMA",), "sm_90": ("HGMMA",), "sm_100": ("UTCHMMA", "UTCQMMA")}


@pytest.fixture(scope="module")
def built():
    """Case -> a future of what ptxas made of it. Spawned processes: Triton's compiler does not survive a fork."""
    with ProcessPoolExecutor(min(4, os.cpu_count()), multiprocessing.get_context("spawn")) as pool:
        yield {case: pool.submit(compile_case, case) for case in CASES}


def test_all_kernels_ship_for_all_chips_and_products():
    assert len(CASES) == len(TILED) * len(CHIPS) * len(PRODUCTS) + len(LINEAR) * len(CHIPS)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fits_the_chip(built, case):
    result = built[case].result()
    assert result.stack == 0 and not result.sass["STL"] and not result.sass["LDL"], "registers spill"
    assert result.shared <= SHARED_LIMIT[case.chip]
    numbers = dict(case.numbers)
    assert result.registers * 32 * numbers.get("num_warps", 4) <= 65536
    found = [code for codes in TENSOR_CORE.values() for code in codes if result.sass[code]]
    if "BM" not in numbers or case.product == "ieee":
        assert not found, "IEEE products must not round their factors"
    else:
        assert found and set(found) <= set(TENSOR_CORE[case.chip])
        assert ("wgmma.mma_async" in result.ptx) == (case.chip == "sm_90")


@pytest.mark.parametrize("chip", CHIPS)
def test_ranks_compare_tiles_of_one_shape(chip):
    for product in PRODUCTS:
        tiles = built_in("ranks", chip, product)
        assert tiles.BN == tiles.BM


def test_double_precision_constants_are_double(built):
    # log2(e) as a float32 would put 1e-8 of the scale into every exponent.
    case = next(case for case in CASES if case.kernel == "shift_kernel")
    assert "0d3FF71547652B82FE" in built[case].result().ptx


def test_report_names_what_it_counts(built):
    case = next(case for case in CASES if str(case) == "sums_kernel-half-sm_90")
    line = report.line(built[case].result())
    assert line.split()[:4] == ["sums_kernel", "sm_90", "half", "128x128x64"]
