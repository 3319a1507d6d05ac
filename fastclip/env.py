"""What `fastclip env` prints: versions, processor, threads, GPUs, and which backends can run here."""

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from fastclip import backends

PACKAGES = ("fastclip-loss", "torch", "triton", "numpy", "open_clip_torch", "transformers", "sentence-transformers")
FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "amx_bf16", "asimd", "bf16")


def report() -> str:
    """Several lines of text for a person, or for a bug report."""
    return "\n".join(
        [
            "Versions",
            f"  python                 {platform.python_version()} on {platform.system()} {platform.machine()}",
            *(f"  {name:22s} {_version(name)}" for name in PACKAGES),
            "Processor",
            f"  {processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used",
            f"  features: {' '.join(_features()) or 'unknown'}",
            "GPUs",
            *_gpus(),
            "Backends, fastest first",
            backends.report(),
        ]
    )


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _cpuinfo(field: str) -> str:
    path = Path("/proc/cpuinfo")
    match = re.search(rf"^{field}\s*:\s*(.*)$", path.read_text(), re.MULTILINE) if path.exists() else None
    return match[1] if match else ""


def processor() -> str:
    """The processor's name, for a results file."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _features() -> list[str]:
    flags = set((_cpuinfo("flags") or _cpuinfo("Features")).split())
    return [name for name in FEATURES if name in flags]


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return ["  none that torch can use" + (" (a CPU build of torch)" if torch.version.cuda is None else "")]
    return [f"  {torch.cuda.get_device_name(i)}, sm_{''.join(map(str, torch.cuda.get_device_capability(i)))}"
            for i in range(torch.cuda.device_count())]  # fmt: skip
