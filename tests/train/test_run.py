"""A whole run: what it writes, measures and refuses."""

import io
import json
import math
import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import PAIRS, assert_same, run, weights

from fastclip import clip, clip_loss, recall_at_k, retrieval_ranks
from fastclip.clip.tokenizer import load_tokenizer
from fastclip.data.images import read_image
from fastclip.data.transform import preprocess_for
from fastclip.errors import UserError
from fastclip.train import step as step_module
from fastclip.train.config import ModelConfig
from fastclip.train.curves import draw_curves
from fastclip.train.flops import training_flops
from fastclip.train.progress import Progress
from fastclip.train.trainer import train


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_writes_its_model_settings_metrics_and_curves(tiny, tmp_path):
    run(tiny(tmp_path, optimizer={"ema": 0.5}))
    names = {path.name for path in tmp_path.iterdir()}
    model = {"config.json", "tokenizer.json", "model.safetensors"}
    assert names == model | {"config.toml", "metrics.jsonl", "curves.png", "checkpoints", "ema"}
    assert {path.name for path in (tmp_path / "ema").iterdir()} == model
    loaded = clip.load(tmp_path)
    assert_same(loaded.state_dict(), weights(tmp_path))
    assert len(load_tokenizer(tmp_path)) == loaded.config.text.vocabulary
    with Image.open(tmp_path / "curves.png") as image:
        assert min(image.size) > 400 and np.asarray(image.convert("L")).std() > 5


def test_records_add_up(tiny, tmp_path):
    run(tiny(tmp_path, log={"every": 3, "accuracy_every": 5}))
    found = records(tmp_path)
    # Every third step, those with an accuracy (after 0, 5 and 10 steps) and the last.
    assert [record["step"] for record in found] == [1, 3, 6, 9, 11, 12]
    assert [record["step"] for record in found if "accuracy" in record] == [1, 6, 11, 12]
    for record in found:
        assert record["samples"] == 8 * record["step"] and record["skipped"] == record["clamped"] == 0
        assert 0 <= record["data_wait"] < 1 < record["samples_per_second"] and record["peak_mib"] > 50
        assert "mfu" not in record
    assert found[-1]["loss"] < found[0]["loss"]


def test_run_learns_the_pairs(tiny, tmp_path):
    run(tiny(tmp_path, schedule={"steps": 60}, checkpoint={"every": 0}, optimizer={"learning_rate": 3e-2}))
    found = records(tmp_path)
    assert found[0]["loss"] > 0.8 * math.log(8) and found[-1]["loss"] < 0.7 * math.log(8)


def test_held_out_figures_are_those_of_the_model_that_was_written(tiny, tmp_path):
    config = tiny(tmp_path)
    data = config.data.source
    run(replace(config, evaluation=replace(config.evaluation, source=data, batch=16, samples=PAIRS)))
    (found,) = [record for record in records(tmp_path) if "held_out_loss" in record]
    model, tokenizer = clip.load(tmp_path), load_tokenizer(tmp_path)
    lines = [line.split(",") for line in Path(data).read_text().splitlines()[1:]]
    images = [read_image(Path(data).parent / path) for path, _ in lines]
    with torch.no_grad():
        image = model.encode_image(torch.stack([preprocess_for(model.config)(picture) for picture in images]))
        text = model.encode_text(tokenizer([caption for _, caption in lines]))
        loss = clip_loss(image, text, model.logit_scale)
    assert found["held_out_pairs"] == PAIRS and found["step"] == 12
    assert found["held_out_loss"] == pytest.approx(loss.item(), rel=1e-4)
    ranks = retrieval_ranks(image, text)
    assert found["image_to_text_recall@5"] == pytest.approx(recall_at_k(ranks[0], 5), abs=1 / PAIRS)
    assert found["text_to_image_recall@1"] == pytest.approx(recall_at_k(ranks[1], 1), abs=1 / PAIRS)


def test_evaluations_come_when_due_and_change_nothing(tiny, tmp_path):
    config = tiny(tmp_path / "a", optimizer={"ema": 0.5})
    evaluation = replace(config.evaluation, every=5, source=config.data.source, samples=20, batch=8)
    want = run(config)
    assert_same(run(replace(config, out=tmp_path / "b", evaluation=evaluation)), want)
    found = [record for record in records(tmp_path / "b") if "held_out_loss" in record]
    assert [record["step"] for record in found] == [5, 10, 12] and found[0]["held_out_pairs"] == 24


