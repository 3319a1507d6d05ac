"""The loader over sources that are read in any order: epochs, ranks, workers, resume, faults."""

import json
import os
import pickle
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from numbered import Letters, noisy, numbers, picture, plain, same, texts, write_table

pytest.importorskip("pyarrow")
pytest.importorskip("PIL")

from fastclip.data import fetch
from fastclip.data.batch import Batch, caption_ids
from fastclip.data.config import DataConfig
from fastclip.data.fetch import pieces_of
from fastclip.data.loader import make_loader
from fastclip.errors import UserError

# 6 batches of 8 and 3 samples that do not fill one.
COUNT, BATCH = 51, 8


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> DataConfig:
    return DataConfig(str(write_table(tmp_path_factory.mktemp("table"), COUNT)))


def loader(config, batch=BATCH, transform=noisy, **options):
    return make_loader(config, Letters(), transform, batch, **options)


def test_an_epoch_has_every_sample_at_most_once_and_the_right_captions(table):
    epoch = list(loader(table))
    assert len(epoch) == loader(table).steps_per_epoch == COUNT // BATCH
    assert all(batch.images.shape == (BATCH, 3, 1, 1) and batch.tokens.dtype == torch.int64 for batch in epoch)
    seen = [number for batch in epoch for number in numbers(batch)]
    assert len(set(seen)) == len(seen) == 48
    assert [text for batch in epoch for text in texts(batch)] == [f"number {number}" for number in seen]


def test_epochs_and_seeds_have_their_own_order_and_the_same_ones_again(table):
    first = loader(table)
    orders = [[numbers(batch) for batch in first] for _ in range(2)]
    assert first.epoch == 2 and orders[0] != orders[1]
    again = loader(table)
    again.set_epoch(1)
    assert [numbers(batch) for batch in again] == orders[1]
    assert [numbers(batch) for batch in loader(table, seed=1)] != orders[0]


def test_augmentation_is_new_for_each_sample_and_epoch_and_seed(table):
    found = [loader(table), loader(table, seed=1)]
    noise = [
        tuple(row) for each in found for _ in "12" for batch in each for row in (batch.images % 1).flatten(1).tolist()
    ]
    assert len(set(noise)) == len(noise) == 4 * 48


def test_without_shuffling_the_tables_order_is_kept(table):
    ordered = loader(replace(table, shuffle=False))
    assert [n for batch in ordered for n in numbers(batch)] == list(range(48))


def test_wrap_fills_the_last_batch_and_keep_leaves_it_small(table):
    wrapped = list(loader(replace(table, last="wrap", shuffle=False)))
    assert numbers(wrapped[-1]) == [48, 49, 50, 0, 1, 2, 3, 4] and len(wrapped) == 7
    assert sorted({n for batch in wrapped for n in numbers(batch)}) == list(range(COUNT))
    kept = list(loader(replace(table, last="keep")))
    assert [len(batch) for batch in kept] == [8] * 6 + [3]
    assert sorted(n for batch in kept for n in numbers(batch)) == list(range(COUNT))


def test_ranks_side_by_side_are_one_process_with_the_whole_batch(table):
    """Whatever the number of workers: 3 ranks of 4 and one process of 12, the same rows and the same noise."""
    whole = list(loader(table, 12))
    ranks = [list(loader(table, 4, rank=rank, world=3)) for rank in range(3)]
    assert {len(batches) for batches in ranks} == {len(whole)} == {4}
    for step, batch in enumerate(whole):
        assert torch.equal(batch.images, torch.cat([batches[step].images for batches in ranks]))


def test_resampling_draws_with_replacement_as_many_as_asked_for(table):
    config = replace(table, resample=True, epoch_samples=160, pair_ids=True)
    drawn = [n for batch in loader(config) for n in numbers(batch)]
    # 160 draws from 51 without replacement would hold each 3 or 4 times.
    assert len(drawn) == 160 and max(map(drawn.count, drawn)) > 4
    longer = [n for batch in loader(replace(table, epoch_samples=2 * COUNT, pair_ids=True), 6) for n in numbers(batch)]
    assert sorted(longer) == sorted(2 * list(range(COUNT)))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("done", [0, 1, 4, 6], ids=["start", "one", "middle", "end"])
