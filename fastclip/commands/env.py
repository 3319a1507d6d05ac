"""fastclip env."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Env:
    """Print versions, processor, threads and GPUs, and which backends can run here."""

    def run(self) -> None:
        from fastclip import env

        print(env.report())
