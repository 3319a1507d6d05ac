"""Where the numbers come from: processor, memory, versions, and how busy the machine was."""

import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

import fastclip

ISA_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "sve", "bf16")


def describe(threads: int) -> dict:
    """Everything a reader needs to judge or repeat a measurement. Memory in GiB; load is processes waiting to run."""
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
        "backends": fastclip.available_backends(),
        "load_at_start": round(os.getloadavg()[0], 2),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def headline(machine: dict) -> str:
    """One line for tables and plots."""
    return (
        f"{machine['cpu']}, {machine['isa']}, {machine['threads']} threads of {machine['cores']} cores, "
        f"{machine['memory_gib']} GiB, torch {machine['torch']}, {machine['date'][:10]}"
    )


def noise_warning(machine: dict) -> str | None:
    """A sentence where other programs had the processor when the run began."""
    if machine["load_at_start"] < 0.5:
        return None
    return (
        f"Other programs were running (load {machine['load_at_start']} on {machine['cores']} cores): "
        "absolute times are too high, ratios less so."
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
    here = Path(__file__).parent
    try:
        git = ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--exclude=*"]
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None
