"""Where the numbers come from: processor, memory and versions."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import fastclip

CHECKOUT = Path(__file__).resolve().parent.parent
ISA_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "sve", "bf16")
PEERS = ("numpy", "open_clip_torch", "sentence-transformers", "transformers", "webdataset", "torchvision", "triton")


def describe(threads: int) -> dict:
    """Everything a reader needs to judge or repeat a measurement. Memory in GiB."""
    return {
        "cpu": cpu_model(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "isa_flags": _isa_flags(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": threads,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "huge_pages": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastclip": fastclip.__version__,
        "commit": _commit(),
        "packages": {name: found for name in PEERS if (found := _version(name))},
        "compiler": _first_line("c++", "--version"),
        "backends": fastclip.available_backends(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def headline(machine: dict) -> str:
    """One line for tables and plots."""
    if "gpu" in machine:
        return (
            f"{machine['gpu']}, {machine['memory_gib']} GiB, driver {machine['driver']}, torch {machine['torch']}, "
            f"Triton {machine['triton']}, {machine['date'][:10]}"
        )
    return (
        f"{machine['cpu']}, {machine['isa']}, {machine['threads']} threads of {machine['cores']} cores, "
        f"{machine['memory_gib']} GiB, torch {machine['torch']}, {machine['date'][:10]}"
    )


def file_stem(machine: dict) -> str:
    """Such as amd-epyc-avx2-2threads-2026-01-31."""
    name = re.sub(r"\(R\)|\(TM\)|CPU|Processor|@.*", "", machine["cpu"], flags=re.IGNORECASE)
    parts = (name, machine["isa"], f"{machine['threads']}threads", machine["date"][:10])
    return re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-")


def cpu_model() -> str:
    for line in (_read("/proc/cpuinfo") or "").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _isa_flags() -> list[str]:
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", _read("/proc/cpuinfo") or "", re.MULTILINE)
    present = set(found.group(1).split()) if found else set()
    return [flag for flag in ISA_FLAGS if flag in present]


def _commit() -> str | None:
    """The checkout's commit, with + where files have been changed since; None outside one."""
    if not (CHECKOUT / "setup.py").exists():
        return None
    return _first_line("git", "-C", str(CHECKOUT), "describe", "--always", "--dirty=+", "--exclude=*")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _first_line(*command: str) -> str | None:
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return said.partition("\n")[0].strip() or None


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None
