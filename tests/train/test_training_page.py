"""The commands of docs/training.md are commands of this version."""

import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from fastclip import cli
from fastclip.commands.train import Train
from fastclip.train import settings
from fastclip.train.config import TrainConfig

PAGE = Path(__file__).parents[2] / "docs" / "training.md"
TEXT = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else ""
LINES = TEXT.replace("\\\n", " ").splitlines()
COMMANDS = [line.strip() for line in LINES if "fastclip train " in line and line.startswith(("    ", "srun"))]


@pytest.fixture
def page():
    if not TEXT:
        pytest.skip("the documentation is not here")


@pytest.mark.parametrize("line", COMMANDS, ids=lambda line: line[:40])
def test_commands_are_understood(page, line, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(Train, "run", lambda self: seen.append(self))
    toml = tmp_path / "run.toml"
    toml.write_text(example(), encoding="utf-8")
    _, _, options = line.partition("fastclip train ")
    cli.main(["train", *(str(toml) if part == "run.toml" else part for part in shlex.split(options))])
    seen[0].check()


def example():
    return TEXT.partition("```toml\n")[2].partition("```")[0]


def test_the_page_has_commands_and_a_file(page, tmp_path):
    assert len(COMMANDS) >= 9
    (tmp_path / "run.toml").write_text(example(), encoding="utf-8")
    config = settings.read_settings(tmp_path / "run.toml", TrainConfig)
    assert config.batch == 4096 and config.precision.dtype == "bf16"


def test_every_setting_that_the_page_names_exists(page):
    known = {"help", "config", "resume"}
    for field in fields(TrainConfig):
        group = field.default_factory() if callable(field.default_factory) else None
        known |= {f"{field.name}.{name}" for name in vars(group)} if hasattr(group, "__dict__") else {field.name}
    named = {word.strip("`.,;:)(").removeprefix("--") for word in TEXT.split() if word.strip("`(").startswith("--")}
    outside = {"standalone", "nproc-per-node", "nnodes", "rdzv-backend", "rdzv-endpoint", "rdzv-id", "max-restarts"}
    outside |= {"nodes=8", "ntasks-per-node=1", "gpus-per-node=8", "signal=TERM@120", "run", "model"}
    for name in named - outside:
        option = name.replace("-", "_").replace(".no_", ".")
        assert option in known, f"docs/training.md names --{name}, which is no setting"
