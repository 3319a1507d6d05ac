"""fastclip bench."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from fastclip.benchmarks.config import Config
from fastclip.errors import UserError


@dataclass(frozen=True)
class Bench(Config):
    """Time, memory and error of fastclip beside its alternatives, on this machine.

    Flags left out take the values of the full run, or with --quick those of one under three minutes on two cores.
    """

    def run(self) -> None:
        from fastclip.benchmarks import suite

        try:
            code = suite.run(self)
        except ValueError as error:
            raise UserError(str(error)) from error
        if code:
            sys.exit(code)