def test_zero_shot_figures_of_labelled_pictures(tiny, tmp_path):
    for name, colour in (("red", (250, 0, 0)), ("green", (0, 250, 0))):
        (tmp_path / "labelled" / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (9, 9), colour).save(tmp_path / "labelled" / name / f"{i}.png")
    evaluation = {"zero_shot": str(tmp_path / "labelled"), "templates": ("{} picture",), "every": 0}
    run(tiny(tmp_path / "run", evaluation=evaluation))
    found = records(tmp_path / "run")[-1]
    assert found["zero_shot_top-1"] in (0, 0.5, 1) and found["zero_shot_top-5"] == 1


def test_tensorboard_has_the_same_figures(tiny, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tiny(tmp_path, log={"tensorboard": True}))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (record["step"], pytest.approx(record["loss"])) for record in records(tmp_path)
    ]


def test_a_package_that_is_missing_is_named(tiny, tmp_path):
    with pytest.raises(UserError, match="the package wandb is not installed"):
        train(tiny(tmp_path, log={"wandb": "project"}))


def test_wandb_gets_the_same_records(tiny, tmp_path, monkeypatch):
    class Run:
        logged, finished = [], 0

        def log(self, record, step):
            assert step == record["step"]
            self.logged.append(record)

        def finish(self):
            Run.finished += 1

    begun = []
    module = SimpleNamespace(init=lambda **settings: begun.append(settings) or Run())
    monkeypatch.setitem(sys.modules, "wandb", module)
    run(tiny(tmp_path, log={"wandb": "project"}))
    assert begun[0]["project"] == "project" and begun[0]["dir"] == tmp_path and Run.finished == 1
    assert Run.logged == records(tmp_path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile itself
@pytest.mark.skipif(os.environ.get("FASTCLIP_SLOW") != "1", reason="compiles for a minute; FASTCLIP_SLOW=1")
def test_compiled_towers_learn_the_same(tiny, tmp_path):
    changes = {"schedule": {"steps": 3}, "optimizer": {"learning_rate": 1e-2, "eps": 1e-3}}
    want = run(tiny(tmp_path / "eager", **changes))
    got = run(tiny(tmp_path / "compiled", precision={"compile": True}, **changes))
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-3, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


def test_mfu_counts_the_models_operations(tiny, tmp_path):
    config = tiny(tmp_path, batch=10)
    model = clip.load(config.model.start_from)
    whole, text_only = (
        training_flops(model, config),
        training_flops(model, replace(config, model=ModelConfig(lock_image=True))),
    )
    # The first convolution of the image tower by hand: 4 x 4 places, 4 filters of 5 x 5 x 3, two operations each.
    assert 0 < text_only < whole and whole - text_only > 2 * 10 * 2 * 16 * 4 * 75
    run(replace(config, log=replace(config.log, peak_tflops=1e-6)))
    found = records(tmp_path)[-1]
    assert found["mfu"] == pytest.approx(whole / 10 * found["samples_per_second"] / 1e6)


def test_curves_with_gaps_and_evaluations(tmp_path):
    some = [{"step": i, "loss": None if i == 3 else 5.0 - i / 10, "scale": 14.0} for i in range(1, 9)]
    some += [{"step": 8, "held_out_loss": 4.0, "held_out_pairs": 9, "image_to_text_recall@1": 0.25}]
    draw_curves(some, 256, tmp_path / "curves.png", "8 steps")
    draw_curves([], 256, tmp_path / "none.png", "nothing")
    assert (tmp_path / "curves.png").stat().st_size > 10_000 < (tmp_path / "none.png").stat().st_size


def test_data_smaller_than_a_batch_is_an_error(tiny, tmp_path):
    with pytest.raises(UserError, match=rf"the data has {PAIRS} samples, fewer than one batch of 64"):
        train(tiny(tmp_path, batch=64))


def test_bad_samples_are_said_once_and_summed_up(tiny, tmp_path, fork):
    config = tiny(tmp_path / "run")
    data = shutil.copytree(Path(config.data.source).parent, tmp_path / "data")
    (data / "7.png").write_bytes(b"no picture")
    config = replace(config, data=replace(config.data, source=str(data / "pairs.csv")))
    process = fork(config)
    process.join(60)
    said = process.said.read_text()
    assert process.exitcode == 0, said
    assert len(re.findall(r"^warning: .*7\.png", said, re.MULTILINE)) == 1 and "UserWarning" not in said
    # Twelve batches of 8: two passes over the forty pairs, and the third begun.
    assert re.search(r"^Data: .* [23] \(.*7\.png", said, re.MULTILINE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"name": "ViT-Z"}}, "no model named 'ViT-Z'"),
        ({"model": {"name": None, "start_from": "nothing.pt"}}, "nothing.pt"),
        ({"data": {"source": "nothing.csv"}}, "nothing.csv"),
        ({"device": "cuda"}, "torch sees no GPU here"),
        ({"evaluation": {"zero_shot": "nothing"}}, "nothing is not a folder"),
        ({"resume": "nothing"}, "manifest.json is missing"),
    ],
    ids=["model", "weights", "data", "device", "labelled", "checkpoint"],
)
def test_what_is_not_there_is_named(tiny, tmp_path, changes, message):
    if torch.cuda.is_available() and "device" in changes:
        pytest.skip("there is a GPU")
    if changes.get("model", {}).get("name"):
        changes = {"model": {**changes["model"], "start_from": None}}
    with pytest.raises(UserError, match=message):
        train(tiny(tmp_path, **changes))