def test_resume_is_bit_identical_with_augmentation(table, workers, done):
    config = replace(table, pair_ids=True)
    reference = loader(config)
    expected = [batch for _ in range(2) for batch in reference]
    stopped = loader(config, workers=workers)
    batches = iter(stopped)
    for _ in range(done):
        next(batches)
    state = pickle.loads(pickle.dumps(stopped.state_dict()))
    assert json.loads(json.dumps(state)) == state
    resumed = loader(config, workers=workers)
    resumed.load_state_dict(state)
    assert (resumed.epoch, resumed.batches) == (0, done)
    resumed.set_epoch(0)
    rest = [batch for _ in range(2) for batch in resumed]
    assert len(rest) == len(expected) - done
    assert all(same(a, b) for a, b in zip(expected[done:], rest, strict=True))
    assert resumed.report == reference.report


@pytest.mark.parametrize(
    ("batch", "pieces"),
    [(1, 1), (8, 1), (256, 1), (512, 2), (600, 3), (32768, 128), (131072, 512), (1021, 1), (514, 1)],
    ids=["one", "small", "largest", "two", "three", "paper", "more", "prime", "twice-a-prime"],
)
def test_large_batches_are_fetched_in_equal_pieces(batch, pieces):
    assert pieces_of(batch) == pieces


@pytest.fixture
def small_pieces(monkeypatch):
    """Of 2 samples."""
    monkeypatch.setattr(fetch, "LARGEST_PIECE", 2)
    monkeypatch.setattr(fetch, "SMALLEST_PIECE", 1)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("last", ["drop", "keep"])
def test_pieces_change_nothing_in_a_batch(table, workers, last, request):
    """Tokenizers may pad to the longest text they are given, which differs from piece to piece."""

    class Ragged(Letters):
        def __call__(self, texts):
            ids = super().__call__(texts)
            return ids[:, : max(map(len, texts))]

    config = replace(table, pair_ids=True, last=last)
    whole = make_loader(config, Ragged(), noisy, BATCH)
    expected = list(whole)
    request.getfixturevalue("small_pieces")
    pieces = make_loader(config, Ragged(), noisy, BATCH, workers=workers)
    batches = list(pieces)
    assert pieces.plan.pieces == 4 and pieces.report == whole.report
    assert all(same(a, b) for a, b in zip(expected, batches, strict=True))
    resumed = make_loader(config, Ragged(), noisy, BATCH, workers=workers)
    resumed.load_state_dict({**pieces.state_dict(), "epoch": 0, "batches": 4})
    assert all(same(a, b) for a, b in zip(expected[4:], resumed, strict=True))


def test_duplicates_are_found_across_pieces(tmp_path, small_pieces):
    config = DataConfig(str(write_table(tmp_path, 8, lambda i: f"number {i % 4}")), pair_ids=True)
    found = loader(config)
    (batch,) = found
    assert found.report.duplicates == 4 and len(batch.pair_ids.unique()) == 4


def test_a_worker_that_is_killed_is_one_line(table):
    def fatal(image):
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(
        UserError, match=r"a process that reads data was killed.*: lower the number of workers"
    ) as error:
        list(loader(table, transform=fatal, workers=1))
    assert "\n" not in str(error.value)


def test_a_mistake_in_a_transform_keeps_its_traceback(table):
    def broken(image):
        raise RuntimeError("a bug")

    for workers in (0, 1):
        with pytest.raises(RuntimeError, match="a bug"):
            list(loader(table, transform=broken, workers=workers))


def test_leaving_an_epoch_and_coming_back_goes_on_there(table):
    expected = list(loader(table))
    left = loader(table, workers=1)
    for batch in left:
        assert same(batch, expected[0])
        break
    assert all(same(a, b) for a, b in zip(expected[1:], left, strict=True))


def test_fetching_leaves_torchs_generator_alone_and_seeds_it_for_transforms_that_use_it(table):
    def by_global(image):
        return plain(image) + torch.rand(3, 1, 1)

    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first = list(loader(table, transform=by_global))
    assert torch.equal(torch.rand(2), expected)
    assert all(same(a, b) for a, b in zip(first, loader(table, transform=by_global), strict=True))
    noise = torch.cat([batch.images % 1 for batch in first])
    assert len(noise[:, 0].unique()) == len(noise)


