"""Data from strangers: nothing in it runs, nothing is written, nothing fills the memory, and the report names it."""

import io
import os
import pickle
import struct
import tarfile
import zlib

import pytest
from numbered import Letters, noisy, numbers, picture

pytest.importorskip("fsspec")
pytest.importorskip("braceexpand")
pytest.importorskip("PIL")

from fastclip.data.config import DataConfig
from fastclip.data.loader import make_loader
from fastclip.data.report import NAME_LENGTH, DataReport
from fastclip.data.tar import LARGEST_HEADER, read_shard


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, marker) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def image_bomb(side: int = 20_000) -> bytes:
    """A PNG of a few KB that decodes to side x side pixels of 3 bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = zlib.compressobj(9)
    row = b"\0" * (1 + 3 * side)
    pixels = b"".join(rows.compress(row) for _ in range(side // 100)) + rows.flush()
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def add(tar: tarfile.TarFile, name: str, content: bytes, type_: bytes = tarfile.REGTYPE, link: str = "") -> None:
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.size = type_, link, len(content)
    tar.addfile(member, io.BytesIO(content))


def add_pair(tar: tarfile.TarFile, number: int, image: bytes | None = None) -> None:
    add(tar, f"{number:04}.png", picture(number) if image is None else image)
    add(tar, f"{number:04}.txt", f"number {number}".encode())


@pytest.fixture
def hostile(tmp_path):
    """Four shards with 64 good samples and one of everything else; the marker that a pickle would make."""
    folder = tmp_path / "set"
    folder.mkdir()
    marker = tmp_path / "HACKED"
    with tarfile.open(folder / "a.tar", "w") as tar:
        for i in range(16):
            add_pair(tar, i)
        add_pair(tar, 900, picture(900)[:50])
        add_pair(tar, 901, b"\xff\xd8\xff\xe0 no JPEG")
        add_pair(tar, 902, image_bomb())
        add(tar, "903.png", picture(903))
        add(tar, "904.txt", b"number 904")
        add(tar, "905.png", picture(905))
        add(tar, "905.txt", b" \n")
    with tarfile.open(folder / "b.tar", "w") as tar:
        for i in range(16, 32):
            add_pair(tar, i)
        for name in ("../../HACKED/906.png", "/HACKED/907.png", "..\\HACKED\\908.png", "x/../../909.png"):
            add(tar, name, picture(906))
            add(tar, name.replace(".png", ".txt"), b"number 906")
        for extension in ("pyd", "pickle", "pkl", "pth", "npy", "cbor", "json.pkl", "png.pyd"):
            add(tar, f"910.{extension}", pickle.dumps(Bomb(marker)))
        add(tar, "911.png", pickle.dumps(Bomb(marker)))
        add(tar, "911.txt", pickle.dumps(Bomb(marker)))
        add(tar, "912.png", b"", tarfile.SYMTYPE, "/etc/passwd")
        add(tar, "913.txt", b"", tarfile.LNKTYPE, "../../HACKED")
        add(tar, "914.png", b"", tarfile.FIFOTYPE)
        add(tar, "0031.png", picture(915))
        add(tar, "0031.png", picture(916))
    with tarfile.open(folder / "c.tar", "w") as tar:
        for i in range(32, 48):
            add_pair(tar, i)
        add(tar, "917.txt", b"x" * (2**20 + 1))
        add(tar, "918.json", b"[" * 200_000)
        add(tar, "\x1b[31m919\r.pkl", b"")
    (folder / "c.tar").write_bytes((folder / "c.tar").read_bytes() + b"\0" * 512)
    with tarfile.open(folder / "d.tar", "w") as tar:
        for i in range(48, 72):
            add_pair(tar, i)
    # 16 samples of 2,048 bytes, and the first 300 bytes of an image.
    (folder / "d.tar").write_bytes((folder / "d.tar").read_bytes()[: 16 * 2048 + 512 + 50])
    return folder, marker


@pytest.mark.parametrize("workers", [0, 2])
def test_a_hostile_shard_set_is_read_runs_nothing_and_is_named(hostile, workers, tmp_path):
    folder, marker = hostile
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    config = DataConfig(str(folder / "{a..d}.tar"), buffer=8, last="keep", max_skipped=0.5)
    loader = make_loader(config, Letters(), noisy, 8, workers=workers)
    with pytest.warns(UserWarning, match="further ones are counted"):
        batches = list(loader)
    assert sorted(n for batch in batches for n in numbers(batch)) == list(range(64))
    assert not marker.exists() and sorted(str(path) for path in tmp_path.rglob("*")) == before

    report = loader.report
    assert report.samples == 64 and not report.duplicates
    assert report.counts == {
        "bad image": 4,
        "missing caption": 3,
        "missing image": 1,
        "empty caption": 1,
        "unsafe name": 8,
        "member not read": 9,
        "not a regular file": 3,
        "duplicate member": 1,
        "oversized member": 1,
        "damaged shard": 1,
        "bad UTF-8": 1,
    }
    names = {kind: " | ".join(names) for kind, names in report.names.items()}
    assert "20000 x 20000" in names["bad image"] or "400000000 pixels" in names["bad image"]
    assert all(f"{key}:" in names["bad image"] for key in ("a.tar/0900", "a.tar/0901", "a.tar/0902", "b.tar/911"))
    assert "a.tar/903" in names["missing caption"] and "b.tar/0031" in names["missing caption"]
    assert "a.tar/904" in names["missing image"] and "c.tar/918" in names["missing caption"]
    assert "a.tar/905" in names["empty caption"]
    assert "b.tar: ../../HACKED/906.png" in names["unsafe name"] and "/HACKED/907" in names["unsafe name"]
    assert "b.tar: 910.pyd" in names["member not read"]
    assert "b.tar: 912.png" in names["not a regular file"]
    assert "b.tar: 0031.png" in names["duplicate member"] and "c.tar: 917.txt" in names["oversized member"]
    assert names["damaged shard"] == "d.tar: unexpected end of data, after 16 samples"
    assert all(kind in report.summary() for kind in report.counts) and "\n" not in report.summary()


def test_the_data_report_of_a_hostile_shard_set_names_the_same_and_runs_nothing(hostile, capsys, tmp_path):
    for package in ("tyro", "tqdm", "matplotlib"):
        pytest.importorskip(package)
    from fastclip import cli

    folder, marker = hostile
    cli.main(["data", "report", str(folder / "{a..d}.tar"), "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "64 samples of" in printed and not marker.exists() and "\x1b" not in printed
    for line in (
        "bad image: 4",
        "unsafe name: 8",
        "member not read: 9",
        "damaged shard: 1",
        "a.tar/0902: ",
        "../../HACKED",
    ):
        assert line in printed


def test_names_cannot_write_to_the_terminal_or_flood_it():
    report = DataReport()
    report.add("unsafe name", "a\x1b[31m\r\n\x07\u202e" + "x" * 10_000)
    (name,) = report.names["unsafe name"]
    assert name.isprintable() and len(name) == NAME_LENGTH


def test_a_header_that_claims_gigabytes_is_refused(tmp_path):
    """tarfile reads a long name's header whole, before anyone sees the name."""
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, LARGEST_HEADER + 1
    (tmp_path / "s.tar").write_bytes(header.tobuf() + b"x" * 4096)
    notes = []
    assert not list(read_shard(str(tmp_path / "s.tar"), (), lambda *note: notes.append(note)))
    assert notes == [("damaged shard", "s.tar: a header of 1,048,577 bytes, after 0 samples")]


