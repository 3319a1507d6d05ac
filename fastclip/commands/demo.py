"""fastclip demo."""

from __future__ import annotations

from dataclasses import dataclass

from fastclip.train.config import DemoConfig


@dataclass(frozen=True)
class Demo(DemoConfig):
    """Train a small CLIP on the pictures and names of characters, and show what it has learnt."""

    def run(self) -> None:
        from fastclip.train.demo import demo

        demo(self)
