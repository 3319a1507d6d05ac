"""Where CLIP's byte-pair vocabulary comes from: its merges, read from any of the files it is published in.

The vocabulary is OpenAI's (https://github.com/openai/CLIP, MIT licence, Copyright (c) 2021 OpenAI). fastclip does not
carry it: the wheels of open_clip_torch and clip do, and so do the model folders on the Hugging Face hub.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
import os
import urllib.request
import zlib
from pathlib import Path

from fastclip.data.cache import cache_dir, write_atomic
from fastclip.errors import UserError

FILE = "bpe_simple_vocab_16e6.txt.gz"
SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
ADDRESS = f"https://github.com/openai/CLIP/raw/main/clip/{FILE}"
# The file lists more merges than CLIP uses: of its 49,408 ids, 512 are single bytes and two special tokens.
MERGES = 49_408 - 512 - 2
# OpenAI's file is 3 MB unpacked; one that goes on for longer is none.
LONGEST = 32 * 2**20

Merges = list[tuple[str, str]]


def find_vocabulary(path: str | Path | None = None) -> Path:
    """The first vocabulary file there is, of: `path`; $FASTCLIP_VOCABULARY; an installed open_clip_torch or clip; the
    cache (`fastclip vocabulary --download`).

    Each of the first two may be a file or a folder that holds one. UserError if one of them is given and is neither,
    or if there is nothing anywhere.
    """
    for given, what in ((path, "the vocabulary"), (os.environ.get("FASTCLIP_VOCABULARY"), "$FASTCLIP_VOCABULARY")):
        if given:
            if found := vocabulary_in(Path(given)):
                return found
            raise UserError(f"{what} {given} is neither a vocabulary file nor a folder with one")
    for place in (*installed(), cache_dir()):
        if found := vocabulary_in(place):
            return found
    raise UserError(
        "CLIP's vocabulary is not on this machine: install open_clip_torch, run `fastclip vocabulary --download`, or "
        f"name a {FILE}, tokenizer.json or merges.txt in $FASTCLIP_VOCABULARY"
    )


def vocabulary_in(place: Path) -> Path | None:
    """`place` itself if it is a file, the vocabulary in it if it is a folder, else None."""
    if place.is_file():
        return place
    names = ("tokenizer.json", "merges.txt", FILE)
    return next((place / name for name in names if (place / name).is_file()), None)


def installed() -> list[Path]:
    """Folders of the installed packages that carry the vocabulary; finding them imports nothing."""
    specs = [importlib.util.find_spec(package) for package in ("open_clip", "clip")]
    return [Path(spec.origin).parent for spec in specs if spec is not None and spec.origin]


def read_merges(path: str | Path) -> Merges:
    """The merges of a vocabulary file, first one first, as pairs of pieces: 48,894 in CLIP's own.

    Reads OpenAI's .txt.gz, Hugging Face's merges.txt (beside which a vocab.json must agree) and tokenizer.json.
    UserError naming the file if it is none of these, or cannot be read.
    """
    path = Path(path)
    try:
        if path.suffix == ".json":
            pairs = merges_of_json(json.loads(path.read_text(encoding="utf-8")))
        elif path.suffix == ".gz":
            with gzip.open(path) as file:
                pairs = merges_of_text(file.read(LONGEST).decode("utf-8"))[:MERGES]
        else:
            pairs = merges_of_text(path.read_text(encoding="utf-8"))
    except (OSError, EOFError, ValueError, KeyError, TypeError, zlib.error) as error:
        raise UserError(f"the vocabulary {path} cannot be read: {error}") from error
    beside = path.with_name("vocab.json")
    if path.name == "merges.txt" and beside.is_file():
        check_numbers(pairs, beside)
    return pairs


def merges_of_text(text: str) -> Merges:
    """One pair a line, after a first line that tells the version."""
    pairs = [tuple(line.split()) for line in text.split("\n")[1:] if line.strip()]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise ValueError("expected two pieces a line")
    return pairs


def merges_of_json(stored: dict) -> Merges:
    """Of Hugging Face `tokenizers`' JSON, where a merge is a pair or, in older files, one string."""
    model = stored["model"]
    if model["type"] != "BPE" or model.get("end_of_word_suffix") != "</w>":
        raise ValueError("it is not a byte-pair encoding whose words end in </w>")
    pairs = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError("expected two pieces a merge")
    return pairs


def check_numbers(pairs: Merges, vocab: Path) -> None:
    """UserError unless `vocab`, a JSON of piece -> id, numbers the pieces as CLIP does."""
    try:
        ids = json.loads(vocab.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"the vocabulary {vocab} cannot be read: {error}") from error
    expected = pieces(pairs)
    wrong = next((piece for number, piece in enumerate(expected) if ids.get(piece) != number), None)
    if wrong is not None or len(ids) != len(expected) + 2:
        raise UserError(f"{vocab} does not number its {len(ids):,} pieces as CLIP does")


def byte_characters() -> list[str]:
    """The printable character that stands for each byte, in the order of CLIP's (and GPT-2's) ids.

    Bytes that Latin-1 prints stand for themselves and come first; the others follow as chr(256), chr(257) ...
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def pieces(pairs: Merges) -> list[str]:
    """All pieces in the order of their ids: bytes, bytes that end a word, merged ones. Special tokens come after."""
    single = byte_characters()
    merged = (first + second for first, second in pairs)
    # Two merges may give the same piece in a vocabulary of one's own.
    return list(dict.fromkeys([*single, *(piece + "</w>" for piece in single), *merged]))


def download(path: Path | None = None) -> Path:
    """Fetch OpenAI's file into `path` (the cache if None), checksum verified. UserError if it is another file."""
    path = path or cache_dir() / FILE
    with urllib.request.urlopen(ADDRESS, timeout=60) as answer:
        data = answer.read(LONGEST)
    if (found := hashlib.sha256(data).hexdigest()) != SHA256:
        raise UserError(f"{ADDRESS} has changed: expected sha256 {SHA256}, got {found}; nothing was written")
    write_atomic(path, lambda file: file.write(data))
    return path