def test_what_cannot_be_used_is_replaced_counted_and_named_in_any_process(tmp_path):
    path = write_table(tmp_path, 64, lambda i: {5: "", 6: "   "}.get(i, f"number {i}"))
    (tmp_path / "images" / "1.png").write_bytes(picture(1)[:45])
    (tmp_path / "images" / "2.png").write_bytes(b"no picture")
    (tmp_path / "images" / "3.png").unlink()
    (tmp_path / "images" / "4.png").unlink()
    os.mkfifo(tmp_path / "images" / "4.png")
    config = DataConfig(str(path), max_skipped=0.5)
    reports = []
    for workers in (0, 2):
        found = loader(config, workers=workers)
        with pytest.warns(UserWarning, match="left out; further ones are counted") as warned:
            batches = list(found)
        assert {len(batch) for batch in batches} == {BATCH} and len(batches) == 8
        # Substitutes come from outside the batch.
        assert all(len(set(numbers(batch))) == BATCH for batch in batches)
        assert not {1, 2, 3, 4, 5, 6} & {n for batch in batches for n in numbers(batch)}
        assert len(warned) == 5
        reports.append(found.report)
    report = reports[0]
    assert report == reports[1] and report.samples == 64
    assert set(report.counts) == {
        "bad image",
        "missing image",
        "unreadable file",
        "missing caption",
        "empty caption",
    }
    assert {name.split(":")[0] for name in report.names["bad image"]} == {"images/1.png", "images/2.png"}
    assert "3.png" in report.names["missing image"][0] and "not a regular file" in report.names["unreadable file"][0]
    assert report.skipped == sum(report.counts.values()) >= 6


def test_keep_leaves_bad_samples_out_without_a_substitute(tmp_path):
    path = write_table(tmp_path, 10)
    (tmp_path / "images" / "9.png").write_bytes(b"")
    (tmp_path / "images" / "0.png").write_bytes(b"")
    config = DataConfig(str(path), shuffle=False, last="keep", max_skipped=0.5)
    with pytest.warns(UserWarning, match="bad image: images/0.png"):
        batches = list(loader(config, 3))
    assert [numbers(batch) for batch in batches] == [[1, 2], [3, 4, 5], [6, 7, 8]]


def test_too_many_bad_samples_stop_the_run_and_are_named(tmp_path):
    path = write_table(tmp_path, 40)
    for i in range(0, 40, 4):
        (tmp_path / "images" / f"{i}.png").write_bytes(b"GIF89a")
    with (
        pytest.warns(UserWarning),
        pytest.raises(UserError, match=r"10 of 40 .* 20% .* bad image 10 \(images/") as e,
    ):
        list(loader(DataConfig(str(path), last="keep", max_skipped=0.2)))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_readable_is_one_error(tmp_path, workers):
    path = write_table(tmp_path, 20)
    for file in (tmp_path / "images").iterdir():
        file.write_bytes(b"")
    with pytest.raises(UserError, match="1,000 samples in a row cannot be used: bad image") as error:
        list(loader(DataConfig(str(path)), 4, workers=workers))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("last", ["drop", "wrap"])
def test_data_smaller_than_one_batch_is_an_error_not_zero_steps(table, last):
    with pytest.raises(UserError, match="51 samples, fewer than one batch of 52"):
        loader(replace(table, last=last), 52)
    with pytest.raises(UserError, match="51 samples, fewer than one batch of 18 on each of 3"):
        loader(replace(table, last=last), 18, world=3)
    assert loader(replace(table, last=last), 51).steps_per_epoch == 1


def test_duplicates_are_counted_warned_of_once_and_given_ids(tmp_path):
    path = write_table(tmp_path, 16, lambda i: ["A cat", "a  cat", "two cats", "a dog"][i % 4])
    plain_loader = loader(DataConfig(str(path)))
    with pytest.warns(UserWarning, match=r"5 captions occur .* --data.pair-ids") as warned:
        list(plain_loader)
    assert len(warned) == 1 and plain_loader.report.duplicates == 10
    with_ids = loader(DataConfig(str(path), pair_ids=True))
    for batch in with_ids:
        words = [" ".join(text.lower().split()) for text in texts(batch)]
        assert batch.pair_ids.dtype == torch.int64
        equal = torch.tensor([[a == b for a in words] for b in words])
        assert torch.equal(batch.pair_ids[:, None] == batch.pair_ids, equal)


