"""The table of backends and the choice among them.

A backend is a module with the functions that ops.py and sigmoid.py call, DEVICE (the device type it is meant for; None
for any) and `why_not(x)`: None where it can run x, or with x None anything on this machine, else the reason in one
sentence. Modules are imported when first asked for, so that a machine without Triton, a compiler or a GPU still runs.
"""

import functools
import importlib
import warnings
from types import ModuleType

from torch import Tensor

# Fastest first: backend=None takes the first that can run the tensors at hand.
NAMES = ("triton", "cpu", "eager")

_default: str | None = None


def available_backends(x: Tensor | None = None) -> list[str]:
    """Names of the backends that can run here (on x, where given), fastest first."""
    return [name for name in NAMES if why_not(name, x) is None]


def set_backend(name: str | None) -> None:
    """Use this backend wherever a call does not name one; None restores the automatic choice.

    Raises ValueError for an unknown name and RuntimeError, with the reason, for one that cannot run on this machine.
    """
    global _default
    if name is not None:
        _require(name, None)
    _default = name


def choose(x: Tensor, name: str) -> ModuleType:
    """The module that runs x: the named one ("" = no wish), else set_backend's, else the first that can."""
    wish = name or _default
    if wish:
        return _require(wish, x)
    chosen = next(name for name in NAMES if why_not(name, x) is None)
    for passed_over in NAMES[: NAMES.index(chosen)]:
        if _load(passed_over).DEVICE == x.device.type:
            _warn_once(passed_over, chosen)
    return _load(chosen)


def report() -> str:
    """What `fastclip env` prints: one line a backend, with the reason where it cannot run."""
    lines = []
    for name in NAMES:
        reason = why_not(name, None)
        lines.append(f"  {name:8s} {'yes: ' + _load(name).describe() if reason is None else 'no:  ' + reason}")
    return "\n".join(lines)


def _require(name: str, x: Tensor | None) -> ModuleType:
    if name not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(NAMES)} or None, got {name!r}")
    reason = why_not(name, x)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} cannot run this: {reason}")
    return _load(name)


def why_not(name: str, x: Tensor | None = None) -> str | None:
    """Why the named backend cannot run x (with None: anything on this machine), or None where it can."""
    return _load(name).why_not(x)


@functools.cache
def _warn_once(name: str, instead: str) -> None:
    reason = why_not(name, None)
    if reason is not None:
        warnings.warn(f"fastclip: backend {name!r} cannot run here ({reason}); using {instead!r}", stacklevel=2)


@functools.cache
def _load(name: str) -> ModuleType:
    return importlib.import_module(f"fastclip.backends.{name}")
