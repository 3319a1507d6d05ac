"""Which tar shards a pattern means, and how many samples their index says they hold."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fastclip.data.tar import label_of
from fastclip.errors import UserError

INDEX = "index.json"
# An index comes with the data: a count beyond this is a lie.
LARGEST_COUNT = 10_000_000
# Bytes.
CHUNK = 2**20


def expand(sources: Sequence[str]) -> list[str]:
    """Braces ({000..012}, {a,b}), then * and ?, then folders, each in order. UserError for what matches nothing.

    A name with neither needs not exist, as long as one of them does: reading will say what is missing.
    """
    from braceexpand import UnbalancedBracesError, braceexpand

    found: list[str] = []
    for source in sources:
        refuse_pipe(source)
        try:
            # What is there as it is written has no patterns.
            names = [source] if os.path.exists(source) else list(braceexpand(source))
        except UnbalancedBracesError as error:
            raise UserError(f"unbalanced braces in {source!r}") from error
        for name in names:
            found += _matches(name)
    local = [url for url in found if "://" not in url]
    if local and len(local) == len(found) and not any(map(os.path.exists, local)):
        raise UserError(f"no such shard: {local[0]}" + (f" and {len(local) - 1:,} more" if len(local) > 1 else ""))
    return found


def refuse_pipe(source: str) -> None:
    """UserError for WebDataset's `pipe:` URLs."""
    if source.strip().lower().startswith("pipe:"):
        raise UserError(f"pipe: URLs run shell commands and are refused: {source!r}")


@dataclass(frozen=True)
class Entry:
    """What an index.json says of a shard."""

    samples: int
    sha256: str | None


def read_index(urls: Sequence[str]) -> dict[str, Entry]:
    """The entries of those shards that the index.json beside them knows. UserError for one that is damaged."""
    import fsspec

    entries: dict[str, Entry] = {}
    for folder in dict.fromkeys(url.rpartition("/")[0] for url in urls):
        address = f"{folder}/{INDEX}" if folder else INDEX
        try:
            files, path = fsspec.core.url_to_fs(address)
            content = files.cat_file(path)
        except (FileNotFoundError, PermissionError):  # S3 answers so where listing is not allowed
            continue
        stored = parse_index(content, address)
        beside = [url for url in urls if url.rpartition("/")[0] == folder]
        entries |= {url: stored[label_of(url)] for url in beside if label_of(url) in stored}
    return entries


def read_counts(urls: Sequence[str]) -> dict[str, int]:
    """Samples of each shard that an index.json knows."""
    return {url: entry.samples for url, entry in read_index(urls).items()}


def parse_index(content: bytes, address: str) -> dict[str, Entry]:
    """{file name: entry} of an index.json."""
    try:
        shards = json.loads(content)["shards"]
        entries = {shard["name"]: Entry(shard["samples"], shard.get("sha256")) for shard in shards}
        if not all(type(entry.samples) is int and 0 <= entry.samples <= LARGEST_COUNT for entry in entries.values()):
            raise ValueError("a count that cannot be")
    except (ValueError, KeyError, TypeError, RecursionError, AttributeError) as error:
        raise UserError(f"cannot understand {address}: {error}") from error
    return entries


def changed_shards(urls: Sequence[str]) -> Iterator[str]:
    """Names of the shards whose content is not what their index.json says; each is read whole."""
    import fsspec

    for url, entry in read_index(urls).items():
        if entry.sha256 is None:
            continue
        files, path = fsspec.core.url_to_fs(url)
        found = hashlib.sha256()
        try:
            with files.open(path, "rb") as file:
                while content := file.read(CHUNK):
                    found.update(content)
        except FileNotFoundError:
            yield f"{label_of(url)}: missing"
            continue
        if found.hexdigest() != entry.sha256:
            yield f"{label_of(url)}: its SHA-256 is not that of index.json"


def _matches(name: str) -> list[str]:
    import fsspec

    refuse_pipe(name)
    if os.path.isdir(name):
        found = sorted(entry.path for entry in os.scandir(name) if entry.name.endswith(".tar"))
    elif os.path.exists(name) or not any(sign in name for sign in "*?["):
        return [name]
    else:
        try:
            files, path = fsspec.core.url_to_fs(name)
        except (ValueError, ImportError) as error:
            raise UserError(f"cannot open {name}: {error}") from error
        found = [files.unstrip_protocol(path) if "://" in name else path for path in sorted(files.glob(path))]
    if not found:
        raise UserError(f"no shard matches {name}")
    return found
