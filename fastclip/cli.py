"""The command line: the table of commands, and how their errors reach the user.

A mistake of the user's ends in one line on stderr and a non-zero exit code; only bugs leave a traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Union

import tyro

from fastclip.commands.bench import Bench
from fastclip.commands.classify import Classify
from fastclip.commands.data import Data
from fastclip.commands.demo import Demo
from fastclip.commands.env import Env
from fastclip.commands.eval import Eval
from fastclip.commands.plan import Plan
from fastclip.commands.probe import Probe
from fastclip.commands.search import Search
from fastclip.commands.train import Train
from fastclip.commands.tune import Tune
from fastclip.commands.vocabulary import Vocabulary
from fastclip.errors import UserError

COMMANDS = {
    "demo": Demo,
    "train": Train,
    "search": Search,
    "classify": Classify,
    "probe": Probe,
    "eval": Eval,
    "data": Data,
    "vocabulary": Vocabulary,
    "env": Env,
    "bench": Bench,
    "plan": Plan,
    "tune": Tune,
}

# Modules of the extra [train] that [demo] lacks, and the packages of modules with another name.
TRAINING = ("braceexpand", "datasets", "fsspec", "ftfy", "pyarrow", "tensorboard")
PACKAGES = {"PIL": "pillow", "sklearn": "scikit-learn", "fontTools": "fonttools"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `fastclip` and `python -m fastclip`.

    Exits with 0, with 1 after a user's mistake, 2 for wrong usage, 130 after Ctrl-C, 141 when its reader went away.
    """
    # Huge pages for large tensors: without them page faults slow each training step (Linux; torch reads this
    # at its first allocation).
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        parse(arguments).run()
        sys.stdout.flush()
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except BrokenPipeError:
        # `| head` has read enough. Nothing is left to flush at exit, which would fail once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (UserError, OSError) as error:
        fail(str(error))
    except ModuleNotFoundError as error:
        extra = "train" if error.name in TRAINING or "train" in arguments[:1] else "demo"
        package = PACKAGES.get(error.name, error.name)
        fail(f"this command needs the package {package}: install it, or fastclip with the extra [{extra}]")
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
            raise
        fail("out of memory; lower --batch")


def parse(arguments: Sequence[str]) -> Any:
    """The command that the arguments name. A command with a `defaults` method makes its own, from a file perhaps."""
    each = []
    for name, command in COMMANDS.items():
        chosen = name in arguments[:1] and hasattr(command, "defaults")
        given = {"default": command.defaults(arguments[1:])} if chosen else {}
        each.append(Annotated[command, tyro.conf.subcommand(name, **given)])
    return tyro.cli(Union[tuple(each)], prog="fastclip", args=arguments)  # noqa: UP007 (made at run time)


def fail(message: str, code: int = 1) -> None:
    print(f"fastclip: {message}", file=sys.stderr)
    sys.exit(code)
