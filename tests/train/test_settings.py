"""The configuration: files, the command line over them, and what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest

from fastclip import cli
from fastclip.commands.train import Train
from fastclip.data.config import DataConfig
from fastclip.errors import UserError
from fastclip.train import settings
from fastclip.train.config import (
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)
from fastclip.train.schedule import make_schedule

FULL = TrainConfig(
    out=Path("a b/ü"),
    micro_batch=64,
    loss="siglip",
    crop=(0.5, 1.0),
    model=ModelConfig(name="ViT-B/32", start_from=Path("x.pt"), lock_image=True),
    data=DataConfig(source=("a.tar", 'quote".tar'), captions=("one", "two\n"), buffer=7),
    optimizer=OptimizerConfig(betas=(0.9, 0.95), clip_norm=1.0),
    schedule=ScheduleConfig(samples=10**9),
    log=LogConfig(tensorboard=False),
)


def written(tmp_path, text):
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("config", [TrainConfig(), FULL], ids=["defaults", "everything"])
def test_what_is_written_is_what_is_read(tmp_path, config):
    path = written(tmp_path, settings.to_toml(settings.to_dict(config)))
    assert settings.read_settings(path, TrainConfig) == config


def test_settings_are_kept_as_toml_by_others_too(tmp_path):
    tomllib = pytest.importorskip("tomllib")
    assert tomllib.loads(settings.to_toml(settings.to_dict(FULL))) == settings.to_dict(FULL)


@pytest.fixture
def parsed(monkeypatch):
    """The Train command that arguments give, not run."""
    seen = []
    monkeypatch.setattr(Train, "run", lambda self: seen.append(self))

    def parse(*arguments):
        cli.main(["train", *arguments])
        return seen.pop()

    return parse


def test_the_command_line_has_the_last_word(parsed, tmp_path):
    path = written(tmp_path, 'batch = 64\nloss = "siglip"\n[optimizer]\nlearning-rate = 1\nbetas = [0.5, 0.75]\n')
    for given in (["--config", str(path)], [f"--config={path}"]):
        got = parsed("--batch", "128", *given, "--optimizer.weight-decay", "0.5")
        assert (got.batch, got.loss, got.config) == (128, "siglip", path)
        assert got.optimizer == OptimizerConfig(learning_rate=1.0, betas=(0.5, 0.75), weight_decay=0.5)
        assert got.schedule == ScheduleConfig()


def test_groups_reach_the_command(parsed):
    got = parsed(
        "--model.name", "RN50", "--data.source", "a.tar", "b.tar", "--log.no-tensorboard", "--micro-batch", "8"
    )
    assert (got.model.name, got.data.sources, got.log.tensorboard, got.micro_batch) == (
        "RN50",
        ("a.tar", "b.tar"),
        False,
        8,
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch = ", "run.toml is not TOML"),
        ("bach = 3", r"unknown setting bach; there are out, resume, batch, "),
        ("[optimizer]\nlr = 3", r"unknown setting optimizer\.lr; there are optimizer\.learning_rate, "),
        ('batch = "64"', "batch must be an integer, got '64'"),
        ("batch = 1.5", "batch must be an integer, got 1.5"),
        ("batch = true", "batch must be an integer, got True"),
        ('loss = "cosine"', "loss must be one of clip, siglip, got 'cosine'"),
        ("crop = [0.5]", "crop must be a list of 2, got"),
        ("model = 3", "model is a table of settings, got 3"),
        ("[data]\nsource = 3", "data.source must be a string or a list, got 3"),
    ],
)
def test_bad_files_are_one_line(capsys, tmp_path, text, message):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "--config", str(written(tmp_path, text))])
    assert stopped.value.code == 1
    with pytest.raises(UserError, match=message):
        settings.read_settings(written(tmp_path, text), TrainConfig)
    assert capsys.readouterr().err.count("\n") == 1


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*none\.toml: No such file"):
        settings.read_settings(tmp_path / "none.toml", TrainConfig)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": ScheduleConfig(steps=1, epochs=2.0)}, "give one of --schedule.steps and --schedule.epochs"),
        ({"schedule": ScheduleConfig(steps=0)}, "--schedule.steps must be more than 0, got 0"),
        ({"batch": 1}, "--batch must be at least 2, got 1"),
        ({"micro_batch": 0}, "--micro-batch must be at least 1, got 0"),
        ({"optimizer": OptimizerConfig(learning_rate=0.0)}, "--optimizer.learning-rate must be more than 0"),
        ({"optimizer": OptimizerConfig(learning_rate=float("nan"))}, "must be more than 0, got nan"),
        ({"optimizer": OptimizerConfig(ema=1.0)}, "--optimizer.ema must be between 0 and 1, got 1.0"),
        ({"data": DataConfig(buffer=0)}, "--data.buffer must be at least 1, got 0"),
    ],
)
def test_numbers_that_cannot_be_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        TrainConfig(**changes).check()


def test_differences_are_named():
    before, after = settings.to_dict(TrainConfig()), settings.to_dict(replace(TrainConfig(), micro_batch=3, seed=1))
    assert settings.differences(before, after) == ["micro_batch None -> 3", "seed 0 -> 1"]


@pytest.mark.parametrize(("warmup", "warm"), [(0.1, 10), (10.0, 10)], ids=["share", "steps"])
def test_learning_rate_rises_then_falls_to_nearly_zero(warmup, warm):
    schedule = make_schedule(ScheduleConfig(steps=100, warmup=warmup), batch=8, steps_per_epoch=None)
    rates = [schedule(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[warm - 1] == rates[warm] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True) and 0 < rates[-1] < 0.001


def test_length_in_epochs_and_samples():
    assert make_schedule(ScheduleConfig(epochs=2.5), 8, 10).steps == 25
    assert make_schedule(ScheduleConfig(), 8, 10).steps == 10
    assert make_schedule(ScheduleConfig(samples=83), 8, None).steps == 10
    with pytest.raises(UserError, match="length of an epoch is unknown"):
        make_schedule(ScheduleConfig(epochs=1.0), 8, None)
    with pytest.raises(UserError, match="7 are less than one batch of 8"):
        make_schedule(ScheduleConfig(samples=7), 8, None)
