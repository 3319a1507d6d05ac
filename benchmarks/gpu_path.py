"""Prints a folder from which `fastclip` and `benchmarks` import without an install: links into this checkout.

    PYTHONSAFEPATH=1 PYTHONPATH=$(python3 benchmarks/gpu_path.py) python3 -m benchmarks.gpu

kernels/ and benchmarks/ are the packages fastclip.kernels and fastclip.benchmarks, which a plain checkout does not show
(setup.py's package_dir does).
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def linked() -> Path:
    """build/gpu with fastclip/*, fastclip/kernels, fastclip/benchmarks and benchmarks, made anew."""
    folder = ROOT / "build" / "gpu"
    package = folder / "fastclip"
    package.mkdir(parents=True, exist_ok=True)
    wanted = {package / source.name: source for source in (ROOT / "fastclip").iterdir()}
    wanted |= {package / name: ROOT / name for name in ("kernels", "benchmarks")}
    wanted[folder / "benchmarks"] = ROOT / "benchmarks"
    for link in (*package.iterdir(), folder / "benchmarks"):
        if link.is_symlink():
            link.unlink()
    for link, source in wanted.items():
        link.symlink_to(source)
    return folder


if __name__ == "__main__":
    print(linked())
