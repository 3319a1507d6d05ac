"""Tar shards: patterns, reading, dealing to ranks and workers, epochs, exact resume."""

import gzip
import io
import json
import tarfile
from dataclasses import replace
from itertools import chain

import pytest
from numbered import Letters, noisy, numbers, picture, same, texts

pytest.importorskip("fsspec")
pytest.importorskip("braceexpand")
pytest.importorskip("PIL")

import fsspec

from fastclip.data import fetch, shards
from fastclip.data.config import DataConfig
from fastclip.data.deal import Deal, Piece
from fastclip.data.loader import make_loader
from fastclip.data.sample import Sample
from fastclip.data.shard_files import expand, parse_index, read_counts
from fastclip.data.tar import read_shard, split_name
from fastclip.errors import UserError


def shard(first: int, count: int, **options) -> bytes:
    """Samples first ... first + count - 1, each a .png and a .txt."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", **options) as tar:
        for i in range(first, first + count):
            for type_, content in (("png", picture(i)), ("txt", f"number {i}".encode())):
                member = tarfile.TarInfo(f"set/{i:05}.{type_}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


def write_shards(folder, sizes, index=False):
    """Shards of these sizes, numbered through; `index` tells the loader how large they are."""
    folder.mkdir(exist_ok=True)
    first = 0
    for number, size in enumerate(sizes):
        (folder / f"s-{number:03}.tar").write_bytes(shard(first, size))
        first += size
    if index:
        entries = [{"name": f"s-{number:03}.tar", "samples": size} for number, size in enumerate(sizes)]
        (folder / "index.json").write_text(json.dumps({"shards": entries}))
    return DataConfig(str(folder / "*.tar"), buffer=16)


def loader(config, batch=8, **options):
    return make_loader(config, Letters(), noisy, batch, **options)


def read(folder):
    """All that is found in the shards of a folder, and the notes."""
    notes = []
    found = [
        sample
        for path in sorted(folder.glob("*.tar*"))
        for sample in read_shard(str(path), ("caption",), lambda *note: notes.append(note))
    ]
    return found, notes


# Sizes that fit the streams (4 x 24), that do not (one odd, one of a single sample), and fewer shards than streams.
SIZES = {"even": (24, 24, 24, 24), "ragged": (40, 1, 17, 30, 23), "few": (50,)}
each_sizes = pytest.mark.parametrize("sizes", SIZES.values(), ids=list(SIZES))


@each_sizes
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("index", [False, True], ids=["unknown", "counted"])
def test_every_sample_once_with_its_caption(tmp_path, sizes, workers, index):
    config = replace(write_shards(tmp_path, sizes, index), last="keep")
    epoch = list(loader(config, workers=workers))
    seen = [n for batch in epoch for n in numbers(batch)]
    assert sorted(seen) == list(range(sum(sizes)))
    assert [text for batch in epoch for text in texts(batch)] == [f"number {n}" for n in seen]
    # Only the last batch of each worker may be small.
    assert sum(len(batch) < 8 for batch in epoch) <= max(workers, 1)


@each_sizes
@pytest.mark.parametrize("streams", [1, 2, 3, 7])
def test_a_pass_is_dealt_without_overlap_or_loss_and_evenly(sizes, streams):
    deal = Deal(len(sizes), streams, seed=0, shuffle=True, resample=False)
    for epoch, turn in [(0, 0), (0, 1), (5, 0)]:
        dealt = [
            [
                (piece.shard, j)
                for piece in deal.pieces(s, epoch, turn)
                for j in range(sizes[piece.shard])
                if piece.has(j)
            ]
            for s in range(streams)
        ]
        assert sorted(chain(*dealt)) == [(shard, j) for shard, size in enumerate(sizes) for j in range(size)]
        for stream, samples in enumerate(dealt):
            assert len(samples) == sum(piece.size(sizes[piece.shard]) for piece in deal.pieces(stream, epoch, turn))
    if len(set(sizes)) == 1:
        lengths = [len(samples) for samples in dealt]
        assert max(lengths) - min(lengths) <= len(sizes)


@pytest.mark.parametrize("size", [0, 1, 6, 7, 8, 100])
def test_size_of_a_piece_is_the_number_it_has(size):
    for first, last in [(0, 7), (0, 3), (3, 5), (6, 7)]:
        piece = Piece(0, first, last, 7)
        assert piece.size(size) == sum(piece.has(j) for j in range(size))


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_get_the_same_number_of_batches_and_different_samples(tmp_path, workers):
    config = write_shards(tmp_path, (24,) * 8, index=True)
    ranks = [list(loader(config, 4, rank=rank, world=3, workers=workers)) for rank in range(3)]
    assert [len(batches) for batches in ranks] == [192 // 12] * 3
    seen = [n for batches in ranks for batch in batches for n in numbers(batch)]
    # 8 shards over 3 or 6 streams: all but what the streams' lengths differ by.
    assert len(set(seen)) >= 184 and len(seen) == 192
    assert loader(config, 4, rank=1, world=3).steps_per_epoch == 16


def test_processes_that_cannot_know_the_length_are_told_what_to_give(tmp_path):
    config = write_shards(tmp_path, (24, 24))
    assert loader(config).steps_per_epoch is None
    with pytest.raises(UserError, match=r"several processes.* --data.epoch-samples"):
        loader(config, world=2)
    with pytest.raises(UserError, match=r"--data.last wrap .* --data.epoch-samples"):
        loader(replace(config, last="wrap"))
    given = replace(config, epoch_samples=64)
    assert loader(given, world=2).steps_per_epoch == 4
    assert sum(len(batch) for batch in loader(given, rank=1, world=2)) == 32


def test_an_epoch_longer_than_the_data_goes_round(tmp_path):
    config = replace(write_shards(tmp_path, (24, 24)), epoch_samples=96, pair_ids=True)
    seen = [n for batch in loader(config) for n in numbers(batch)]
    assert sorted(seen) == sorted(2 * list(range(48)))
    assert seen[:48] != seen[48:]
    wrapped = loader(replace(write_shards(tmp_path, (24, 24, 3), index=True), last="wrap", pair_ids=True))
    assert wrapped.steps_per_epoch == 7
    assert {n for batch in wrapped for n in numbers(batch)} == set(range(51))


def test_order_is_shuffled_within_and_between_shards_anew_each_epoch(tmp_path):
    config = replace(write_shards(tmp_path, (24,) * 4), buffer=48)
    shuffled = loader(config)
    first, second = ([n for batch in shuffled for n in numbers(batch)] for _ in range(2))
    assert first != second and sorted(first) == sorted(second)
    # The first batch mixes both shards of its window.
    assert len({n // 24 for n in first[:8]}) == 2
    ordered = loader(replace(config, shuffle=False))
    assert [n for batch in ordered for n in numbers(batch)] == list(range(96))
    assert [n for batch in loader(config, seed=1) for n in numbers(batch)] != first


@pytest.mark.parametrize("workers", [0, 2])
def test_augmentation_is_new_for_each_sample_epoch_and_rank(tmp_path, workers):
    config = replace(write_shards(tmp_path, (24,) * 4, index=True), epoch_samples=192)
    ranks = [loader(config, rank=rank, world=2, workers=workers) for rank in (0, 1)]
    noise = [
        tuple(row) for rank in ranks for _ in "12" for batch in rank for row in (batch.images % 1).flatten(1).tolist()
    ]
    # 2 epochs of 192: each sample 4 times.
    assert len(set(noise)) == len(noise) == 384


def test_a_window_is_as_small_as_large_images_need(monkeypatch):
    samples = [Sample(str(i), b"x" * 100, []) for i in range(10)]
    monkeypatch.setattr(shards, "LARGEST_WINDOW", 250)
    source = iter([*samples, None])
    assert [len(shards.read_window(source, most)) for most in (2, 9, 9, 9, 9)] == [2, 3, 3, 3, 0]


def test_resampling_draws_shards_with_replacement(tmp_path):
    config = replace(write_shards(tmp_path, (4,) * 16), resample=True, epoch_samples=256, pair_ids=True)
    drawn = [n // 4 for batch in loader(config) for n in numbers(batch)]
    # 4 passes of 16 shards: without replacement each would come 4 times, 16 samples.
    assert len(set(map(drawn.count, range(16)))) > 2


@pytest.mark.parametrize("index", [False, True], ids=["unknown", "counted"])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("piece", [8, 4])
def test_resume_is_bit_identical_with_windows_cut_and_streams_of_different_length(
    tmp_path, workers, index, piece, monkeypatch
):
    """Windows of 16 (or some 9, of 700 bytes) and batches of 8, shards of 40 to 1: batches begin amid both."""
    monkeypatch.setattr(shards, "LARGEST_WINDOW", 2**20 if piece == 8 else 700)
    monkeypatch.setattr(fetch, "LARGEST_PIECE", piece)
    monkeypatch.setattr(fetch, "SMALLEST_PIECE", 1)
    config = replace(write_shards(tmp_path, SIZES["ragged"], index), last="drop" if index else "keep", pair_ids=True)
    (tmp_path / "s-002.tar").write_bytes((tmp_path / "s-002.tar").read_bytes()[:20_000])
    with pytest.warns(UserWarning, match=r"(damaged|changed) shard: s-002.tar"):
        whole = loader(config, workers=workers)
        expected, states = [], [whole.state_dict()]
        for _ in range(2):
            for batch in whole:
                expected.append(batch)
                states.append(whole.state_dict())
        counts = whole.report.counts
    for done in range(0, len(expected), 9 if workers else 3):
        resumed = loader(config, workers=workers)
        resumed.load_state_dict(json.loads(json.dumps(states[done])))
        resumed.warned.update(counts)
        rest = [batch for epoch in range(resumed.epoch, 2) for batch in resumed]
        assert len(rest) == len(expected) - done
        assert all(same(a, b) for a, b in zip(expected[done:], rest, strict=True))
        assert resumed.report == whole.report


def test_what_is_noted_at_a_shards_end_is_reported_once_wherever_a_run_goes_on(tmp_path):
    """Windows and shards of 16, the first with 4 samples more than its index says."""
    config = replace(write_shards(tmp_path, (16, 16), index=True), shuffle=False)
    (tmp_path / "s-000.tar").write_bytes(shard(0, 20))
    whole = loader(config)
    states = []
    with pytest.warns(UserWarning, match="changed shard"):
        for _ in whole:
            states.append(whole.state_dict())
    for state in states:
        resumed = loader(config)
        resumed.warned.add("changed shard")
        resumed.load_state_dict(state)
        list(resumed)
        assert resumed.report == whole.report and whole.report.counts == {"changed shard": 1}


def test_resume_does_not_open_shards_that_are_done_with(tmp_path):
    config = replace(write_shards(tmp_path, (16,) * 6, index=True), shuffle=False)
    stopped = loader(config)
    batches = iter(stopped)
    for _ in range(7):
        next(batches)
    state = stopped.state_dict()
    for number in range(2):
        (tmp_path / f"s-{number:03}.tar").write_bytes(b"gone")
    resumed = loader(config)
    resumed.load_state_dict(state)
    assert [n for batch in resumed for n in numbers(batch)] == list(range(56, 96))
    assert not resumed.report.counts


@pytest.mark.parametrize("workers", [0, 1])
def test_with_other_workers_the_rest_of_the_epoch_is_drawn_anew(tmp_path, workers):
    config = write_shards(tmp_path, (24,) * 4, index=True)
    stopped = loader(config, workers=2)
    batches = iter(stopped)
    for _ in range(5):
        next(batches)
    resumed = loader(replace(config, pair_ids=True), workers=workers)
    resumed.load_state_dict(stopped.state_dict())
    assert resumed.batches == 5 and len(list(resumed)) == 12 - 5
    other = loader(config, 4, workers=workers, world=2)
    other.load_state_dict(stopped.state_dict())
    assert other.batches == 5
    other = loader(config, 4, workers=workers)
    other.load_state_dict(stopped.state_dict())
    assert other.batches == 10


def test_a_shard_that_is_not_what_the_index_says_is_named(tmp_path):
    config = replace(write_shards(tmp_path, (24, 24), index=True), shuffle=False)
    (tmp_path / "s-000.tar").write_bytes(shard(0, 20))
    (tmp_path / "s-001.tar").write_bytes(shard(24, 30))
    changed = loader(config, pin_memory=False)
    with pytest.warns(UserWarning, match="changed shard: s-000.tar: 20 samples, index.json has 24"):
        seen = [n for batch in changed for n in numbers(batch)]
    assert len(seen) == 48 and set(seen) == {*range(20), *range(24, 48)}
    assert "more samples than the 24" in changed.report.names["changed shard"][1]


def test_brace_glob_folder_list_and_remote_patterns(tmp_path):
    write_shards(tmp_path, (3, 3, 3))
    paths = [str(tmp_path / f"s-{i:03}.tar") for i in range(3)]
    assert expand((str(tmp_path / "s-{000..002}.tar"),)) == paths
    assert expand((str(tmp_path / "s-{000,002}.tar"), paths[1])) == [paths[0], paths[2], paths[1]]
    assert expand((str(tmp_path / "s-*1.tar"),)) == [paths[1]] and expand((str(tmp_path),)) == paths
    odd = tmp_path / "odd [1] {a,b}"
    write_shards(odd, (1,))
    assert expand((str(odd), str(odd / "s-000.tar"))) == [str(odd / "s-000.tar")] * 2
    memory = fsspec.filesystem("memory")
    for path in paths:
        memory.pipe(f"/set/{path[-9:]}", (tmp_path / path[-9:]).read_bytes())
    remote = [f"memory://set/{path[-9:]}" for path in paths]
    assert expand(("memory://set/s-{000..002}.tar",)) == remote
    assert [url.replace(":///", "://") for url in expand(("memory://set/*.tar",))] == remote
    memory.pipe("/set/index.json", json.dumps({"shards": [{"name": "s-001.tar", "samples": 3}]}).encode())
    assert read_counts(remote) == {remote[1]: 3}
    batches = list(loader(DataConfig("memory://set/*.tar"), 3, workers=1))
    assert sorted(n for batch in batches for n in numbers(batch)) == list(range(9))
    memory.rm("/set", recursive=True)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("nothing-*.tar", "no shard matches nothing"),
        ("nothing-{000..004}.tar", "no such shard: nothing-000.tar and 4 more"),
        ("nothing.tar", "no such shard: nothing.tar"),
        ("memory://nothing/*.tar", "no shard matches memory"),
        ("nonsense://x/*.tar", "cannot open nonsense.*Protocol not known"),
        ("pipe:touch HACKED #.tar", "pipe: URLs run shell commands and are refused"),
        (" PIPE:touch HACKED", "refused"),
    ],
    ids=["glob", "braces", "file", "remote", "protocol", "pipe", "pipe-capitals"],
)
def test_patterns_that_match_nothing_and_pipes_are_errors(tmp_path, monkeypatch, source, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said) as error:
        loader(DataConfig(source))
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_a_missing_shard_of_several_is_named_and_the_others_are_read(tmp_path):
    write_shards(tmp_path, (8, 8))
    (tmp_path / "s-002.tar").write_bytes(b"")
    (tmp_path / "s-003.tar").write_bytes(tarfile.NUL * 10240)
    some = loader(DataConfig(str(tmp_path / "s-{000..004}.tar")))
    with pytest.warns(UserWarning) as warned:
        assert len(list(some)) == 2
    assert some.report.counts == {"damaged shard": 1, "empty shard": 1, "unreadable shard": 1}
    assert some.report.names["damaged shard"] == [
        "s-002.tar: empty header, where a header or the end mark should be, after 0 samples"
    ]
    assert some.report.names["unreadable shard"][0].startswith("s-004.tar: ") and len(warned) == 3


@pytest.mark.parametrize("index", [False, True], ids=["unknown", "counted"])
@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_readable_is_an_error(tmp_path, index, workers):
    config = write_shards(tmp_path, (8, 8, 8), index)
    for path in tmp_path.glob("*.tar"):
        path.write_bytes(b"no tar at all" * 100)
    with pytest.warns(UserWarning) if not index else pytest.raises(UserError):
        with pytest.raises(
            UserError, match=r"does not fill one batch: damaged shard 3|nothing can be read from the 3"
        ) as e:
            list(loader(config, workers=workers))
        assert "\n" not in str(e.value)
        if index:
            raise UserError


@pytest.mark.parametrize("piece", [8, 2])
def test_shards_smaller_than_one_batch_are_an_error(tmp_path, piece, monkeypatch):
    monkeypatch.setattr(fetch, "LARGEST_PIECE", piece)
    monkeypatch.setattr(fetch, "SMALLEST_PIECE", 1)
    with pytest.raises(UserError, match="the data has 6 samples, fewer than one batch of 8"):
        loader(write_shards(tmp_path, (3, 3), index=True))
    (tmp_path / "index.json").unlink()
    with pytest.raises(UserError, match="does not fill one batch"):
        list(loader(DataConfig(str(tmp_path))))


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_all_tar_formats_gzip_and_long_names(tmp_path, format):
    long = "d/" * 60 + "\N{GREEK SMALL LETTER ALPHA}" * 60 if format != tarfile.USTAR_FORMAT else "d/" * 40 + "x"
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        folder = tarfile.TarInfo("d")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, content in ((f"{long}.PNG", picture(7)), (f"{long}.json", b'{"caption": ["number 7"], "url": 5}')):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    (tmp_path / "a.tar").write_bytes(file.getvalue())
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress(file.getvalue()))
    found, notes = read(tmp_path)
    assert not notes and len(found) == 2
    assert found[0].name == f"a.tar/{long}" and found[1].image == picture(7)
    assert [sample.captions for sample in found] == [["number 7"]] * 2


def test_keys_end_at_the_first_dot_of_the_last_part():
    assert split_name("a.b/c.d.PNG") == ("a.b/c", "d.png")
    assert split_name("x.jpg") == ("x", "jpg") and split_name("readme") == ("readme", "")


@pytest.mark.parametrize("cut", [1, 511, 512, 600, 1023, 1024, 1500, 3000, 10239])
def test_a_shard_cut_anywhere_gives_what_is_whole_and_says_so(tmp_path, cut):
    """2 samples are 4 members of 1,024 bytes each, then the end mark."""
    whole = shard(0, 2)
    assert len(whole) == 10240
    (tmp_path / "s.tar").write_bytes(whole[:cut])
    found, notes = read(tmp_path)
    assert [sample.name for sample in found if sample.image and sample.captions] == [
        "s.tar/set/00000",
        "s.tar/set/00001",
    ][: cut // 2048]
    # From 4,096 on all there is is whole, and the first block of the end mark is enough.
    assert [kind for kind, _ in notes] == (["damaged shard"] if cut < 4096 + 512 else [])


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"[]",
        b'{"shards": 3}',
        b'{"shards": [{"name": "a"}]}',
        b'{"shards": [{"name": "a", "samples": 1e99}]}',
        b'{"shards": [{"name": "a", "samples": -1}]}',
        b'{"shards": [{"name": "a", "samples": 99999999999}]}',
        b"[" * 100_000,
    ],
    ids=["cut", "list", "number", "no-count", "float", "negative", "huge", "deep"],
)
def test_a_damaged_index_is_one_line(content):
    with pytest.raises(UserError, match=r"cannot understand index\.json") as error:
        parse_index(content, "index.json")
    assert "\n" not in str(error.value)
