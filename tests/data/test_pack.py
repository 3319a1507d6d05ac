"""fastclip data: packing into shards, the report, the contact sheet, and what goes wrong on the way."""

import errno
import hashlib
import io
import json
import os
import resource
import tarfile

import pytest
from numbered import Letters, captions_json, noisy, numbers, picture, texts, write_table

pytest.importorskip("pyarrow")
pytest.importorskip("fsspec")
pytest.importorskip("braceexpand")
pytest.importorskip("tqdm")
pytest.importorskip("tyro")
pytest.importorskip("matplotlib")

from PIL import Image

from fastclip import cli
from fastclip.data.config import DataConfig
from fastclip.data.loader import make_loader
from fastclip.data.pack import PackConfig, pack
from fastclip.data.sheet import SIDE, contact_sheet, examples
from fastclip.data.survey import survey
from fastclip.errors import UserError


def photo(width: int, height: int, format: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").resize((width, height)).convert("RGB").save(file, format)
    return file.getvalue()


@pytest.fixture
def table(tmp_path) -> DataConfig:
    return DataConfig(str(write_table(tmp_path / "set", 50)), max_skipped=0.5)


def loaded(source) -> list[tuple[int, str]]:
    loader = make_loader(DataConfig(str(source), last="keep"), Letters(), noisy, 8)
    return sorted(pair for batch in loader for pair in zip(numbers(batch), texts(batch), strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_packed_shards_hold_every_sample_and_the_index_is_true(table, tmp_path, workers):
    index, report = pack(table, tmp_path / "out", PackConfig(per_shard=20, workers=workers))
    assert loaded(tmp_path / "out") == [(i, f"number {i}") for i in range(50)]
    assert json.loads((tmp_path / "out" / "index.json").read_text()) == index
    assert [shard["samples"] for shard in index["shards"]] == [20, 20, 10] and index["samples"] == report.samples == 50
    for shard in index["shards"]:
        content = (tmp_path / "out" / shard["name"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == shard["sha256"] and len(content) == shard["bytes"]
    assert make_loader(DataConfig(str(tmp_path / "out")), Letters(), noisy, 8, world=2).steps_per_epoch == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "set"]


def test_packing_is_repeatable_and_shuffles_unless_told_not_to(table, tmp_path):
    again = [pack(table, tmp_path / name, PackConfig(per_shard=30))[0] for name in "ab"]
    assert again[0] == again[1]
    other, _ = pack(table, tmp_path / "c", PackConfig(per_shard=30, seed=1))
    assert other != again[0]
    pack(table, tmp_path / "d", PackConfig(per_shard=60, shuffle=False))
    with tarfile.open(tmp_path / "d" / "000000.tar") as tar:
        names = tar.getnames()
        assert names[:2] == ["000000000.png", "000000000.txt"] and len(names) == 100
        assert tar.extractfile("000000007.png").read() == picture(7)


def test_bad_samples_are_left_out_several_captions_kept_and_shards_packed_anew(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for i in range(6):
        (folder / f"{i}.png").write_bytes(picture(i))
        (folder / f"{i}.json").write_bytes(captions_json(f"one {i}", f"two {i}"))
    (folder / "0.png").write_bytes(b"no picture")
    (folder / "1.json").write_bytes(captions_json("  "))
    (folder / "2.json").unlink()
    index, report = pack(DataConfig(str(folder), max_skipped=0.6), tmp_path / "a", PackConfig(per_shard=2))
    assert report.counts == {"bad image": 1, "empty caption": 1, "missing caption": 1}
    assert [shard["samples"] for shard in index["shards"]] == [2, 1]
    pack(DataConfig(str(tmp_path / "a")), tmp_path / "b", PackConfig(per_shard=3))
    with tarfile.open(tmp_path / "b" / "000000.tar") as tar:
        kept = [json.loads(tar.extractfile(name).read())["caption"] for name in tar.getnames() if name.endswith("json")]
    assert sorted(kept) == [[f"one {i}", f"two {i}"] for i in (3, 4, 5)]


def test_a_size_shrinks_the_larger_images_only(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    sizes = {"wide": (120, 60), "high": (40, 90), "small": (16, 30)}
    for name, size in sizes.items():
        (folder / f"{name}.png").write_bytes(photo(*size, "PNG"))
        (folder / f"{name}.txt").write_text(name)
    pack(DataConfig(str(folder)), tmp_path / "out", PackConfig(size=20))
    found = {}
    with tarfile.open(tmp_path / "out" / "000000.tar") as tar:
        for member in tar.getnames()[::2]:
            content = tar.extractfile(member).read()
            caption = tar.extractfile(member.split(".")[0] + ".txt").read().decode()
            found[caption] = (member.split(".")[1], Image.open(io.BytesIO(content)).size, content)
    assert found["wide"][:2] == ("jpg", (40, 20)) and found["high"][:2] == ("jpg", (20, 45))
    assert found["small"] == ("png", (16, 30), (folder / "small.png").read_bytes())


def test_a_folder_in_use_is_left_alone(table, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(UserError, match="exists and is not an empty folder"):
        pack(table, tmp_path / "out", PackConfig())
    (tmp_path / "out" / "mine").unlink()
    pack(table, tmp_path / "out", PackConfig())
    assert (tmp_path / "out" / "index.json").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755


def test_a_full_disk_is_one_line_and_leaves_nothing(table, tmp_path, monkeypatch, capsys):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["data", "pack", table.source, str(tmp_path / "out")])
    assert stopped.value.code == 1
    assert capsys.readouterr().err == f"fastclip: cannot write {tmp_path}/out: No space left on device\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]


def test_a_limit_on_file_sizes_is_met_in_the_middle_of_a_shard(table, tmp_path):
    """A real failure of write(): the first of several, with the sample half written."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    import signal

    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*: File too large"):
            pack(table, tmp_path / "out", PackConfig())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["pack", "{table}", "{table}/out"], "cannot write .*/out: File exists"),
        (["pack", "{table}", "{folder}/out", "--per-shard", "0"], "--per-shard and --size must be at least 1"),
        (["pack", "none.csv", "{folder}/out"], "cannot read the table none.csv"),
        (["pack", "pipe:touch x", "{folder}/out"], "pipe: URLs run shell commands and are refused"),
        (["report", "{folder}", "--out", "{table}/out"], "cannot write into .*/out: Not a directory"),
        (["report", "{folder}", "--samples", "0"], "--samples at least 1"),
        (["report", "{folder}", "--data.source", "x"], "name the source once"),
    ],
    ids=["unwritable", "numbers", "missing", "pipe", "report-unwritable", "samples", "twice"],
)
def test_mistakes_are_one_line(table, tmp_path, capsys, arguments, said):
    import re

    arguments = [a.format(table=table.source, folder=tmp_path / "set") for a in arguments]
    if arguments[0] == "report":
        for i in range(50):
            (tmp_path / "set" / "images" / f"{i}.txt").write_text("x")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["data", *arguments])
    error = capsys.readouterr().err
    assert stopped.value.code == 1 and re.search(said, error) and error.startswith("fastclip: ")
    assert error.count("\n") == 1


def test_nothing_to_pack_and_too_many_bad_samples_are_errors(tmp_path):
    config = DataConfig(str(write_table(tmp_path / "set", 10)))
    for i in range(3):
        (tmp_path / "set" / "images" / f"{i}.png").write_bytes(b"")
    with pytest.raises(UserError, match="3 of 10 samples cannot be used, more than the 10%"):
        pack(config, tmp_path / "out", PackConfig())
    assert not (tmp_path / "out").exists()


def test_the_report_counts_measures_and_names(tmp_path, capsys):
    folder = tmp_path / "set"
    folder.mkdir()
    sizes = [(40, 30)] * 10 + [(100, 10), (300, 200)]
    for i, size in enumerate(sizes):
        (folder / f"{i:02}.jpg").write_bytes(photo(*size))
        (folder / f"{i:02}.txt").write_text(
            "A cat" if i < 4 else f"picture number {i} ☃ 雪だるま " + "of many words " * (i - 3)
        )
    (folder / "90.jpg").write_bytes(photo(40, 30)[:300])
    (folder / "90.txt").write_text("cut")
    (folder / "91.jpg").write_bytes(photo(40, 30))
    cli.main(["data", "report", str(folder), "--out", str(tmp_path / "out"), "--workers", "1"])
    printed = capsys.readouterr().out
    assert "12 samples of" in printed and "2 cannot" in printed
    assert "bad image: 1\n    90.jpg: " in printed and "missing caption: 1\n    91.jpg" in printed
    figures = json.loads((tmp_path / "out" / "report.json").read_text())
    assert figures["samples"] == 12 and figures["skipped"] == 2
    assert figures["duplicate_captions"] == 3 and figures["duplicate_images"] == 9
    assert figures["width"]["0%"] == 40 and figures["width"]["100%"] == 300 and figures["height"]["50%"] == 30
    assert figures["aspect_ratio"]["100%"] == 10 and figures["extreme_aspect_ratios"] == 1
    assert figures["caption_words"]["0%"] == 2 and figures["caption_characters"]["0%"] == 5
    assert figures["decoding"]["samples_per_second"] > 0 and figures["decoding"]["workers"] == 1
    with Image.open(tmp_path / "out" / "sheet.png") as sheet:
        assert sheet.size[0] > 8 * SIDE and sheet.size[1] > 2 * SIDE


def test_the_report_of_shards_and_of_a_part(tmp_path):
    pack(DataConfig(str(write_table(tmp_path / "set", 50))), tmp_path / "out", PackConfig(per_shard=20))
    (tmp_path / "out" / "000001.tar").write_bytes((tmp_path / "out" / "000001.tar").read_bytes()[:9000])
    figures = survey(DataConfig(str(tmp_path / "out")))
    assert figures["samples"] == 34 and figures["found"] == {"damaged shard": 1}
    assert survey(DataConfig(str(tmp_path / "set" / "table.csv")), most=10)["samples"] == 10
    assert survey(DataConfig(str(tmp_path / "out")), most=10)["samples"] == 10
    assert len(examples(DataConfig(str(tmp_path / "out")), 9)) == 9


def test_verify_names_shards_that_were_changed_or_removed(tmp_path):
    out = tmp_path / "out"
    pack(DataConfig(str(write_table(tmp_path / "set", 50))), out, PackConfig(per_shard=20))
    config = DataConfig(str(out / "{000000..000002}.tar"))
    assert survey(config, verify=True)["found"] == {}
    content = bytearray((out / "000001.tar").read_bytes())
    # In the padding behind the first member: no sample changes.
    content[1020] ^= 1
    (out / "000001.tar").write_bytes(content)
    (out / "000002.tar").unlink()
    assert survey(config)["found"] == {"unreadable shard": 1}
    figures = survey(config, verify=True)
    assert figures["names"]["changed shard"] == [
        "000001.tar: its SHA-256 is not that of index.json",
        "000002.tar: missing",
    ]


def test_the_sheet_shows_each_picture_in_its_place():
    red, blue = Image.new("RGB", (SIDE, 20), "red"), Image.new("RGB", (20, SIDE), "blue")
    sheet = contact_sheet([(red, "a " * 400), (blue, "")])
    colours = [sheet.getpixel((12 + SIDE // 2 + place * (SIDE + 12), 12 + SIDE // 2)) for place in (0, 1)]
    assert colours == [(255, 0, 0), (0, 0, 255)]


def test_the_report_of_nothing_usable_is_an_error(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match="no sample can be used: missing caption 1"):
        survey(DataConfig(str(tmp_path)))