def test_ids_of_captions_are_the_same_in_every_run():
    assert caption_ids(["a cat"]).tolist() == [-6711169336525982361]


def test_one_of_several_captions_is_drawn_each_epoch(tmp_path):
    path = write_table(tmp_path, 32, lambda i: f'"[""first {i}"", ""second {i}""]"')
    both = loader(DataConfig(str(path)))
    epochs = [{n: text for batch in both for n, text in zip(numbers(batch), texts(batch), strict=True)} for _ in "12"]
    drawn = [[epoch[n].split()[0] for n in range(32)] for epoch in epochs]
    assert drawn[0] != drawn[1] and all(set(words) == {"first", "second"} for words in drawn)
    assert [epochs[0][n].split()[1] for n in range(32)] == [str(n) for n in range(32)]


def test_over_long_and_damaged_captions_are_mended_and_counted(tmp_path):
    path = write_table(tmp_path, 4, lambda i: f"number {i}")
    path.write_bytes(path.read_bytes().replace(b"number 1", b"caf\xe9").replace(b"number 2", b"x" * 25))
    mended = loader(DataConfig(str(path), shuffle=False), 4)
    (batch,) = mended
    assert texts(batch) == ["number 0", "caf\N{REPLACEMENT CHARACTER}", "x" * 24, "number 3"]
    assert mended.report.counts == {"bad UTF-8": 1, "long caption": 1} and mended.report.skipped == 0
    assert mended.report.names == {"bad UTF-8": ["images/1.png"], "long caption": ["images/2.png"]}


def test_batch_moves_and_pins_all_of_its_tensors():
    batch = Batch(torch.zeros(2, 3, 1, 1), torch.zeros(2, 4, dtype=torch.int64), torch.arange(2))
    moved = batch.to("meta")
    assert {t.device.type for t in (moved.images, moved.tokens, moved.pair_ids)} == {"meta"} and len(moved) == 2
    assert Batch(batch.images, batch.tokens).to("meta").pair_ids is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch": 0}, "batch >= 1"),
        ({"workers": -1}, "workers >= 0"),
        ({"rank": 2, "world": 2}, "0 <= rank < world"),
        ({"config": DataConfig("x.csv", last="keep"), "world": 2}, "for one process"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_numbers_that_cannot_be_are_refused(table, options, said):
    arguments = {"config": table, "batch": 4, **options}
    with pytest.raises(ValueError, match=said):
        make_loader(tokenizer=Letters(), transform=noisy, **arguments)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (DataConfig(""), "source is empty"),
        (DataConfig(("a.csv", "b.tar")), "mixes shards and table"),
        (DataConfig(("a.csv", "b.csv")), "several sources"),
        (DataConfig("nowhere"), "no folder"),
        (DataConfig("a.csv", captions=()), "at least one column"),
        (DataConfig("a.csv", buffer=0), "buffer must be at least 1"),
        (DataConfig("a.csv", max_skipped=1.5), "share between 0 and 1"),
        (DataConfig("a.csv", last="keep", resample=True), "does not go with"),
        (DataConfig("glyphs", split="valid"), "splits are train and test"),
        (DataConfig("glyphs", split="train", held_out=("Comic",)), "unknown face 'Comic'"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_settings_that_cannot_be_are_one_line(config, said):
    with pytest.raises(UserError, match=said) as error:
        loader(config)
    assert "\n" not in str(error.value)


def test_the_example_of_the_documentation_runs(capsys):
    pytest.importorskip("matplotlib")
    pytest.importorskip("tokenizers")
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict = {}
    exec(code, names)
    assert capsys.readouterr().out and names["loader"].batches == 1
    assert names["batch"].images.shape == (512, 1, 32, 32) and names["batch"].pair_ids.shape == (512,)
