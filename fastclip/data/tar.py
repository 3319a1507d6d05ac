"""Samples from one tar shard of the WebDataset layout: neighbouring members with the same key are one sample.

"a/7.jpg" and "a/7.txt" have the key "a/7": the name up to the first dot of its last part.

The webdataset package could read these too. Its decoders unpickle members, though, and its opener hands `pipe:` URLs to
a shell; what is left without them is this loop. So tarfile reads the shard as a stream, fsspec opens it, and of the
members only images and text are looked at. Names are labels: no path is made of them, nothing is ever extracted.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from fastclip.data.sample import IMAGE_TYPES, LARGEST_IMAGE, LARGEST_TEXT, TEXT_TYPES, Sample, captions_in

Note = Callable[[str, str], None]
# Of the headers that hold long names, which tarfile reads whole, and of any member, which it passes over chunk by chunk
# even behind the file's end. Bytes.
LARGEST_HEADER = 2**20
LARGEST_MEMBER = 2**36
LONG_NAMES = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
# Read at a time, bytes. gzip unpacks each to at most 1,000 times as much; bzip2 and xz, which know no such bound, are
# not read.
CHUNK = 2**16


class _Header(tarfile.TarInfo):
    """tarfile takes a damaged or cut-off header, and the lack of an end mark, for the end: here they are errors."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> _Header:
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error}, where a header or the end mark should be") from error
        if header.type in LONG_NAMES and header.size > LARGEST_HEADER:
            raise tarfile.ReadError(f"a header of {header.size:,} bytes")
        if header.size > LARGEST_MEMBER:
            raise tarfile.ReadError(f"a member of {header.size:,} bytes")
        return header


@dataclass
class _Group:
    """The members of one key."""

    key: str
    image: bytes | None = None
    captions: list[str | bytes | None] = field(default_factory=list)
    types: set[str] = field(default_factory=set)

    def sample(self, label: str) -> Sample:
        return Sample(f"{label}/{self.key}", self.image, self.captions)


def read_shard(url: str, fields: Sequence[str], note: Note) -> Iterator[Sample]:
    """The samples of a shard in its order, images still encoded; `note(kind, name)` is told what is left alone.

    Ends early, with a note, where the shard is damaged; without a sample where it cannot be opened.
    """
    label = label_of(url)
    members = _members(url, label, note)
    group, count = None, 0
    while True:
        try:
            found = next(members, None)
        except MemoryError:
            raise
        except Exception as error:  # file systems raise whatever their libraries do
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            whole = group is not None and group.image is not None and bool(group.captions)
            if count or group is not None or isinstance(error, (tarfile.TarError, EOFError)):
                note("damaged shard", f"{label}: {reason}, after {count + whole} samples")
            else:
                note("unreadable shard", f"{label}: {reason}")
            if whole:
                yield group.sample(label)
            return
        if found is None:
            break
        key, type_, content = found
        if group is None or key != group.key:
            if group is not None:
                count += 1
                yield group.sample(label)
            group = _Group(key)
        if type_ in group.types or (type_ in IMAGE_TYPES and group.image is not None):
            note("duplicate member", f"{label}: {key}.{type_}")
            continue
        group.types.add(type_)
        if type_ in IMAGE_TYPES:
            group.image = content
        else:
            group.captions += captions_in(type_, content, fields)
    if group is None:
        note("empty shard", label)
    else:
        yield group.sample(label)


def _members(url: str, label: str, note: Note) -> Iterator[tuple[str, str, bytes]]:
    """(key, type, content) of the members that may belong to a sample."""
    import fsspec

    files, path = fsspec.core.url_to_fs(url)
    mode = "r|gz" if path.lower().endswith(("gz", ".tgz")) else "r|"
    with files.open(path, "rb") as file, tarfile.open(fileobj=file, mode=mode, bufsize=CHUNK, tarinfo=_Header) as tar:
        while (member := tar.next()) is not None:
            # The list of all members would grow with the shard.
            tar.members.clear()
            if member.isdir():
                continue
            key, type_ = split_name(member.name)
            if is_unsafe(member.name):
                note("unsafe name", f"{label}: {member.name}")
            elif not member.isreg() or member.issparse():
                note("not a regular file", f"{label}: {member.name}")
            elif type_ not in IMAGE_TYPES and type_ not in TEXT_TYPES:
                note("member not read", f"{label}: {member.name}")
            elif member.size > (LARGEST_IMAGE if type_ in IMAGE_TYPES else LARGEST_TEXT):
                note("oversized member", f"{label}: {member.name}, {member.size:,} bytes")
            else:
                yield key, type_, tar.extractfile(member).read()


def label_of(url: str) -> str:
    """The file's name, without what a signed URL has behind it."""
    return url.split("?", 1)[0].rstrip("/").rsplit("/", 1)[-1]


def split_name(name: str) -> tuple[str, str]:
    """(key, type in lower case): "a/b.c.PNG" -> ("a/b", "c.png")."""
    folder, slash, last = name.rpartition("/")
    key, _, type_ = last.partition(".")
    return f"{folder}{slash}{key}", type_.lower()


def is_unsafe(name: str) -> bool:
    """Would lead out of a folder, were it a path. No honest packer writes such names."""
    return name.startswith("/") or "\\" in name or ".." in name.split("/")
