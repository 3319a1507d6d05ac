"""The command line: one frozen dataclass per command, each with a run method.

A mistake of the user's ends in one line on stderr and a non-zero exit code; only bugs leave a traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fastclip.train.config import DemoConfig, UserError
from fastclip.tune import TuneConfig, tune


@dataclass(frozen=True)
class Demo(DemoConfig):
    """Train a small CLIP on the pictures and names of characters, and show what it has learnt."""

    def run(self) -> None:
        from fastclip.train.demo import demo

        demo(self)


@dataclass(frozen=True)
class Search:
    """Find characters by words with the model that the demo trained."""

    query: tyro.conf.Positional[str]
    """What to look for, such as "snowman"."""
    run_folder: Annotated[Path, tyro.conf.arg(name="run")] = Path("runs/demo")
    """Folder that `fastclip demo` wrote."""
    top: int = 10
    """How many names to print."""
    out: Path | None = None
    """The picture to write; RUN/search-QUERY.png if not given."""

    def run(self) -> None:
        from fastclip.train.search import search

        found, picture = search(self.query, self.run_folder, self.top, self.out)
        for place, hit in enumerate(found, 1):
            face = f"{hit.face}, never trained on" if hit.held_out else hit.face
            print(f"{place:>3}  {hit.score:5.2f}  {hit.name}  ({face})")
        print(f"Pictures: {picture}")


@dataclass(frozen=True)
class Env:
    """Print versions, processor, threads and GPUs, and which backends can run here."""

    def run(self) -> None:
        from fastclip import env

        print(env.report())


@dataclass(frozen=True)
class Tune(TuneConfig):
    """Measure the Triton kernels' tiles on this GPU and keep the fastest in ~/.config/fastclip/tiles.json."""

    def run(self) -> None:
        from fastclip import backends

        reason = backends.why_not("triton")
        if reason is not None:
            raise UserError(f"tune measures on a GPU: {reason}")
        print(f"Tiles: {tune(self)}")


COMMANDS = {"demo": Demo, "search": Search, "env": Env, "tune": Tune}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `fastclip` and `python -m fastclip`.

    Exits with 0, with 1 after a user's mistake, 2 for wrong usage, 130 after Ctrl-C.
    """
    # Huge pages for large tensors: without them page faults slow each training step (Linux; torch reads this
    # at its first allocation).
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    command = tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="fastclip", args=arguments)
    try:
        command.run()
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except (UserError, OSError) as error:
        fail(str(error))
    except ModuleNotFoundError as error:
        fail(f"this command needs the package {error.name}: pip install 'fastclip-loss[demo]'")
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
            raise
        fail("out of memory; lower --batch")


def fail(message: str, code: int = 1) -> None:
    print(f"fastclip: {message}", file=sys.stderr)
    sys.exit(code)
