"""`python -m benchmarks`: what `fastclip bench` does."""

import sys

import tyro

from fastclip.benchmarks.config import Config
from fastclip.benchmarks.suite import run

if __name__ == "__main__":
    try:
        sys.exit(run(tyro.cli(Config, prog="python -m benchmarks")))
    except (ValueError, OSError) as error:
        sys.exit(f"benchmarks: {error}")
