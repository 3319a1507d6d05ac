"""The configuration as a TOML file: read, checked against the dataclasses, and written into the run's folder."""

from __future__ import annotations

import json
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from fastclip.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Config = TypeVar("Config")
KINDS = {int: "an integer", float: "a number", str: "a string", bool: "true or false", Path: "a string"}


def read_settings(path: Path, config: type[Config]) -> Config:
    """`config` with the file's settings over the defaults. UserError names what cannot be."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path} is not TOML: {error}") from error
    return from_dict(config, values, str(path))


def from_dict(config: type[Config], values: dict[str, Any], where: str, prefix: str = "") -> Config:
    """A dataclass from nested dicts of plain values. UserError for a name or a value that does not belong."""
    hints = get_type_hints(config)
    known = {field.name: hints[field.name] for field in fields(config)}
    given = {}
    for name, value in values.items():
        field, full = name.replace("-", "_"), prefix + name
        if field not in known:
            raise UserError(f"{where}: unknown setting {full}; there are {', '.join(prefix + name for name in known)}")
        if is_dataclass(known[field]):
            if not isinstance(value, dict):
                raise UserError(f"{where}: {full} is a table of settings, got {value!r}")
            given[field] = from_dict(known[field], value, where, f"{full}.")
        else:
            try:
                given[field] = convert(known[field], value)
            except ValueError as error:
                raise UserError(f"{where}: {full} must be {error}, got {value!r}") from None
    return config(**given)


def convert(kind: Any, value: Any) -> Any:
    """`value` as `kind`; ValueError with the name of what was expected."""
    origin, choices = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        expected = []
        for choice in choices:
            try:
                return convert(choice, value)
            except ValueError as error:
                expected += [str(error)] if choice is not NoneType else []
        raise ValueError(" or ".join(expected))
    if origin is Literal:
        if value not in choices:
            raise ValueError(f"one of {', '.join(map(str, choices))}")
        return value
    if origin is tuple:
        kinds = [choices[0]] * len(value) if isinstance(value, list) and choices[-1] is ... else choices
        if not isinstance(value, list) or len(value) != len(kinds):
            raise ValueError("a list" if choices[-1] is ... else f"a list of {len(choices)}")
        return tuple(convert(kind, part) for kind, part in zip(kinds, value, strict=True))
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ValueError(KINDS[kind])
    return value


def to_dict(config: Any) -> dict[str, Any]:
    """Nested dicts of what JSON and TOML can hold; settings that are None are left out."""
    named = {field.name: getattr(config, field.name) for field in fields(config)}
    return {name: plain(value) for name, value in named.items() if value is not None}


def plain(value: Any) -> Any:
    if is_dataclass(value):
        return to_dict(value)
    if isinstance(value, tuple):
        return [plain(part) for part in value]
    return str(value) if isinstance(value, Path) else value


def to_toml(values: dict[str, Any]) -> str:
    """TOML of nested dicts; a JSON string, number, boolean or flat list is a TOML one."""
    lines = [f"{name} = {literal(value)}" for name, value in values.items() if not isinstance(value, dict)]
    for name, value in values.items():
        if isinstance(value, dict):
            lines += ["", f"[{name}]", to_toml(value).rstrip("\n")]
    return "\n".join(lines) + "\n"


def literal(value: Any) -> str:
    # TOML's strings hold DEL escaped only; JSON leaves it.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def differences(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> list[str]:
    """Settings that differ, such as "optimizer.ema 0.99 -> 0.999"."""
    found = []
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name), after.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{name}.")
        elif old != new:
            found.append(f"{prefix}{name} {old} -> {new}")
    return found
