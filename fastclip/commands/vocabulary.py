"""fastclip vocabulary."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Vocabulary:
    """Say where CLIP's vocabulary is found on this machine."""

    download: bool = False
    """Fetch OpenAI's file (1.4 MB, MIT licence) from GitHub into the cache, and check that it is that one."""

    def run(self) -> None:
        from fastclip.clip.vocabulary import download, find_vocabulary

        print(download() if self.download else find_vocabulary())