@pytest.mark.parametrize(
    ("size", "kinds"),
    [(2**45, ["damaged shard"]), (2**30, ["oversized member", "damaged shard"])],
    ids=["terabytes", "gigabyte"],
)
def test_a_member_that_claims_more_than_there_is_is_not_waited_for(tmp_path, size, kinds):
    header = tarfile.TarInfo("0001.png")
    header.size = size
    (tmp_path / "s.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT) + b"x" * 4096)
    notes = []
    assert not list(read_shard(str(tmp_path / "s.tar"), (), lambda *note: notes.append(note)))
    assert [kind for kind, _ in notes] == kinds


def test_a_sparse_member_is_not_unfolded(tmp_path):
    """It has no content in the file and 100 MB of zeros once read."""
    header = tarfile.TarInfo("0001.png")
    header.type = tarfile.GNUTYPE_SPARSE
    block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    block[483:495] = b"%011o\0" % 100_000_000
    block[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(block))[0]
    (tmp_path / "s.tar").write_bytes(bytes(block) + b"\0" * 1024)
    notes = []
    assert not list(read_shard(str(tmp_path / "s.tar"), (), lambda *note: notes.append(note)))
    assert notes == [("not a regular file", "s.tar: 0001.png"), ("empty shard", "s.tar")]


@pytest.mark.parametrize("seed", range(20))
def test_random_damage_ends_in_samples_or_notes(tmp_path, seed):
    """Bytes flipped anywhere: never an exception, and undamaged shards stay whole."""
    import random

    chance = random.Random(seed)
    with tarfile.open(tmp_path / "s.tar", "w", format=chance.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])) as tar:
        for i in range(8):
            add_pair(tar, i)
            add(tar, "é" * 120 + f"{i}.txt", b"x")
    content = bytearray((tmp_path / "s.tar").read_bytes())
    for _ in range(chance.choice([1, 10, 200])):
        content[chance.randrange(len(content))] = chance.randrange(256)
    (tmp_path / "s.tar").write_bytes(content)
    notes = []
    found = list(read_shard(str(tmp_path / "s.tar"), (), lambda *note: notes.append(note)))
    assert found or notes


def test_nothing_in_the_data_package_can_run_or_unpickle():
    """The words that would: of pickle, of shells, of Pillow's and numpy's switches, of extraction from archives."""
    import ast
    from pathlib import Path

    import fastclip.data

    forbidden = {
        "pickle",
        "cloudpickle",
        "dill",
        "shelve",
        "marshal",
        "subprocess",
        "webdataset",
        "runpy",
        "importlib.util",
    }
    calls = {"eval", "exec", "system", "popen", "extract", "extractall", "loads_pickle", "LOAD_TRUNCATED_IMAGES"}
    for path in Path(fastclip.data.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            imported = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            imported += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not forbidden & set(imported), path
            name = getattr(node, "attr", getattr(node, "id", None))
            assert name not in calls and name != "MAX_IMAGE_PIXELS", f"{path}: {name}"
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert node.value.value is False, path