@pytest.mark.parametrize(
    ("error", "micro_batch", "advice"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), None, "set --micro-batch, such as 1:"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 4, "lower --micro-batch"),
        (MemoryError(), None, "set --micro-batch"),
    ],
    ids=["gpu", "cpu", "python"],
)
def test_out_of_memory_names_the_setting(tiny, tmp_path, monkeypatch, error, micro_batch, advice):
    def loss(self, batch, accuracy):
        raise error

    monkeypatch.setattr(step_module.TrainStep, "loss", loss)
    with pytest.raises(UserError, match=f"out of memory with --batch 8 and --micro-batch {micro_batch}; {advice}"):
        train(tiny(tmp_path, micro_batch=micro_batch))


def test_other_errors_are_not_taken_for_it(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(step_module.TrainStep, "loss", lambda self, batch, accuracy: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(tiny(tmp_path))


def test_unwritable_folder_is_one_line(tiny, tmp_path, fork):
    (tmp_path / "file").touch()
    process = fork(tiny(tmp_path / "file" / "run"))
    process.join(60)
    assert process.exitcode == 1
    assert process.said.read_text() == f"fastclip: cannot write into {tmp_path}/file/run: Not a directory\n"


def test_without_a_terminal_progress_is_lines(tiny, tmp_path, fork):
    process = fork(tiny(tmp_path))
    process.join(60)
    said = process.said.read_text()
    assert process.exitcode == 0 and "\r" not in said and "step 12/12 loss " in said


def test_with_a_terminal_progress_is_a_bar():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    with Progress(12, begin=4, stream=screen) as progress:
        progress(5, "loss 1")
        progress.say("a line of its own")
        progress(12, "loss 2")
    said = screen.getvalue()
    assert "\r" in said and "12/12" in said and "loss 2" in said and "step 12/12" not in said
    assert "a line of its own\n" in said


def test_skipped_steps_are_written_as_such(tiny, tmp_path, monkeypatch):
    before = step_module.TrainStep.loss

    def loss(self, batch, accuracy):
        value, share = before(self, batch, accuracy)
        return (value * math.nan if self.state.step == 5 else value), share

    monkeypatch.setattr(step_module.TrainStep, "loss", loss)
    run(tiny(tmp_path, log={"every": 4}))
    assert [(r["step"], r["loss"] is None, r["skipped"]) for r in records(tmp_path) if r["step"] in (5, 6, 8)] == [
        (5, False, 0),
        (6, True, 1),
        (8, False, 1),
    ]


@pytest.mark.parametrize("source", ["glyphs"])
def test_a_tokenizer_is_learnt_where_there_is_none(tiny, tmp_path, source):
    config = tiny(tmp_path, model={"start_from": None, "name": "ViT-Ti/4@32px", "tokenizer": "learn", "context": 9})
    config = replace(config, schedule=replace(config.schedule, steps=1), model=replace(config.model, vocabulary=600))
    run(config)
    model, tokenizer = clip.load(tmp_path), load_tokenizer(tmp_path)
    assert model.config.text.context == 9 and len(tokenizer) == model.config.text.vocabulary <= 600
    assert tokenizer("red picture number 7").shape == (1, 9)
