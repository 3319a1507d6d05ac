"""Builds fastclip, and beside it fastclip._C, the CPU kernels, where torch and a C++ compiler are at hand.

Without them the install succeeds all the same: the `eager` backend serves, and `fastclip env` says what is missing.
FASTCLIP_CPU=0 skips the extension, FASTCLIP_CPU=1 makes a failure to build it an error.
"""

import os
import platform
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext as plain_build_ext

WISH = os.environ.get("FASTCLIP_CPU", "")
FLAGS = ["-O3", "-std=c++17", "-ffp-contract=fast", "-DTORCH_TARGET_VERSION=0x020a000000000000"]  # torch 2.10's ABI
NOTE = "_C_missing.txt"  # the reason, where the extension is missing; backends/cpu.py shows it

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    BuildExtension, CppExtension = plain_build_ext, None


class BuildOrExplain(BuildExtension):
    """Builds the extension; if that fails, leaves a note with the reason instead of failing the install."""

    def run(self):
        package = Path("fastclip") if self.editable_mode or self.inplace else Path(self.build_lib, "fastclip")
        (package / NOTE).unlink(missing_ok=True)
        try:
            super().run()
        except Exception as error:
            if WISH == "1":
                raise
            reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
            print(f"fastclip: the CPU kernels were not built ({reason}); the eager backend serves", file=sys.stderr)
            package.mkdir(parents=True, exist_ok=True)
            (package / NOTE).write_text(reason)
            self.extensions = []


def extensions():
    if WISH == "0" or CppExtension is None:
        if WISH == "1":
            raise RuntimeError("FASTCLIP_CPU=1 needs torch at build time: install torch, then pip --no-build-isolation")
        print("fastclip: torch is not importable here, or FASTCLIP_CPU=0: no CPU kernels are built", file=sys.stderr)
        return []
    # Each isa_*.cpp sets its own target, so that one binary holds all of them and chooses at run time.
    isas = ["avx512_bf16", "avx512", "avx2", "baseline"] if platform.machine() in ("x86_64", "AMD64") else ["baseline"]
    return [
        CppExtension(
            "fastclip._C",
            ["csrc/cpu/ops.cpp", *(f"csrc/cpu/isa_{isa}.cpp" for isa in isas)],
            extra_compile_args={"cxx": FLAGS},
            py_limited_api=True,
        )
    ]


setup(
    packages=[
        "fastclip",
        "fastclip.backends",
        "fastclip.clip",
        "fastclip.commands",
        "fastclip.data",
        "fastclip.distributed",
        "fastclip.evaluate",
        "fastclip.grad_cache",
        "fastclip.integrations",
        "fastclip.plan",
        "fastclip.train",
        "fastclip.kernels",
        "fastclip.benchmarks",
    ],
    package_dir={"fastclip": "fastclip", "fastclip.kernels": "kernels", "fastclip.benchmarks": "benchmarks"},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildOrExplain},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
