"""Benchmarks with an order of their own (several processes, whole training runs), kept beside the suite's rows.

Each is a module of this folder with `measure(quick: bool) -> list[dict]`, flat dictionaries that become the lines of a
table. It checks its own results.
"""

import importlib
import importlib.util

from fastclip.benchmarks.children import ChildError, run_in_child
from fastclip.benchmarks.config import Config

MODULES = {
    "sharded": "The loss over several processes",
    "grad_caching": "Gradient caching",
    "large_batch": "Training with large batches",
    "models": "The towers beside OpenCLIP's",
    "scaling": "fastclip plan beside measured steps",
}


def wanted(config: Config) -> list[str]:
    """Names of those that are here and asked for."""
    present = [name for name in MODULES if importlib.util.find_spec(f"fastclip.benchmarks.{name}") is not None]
    return [name for name in present if config.wants(name)]


def measure(name: str, config: Config) -> list[dict]:
    """Its lines, from a process of its own; one line that says why where it failed."""
    try:
        return run_in_child(_measure, name, config.quick, threads=config.threads)
    except ChildError as error:
        return [{"failed": str(error)}]


def _measure(name: str, quick: bool) -> list[dict]:
    return importlib.import_module(f"fastclip.benchmarks.{name}").measure(quick)
