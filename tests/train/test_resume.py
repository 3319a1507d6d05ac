"""A run that is stopped and resumed ends with the weights of the run that was not."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import PAIRS, assert_same, main_on_a_full_disk, run, weights

from fastclip import clip
from fastclip.errors import UserError
from fastclip.train import checkpoint, trainer
from fastclip.train.trainer import train


def forget(run_folder, after):
    """As if the run had been killed just after the checkpoint of that step."""
    for folder in (run_folder / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step-")) > after:
            shutil.rmtree(folder)
    (run_folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer": {"ema": 0.9, "clip_norm": 0.5}},
        {"loss": "siglip"},
        {"micro_batch": 3},
        {"precision": {"dtype": "bf16"}},
        {"precision": {"dtype": "fp16"}},
        {"model": {"lock_image": True}},
        {"workers": 1},
        {"threads": 2},
    ],
    ids=["plain", "ema", "siglip", "micro-batch", "bf16", "fp16", "locked", "worker", "threads"],
)
def test_resumed_run_is_the_same_bit_for_bit(tiny, tmp_path, changes, threads, capsys):
    # The checkpoint of step 8 lies in the middle of the second epoch.
    want = run(tiny(tmp_path, checkpoint={"every": 4, "keep": 3}, **changes))
    states = [checkpoint.load_json(tmp_path / "checkpoints" / f"step-{step:08d}" / "counters.json") for step in (8, 12)]
    assert [state["counters"]["step"] for state in states] == [8, 12]
    records = (tmp_path / "metrics.jsonl").read_text()
    forget(tmp_path, after=8)
    torch.manual_seed(1234)  # the resumed run must not depend on what was there
    assert_same(run(tiny(tmp_path, resume="latest", checkpoint={"every": 4, "keep": 3}, **changes)), want)
    assert "not bit for bit" not in capsys.readouterr().out
    steady = ("step", "loss", "scale", "accuracy", "gradient_norm")
    assert [picked(line, steady) for line in records.splitlines()] == [
        picked(line, steady) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]


def picked(line, names):
    return {name: value for name, value in json.loads(line).items() if name in names}


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """The folder of a run with checkpoints of steps 4, 8 and 12."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(tiny(folder, checkpoint={"every": 4, "keep": 3}))
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of it, to be damaged."""
    return shutil.copytree(finished, tmp_path / "run")


def test_checkpoint_says_what_it_holds_and_has_no_pickle_in_it(finished):
    folder = finished / "checkpoints" / "step-00000012"
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {path.name for path in folder.iterdir()} - {"manifest.json"}
    assert manifest["files"].keys() == files >= {"model.safetensors", "state.safetensors", "process-0.pt"}
    assert (manifest["step"], manifest["processes"], manifest["threads"]) == (12, 1, 1)
    for name, entry in manifest["files"].items():
        assert entry["sha256"] == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    own = torch.load(folder / "process-0.pt", weights_only=True)
    assert own.keys() == {"random", "loader"}
    # A checkpoint is a model folder, and the run's folder holds the same model in the end.
    assert_same(weights(finished), clip.load(folder).state_dict())


def test_only_the_newest_are_kept_and_half_ones_go(tiny, tmp_path):
    (tmp_path / "checkpoints" / ".step-00000002").mkdir(parents=True)
    run(tiny(tmp_path, checkpoint={"every": 3, "keep": 2}, resume="latest"))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000009", "step-00000012"]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: truncate(folder / "state.safetensors", 100), "state.safetensors has 100 bytes"),
        (lambda folder: flip_a_bit(folder / "model.safetensors"), "model.safetensors is not what was written"),
        (lambda folder: (folder / "process-0.pt").unlink(), "process-0.pt is missing"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "manifest.json").write_text('{"format": 0, "files": {}}'), "format 0"),
    ],
    ids=["truncated", "flipped bit", "missing file", "missing manifest", "bad manifest", "other format"],
)
def test_damaged_checkpoint_is_named_and_the_one_before_it_taken(tiny, copy, damage, reason):
    last = copy / "checkpoints" / "step-00000012"
    damage(last)
    said = []
    assert checkpoint.newest(copy, said.append) == copy / "checkpoints" / "step-00000008"
    (line,) = said
    assert line.startswith(f"warning: checkpoint {last}") and reason in line
    # Asked for by name it is an error.
    with pytest.raises(checkpoint.CheckpointError, match=reason):
        train(tiny(copy, resume=str(last)))


def test_run_goes_on_before_a_damaged_checkpoint_and_sets_it_aside(tiny, copy, finished):
    last = copy / "checkpoints" / "step-00000012"
    flip_a_bit(last / "model.safetensors")
    assert_same(run(tiny(copy, resume="latest")), weights(finished))
    checkpoint.verify(last)
    names = {path.name for path in (copy / "checkpoints").iterdir()}
    assert names == {"step-00000008", "step-00000012", "superseded-step-00000012"}


def test_going_back_leaves_the_later_course(tiny, copy, finished):
    # Its checkpoints are no longer the newest, and are not counted among those to keep.
    first = str(copy / "checkpoints" / "step-00000004")
    run(tiny(copy, resume=first, schedule={"steps": 6}, checkpoint={"every": 1, "keep": 1}))
    names = {path.name for path in (copy / "checkpoints").iterdir()}
    assert names == {"step-00000006", "superseded-step-00000008", "superseded-step-00000012"}
    assert checkpoint.newest(copy, pytest.fail).name == "step-00000006"
    assert [json.loads(line)["step"] for line in (copy / "metrics.jsonl").read_text().splitlines()] == [*range(1, 7)]


def test_another_runs_checkpoint_begins_a_new_run_only(tiny, copy, finished, tmp_path):
    other = str(finished / "checkpoints" / "step-00000008")
    with pytest.raises(UserError, match="holds a run"):
        train(tiny(copy, resume=other))
    assert_same(run(tiny(tmp_path / "new", resume=other)), weights(finished))


def test_restart_by_torchrun_takes_the_newest(tiny, copy, finished, monkeypatch, tmp_path):
    monkeypatch.setattr(trainer, "restarted", lambda: True)
    assert trainer.claim_run(tiny(copy)).name == "step-00000012"
    # Killed before its first checkpoint: where it began.
    assert trainer.claim_run(tiny(tmp_path / "new")) is None
    first = finished / "checkpoints" / "step-00000004"
    assert trainer.claim_run(tiny(tmp_path / "new", resume=str(first))) == first


def test_learnt_tokenizer_stays_that_of_the_checkpoint(tiny, tmp_path):
    made = {"start_from": None, "name": "ViT-Ti/4@32px", "tokenizer": "learn", "context": 9, "vocabulary": 560}
    run(tiny(tmp_path / "run", model=made, schedule={"steps": 1}))
    table = tmp_path / "other.csv"
    table.write_text("path,caption\n" + "".join(f"{i}.png,other words {i * i}\n" for i in range(PAIRS)))
    config = tiny(tmp_path / "run", model=made, schedule={"steps": 2}, resume="latest")
    root = str(Path(config.data.source).parent)
    run(replace(config, data=replace(config.data, source=str(table), root=root)))
    names = ("run/tokenizer.json", "run/checkpoints/step-00000001/tokenizer.json")
    assert len({(tmp_path / name).read_text() for name in names}) == 1


def truncate(path, size):
    path.write_bytes(path.read_bytes()[:size])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_no_sound_checkpoint_at_all_is_an_error_not_a_new_run(tiny, copy):
    for folder in (copy / "checkpoints").iterdir():
        truncate(folder / "model.safetensors", 10)
    with pytest.raises(UserError, match=r"no sound checkpoint in .*: all 3 are damaged"):
        train(tiny(copy, resume="latest"))


def test_checkpoint_of_another_model_or_optimiser_is_refused(tiny, finished, tmp_path):
    folder = str(finished / "checkpoints" / "step-00000012")
    with pytest.raises(UserError, match="belongs to another model or optimiser: it has no ema"):
        train(tiny(tmp_path / "b", resume=folder, optimizer={"ema": 0.5}))
    with pytest.raises(UserError, match="belongs to another model"):
        train(tiny(tmp_path / "c", resume=folder, model={"start_from": None, "name": "glyph-conv"}))


def test_a_run_is_not_overwritten(tiny, copy):
    before = sorted((path, path.stat().st_mtime_ns) for path in copy.rglob("*") if path.is_file())
    with pytest.raises(UserError, match="holds a run: --resume latest"):
        train(tiny(copy))
    assert sorted((path, path.stat().st_mtime_ns) for path in copy.rglob("*") if path.is_file()) == before


def test_latest_begins_where_there_is_no_checkpoint(tiny, finished, tmp_path, capsys):
    assert_same(run(tiny(tmp_path, resume="latest")), weights(finished))
    assert "No checkpoint in" in capsys.readouterr().out


def test_changed_settings_are_named(tiny, copy, capsys):
    run(tiny(copy, resume="latest", schedule={"steps": 14}, optimizer={"learning_rate": 0.5}))
    said = capsys.readouterr().out
    assert "optimizer.learning_rate 0.01 -> 0.5; schedule.steps 12 -> 14" in said
    assert [json.loads(line)["step"] for line in (copy / "metrics.jsonl").read_text().splitlines()] == [*range(1, 15)]


def test_what_changes_the_bits_is_said(tiny, copy, threads, capsys):
    # The promise of the same bits is for the same threads and versions; that it no longer holds must be seen.
    manifest = copy / "checkpoints" / "step-00000012" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"torch": "2.9.0"}))
    threads(2)
    run(tiny(copy, resume="latest", schedule={"steps": 13}))
    changed = f"threads 1 -> 2; torch 2.9.0 -> {torch.__version__}"
    assert f"The run goes on, but not bit for bit: {changed}.\n" in capsys.readouterr().out


def test_full_disk_is_one_message_and_leaves_the_earlier_ones(tiny, tmp_path, fork):
    pytest.importorskip("resource")
    process = fork(tiny(tmp_path, checkpoint={"every": 1, "keep": 20}), main_on_a_full_disk)
    process.join(60)
    said = process.said.read_text()
    assert process.exitcode == 1 and "Traceback" not in said
    assert "fastclip: cannot write a checkpoint into" in said and "File too large" in said
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step-00000001", "step-00000002"}
    checkpoint.verify(tmp_path / "checkpoints" / "step-00000002")
