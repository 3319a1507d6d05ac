"""Which tar shards a pattern means, and how many samples their index says they hold."""

from __future__ import annotations

import json
import os

from fastclip.data.tar import label_of
from fastclip.errors import UserError

INDEX = "index.json"
# An index comes with the data: a count beyond this is a lie.
LARGEST_COUNT = 10_000_000


def expand(sources: tuple[str, ...]) -> list[str]:
    """Braces ({000..012}, {a,b}), then * and ?, then folders, each in order. UserError for what matches nothing.

    A literal name needs not exist, as long as one of them does: reading will say what is missing.
    """
    from braceexpand import UnbalancedBracesError, braceexpand

    found: list[str] = []
    for source in sources:
        try:
            for name in braceexpand(source):
                found += _matches(name)
        except UnbalancedBracesError as error:
            raise UserError(f"unbalanced braces in {source!r}") from error
    local = [url for url in found if "://" not in url]
    if local and len(local) == len(found) and not any(map(os.path.exists, local)):
        raise UserError(f"no such shard: {local[0]}" + (f" and {len(local) - 1:,} more" if len(local) > 1 else ""))
    return found


def refuse_pipe(source: str) -> None:
    """UserError for WebDataset's `pipe:` URLs."""
    if source.strip().lower().startswith("pipe:"):
        raise UserError(f"pipe: URLs run shell commands and are refused: {source!r}")


def read_counts(urls: list[str]) -> dict[str, int]:
    """Samples of each shard that the index.json beside it knows. UserError for an index that cannot be understood."""
    import fsspec

    counts: dict[str, int] = {}
    for folder in dict.fromkeys(url.rpartition("/")[0] for url in urls):
        address = f"{folder}/{INDEX}" if folder else INDEX
        try:
            files, path = fsspec.core.url_to_fs(address)
            content = files.cat_file(path)
        except (FileNotFoundError, PermissionError):  # S3 answers so where listing is not allowed
            continue
        stored = parse_index(content, address)
        counts |= {
            url: stored[label_of(url)] for url in urls if url.rpartition("/")[0] == folder and label_of(url) in stored
        }
    return counts


def parse_index(content: bytes, address: str) -> dict[str, int]:
    """{file name: samples} of an index.json."""
    try:
        shards = json.loads(content)["shards"]
        counts = {shard["name"]: shard["samples"] for shard in shards}
        if not all(type(count) is int and 0 <= count <= LARGEST_COUNT for count in counts.values()):
            raise ValueError("a count that cannot be")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"cannot understand {address}: {error}") from error
    return counts


def _matches(name: str) -> list[str]:
    import fsspec

    refuse_pipe(name)
    try:
        files, path = fsspec.core.url_to_fs(name)
    except (ValueError, ImportError) as error:
        raise UserError(f"cannot open {name}: {error}") from error
    local = "://" not in name
    if local and os.path.isdir(name):
        path = os.path.join(path, "*.tar")
    elif not any(sign in path for sign in "*?["):
        return [name]
    found = sorted(path for path in files.glob(path))
    if not found:
        raise UserError(f"no shard matches {name}")
    return found if local else [files.unstrip_protocol(path) for path in found]
