"""A model and a data set so small that a run of several steps takes less than a second."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

from fastclip.clip import Clip, ClipConfig, ConvConfig, TextConfig
from fastclip.clip.tokenizer import BpeTokenizer
from fastclip.data.config import DataConfig
from fastclip.train import settings
from fastclip.train.config import (
    CheckpointConfig,
    EvaluationConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    PrecisionConfig,
    ScheduleConfig,
    TrainConfig,
)
from fastclip.train.files import save_model_folder
from fastclip.train.trainer import train

PAIRS = 40  # five batches of 8 an epoch: twelve steps begin the third epoch
COLOURS = ("red", "green", "blue", "grey")
MODEL = ClipConfig(
    embed_dim=8,
    image=ConvConfig(image_size=8, channels=3, widths=(4,), blocks=(1,), hidden=8),
    text=TextConfig(vocabulary=60, context=8, width=8, layers=1, head_width=4),
)


def make_data(folder: Path) -> str:
    """PAIRS pictures with captions, all different, as a table."""
    lines = ["path,caption"]
    for i in range(PAIRS):
        Image.new("RGB", (8 + i % 3, 9), (6 * i, 255 - 5 * i, 40 + i)).save(folder / f"{i}.png")
        lines.append(f"{i}.png,{COLOURS[i % 4]} picture number {i}")
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    return str(folder / "pairs.csv")


def make_start(folder: Path) -> Path:
    """A model folder with fresh weights, for --model.start-from."""
    words = [f"{colour} picture number {i}" for colour in COLOURS for i in range(PAIRS)]
    tokenizer = BpeTokenizer.train(words, 60, 8)
    torch.manual_seed(0)
    config = ClipConfig.from_dict(
        {**MODEL.to_dict(), "text": {**MODEL.to_dict()["text"], "vocabulary": len(tokenizer)}}
    )
    save_model_folder(folder, config, tokenizer, Clip(config).state_dict())
    return folder


def tiny_config(start: Path, data: str, out: Path, /, **changes) -> TrainConfig:
    """Twelve steps of 8 pairs, a checkpoint every four. Changes: fields of TrainConfig, or dicts for its groups."""
    groups = {
        "model": ModelConfig(start_from=start),
        "data": DataConfig(source=data),
        "optimizer": OptimizerConfig(learning_rate=1e-2),
        "schedule": ScheduleConfig(steps=12),
        "precision": PrecisionConfig(),
        "evaluation": EvaluationConfig(every=0),
        "checkpoint": CheckpointConfig(every=4, keep=2),
        "log": LogConfig(every=1, accuracy_every=4, tensorboard=False),
    }
    for name, group in groups.items():
        given = changes.pop(name, {})
        groups[name] = replace(group, **given)
    return TrainConfig(**{"out": out, "batch": 8, **groups, **changes})


def run(config: TrainConfig) -> dict[str, torch.Tensor]:
    """Train in this process to the end; the weights of the run's model."""
    assert train(config) == 0
    return weights(config.out)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), f"{name} differs by up to {(got[name] - tensor).abs().max()}"


def command(config: TrainConfig, folder: Path, *options: str) -> list[str]:
    """The command line `fastclip train` for `config`, through a TOML file."""
    path = folder / "settings.toml"
    path.write_text(settings.to_toml(settings.to_dict(config)))
    return [sys.executable, "-m", "fastclip", "train", "--config", str(path), *options]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def start(arguments: list[str], **more: str) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(arguments, text=True, env=environment(**more), **pipes)


def torchrun(arguments: list[str], *options: str, processes: int = 2) -> list[str]:
    """The same command in several processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*launcher, *options, *arguments[1:]]


def main_quietly(config: TrainConfig, folder: Path, **environment: str) -> None:
    """`fastclip train` in this process, with what it says in FOLDER/said.txt."""
    from fastclip import cli

    os.environ |= environment
    torch.set_num_threads(1)
    with (folder / "said.txt").open("w") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
        cli.main(command(config, folder)[3:])


def main_on_a_full_disk(config: TrainConfig, folder: Path) -> None:
    """main_quietly, but from the checkpoint of step 3 on no file may grow beyond 1,000 bytes."""
    import resource

    from fastclip.train import checkpoint

    save_state = checkpoint.save_state

    def limited(into: Path, state: object, world: object) -> None:
        if state.step == 3:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        save_state(into, state, world)

    checkpoint.save_state = limited
    main_quietly(config, folder)


def as_torchrun(rank: int, size: int, port: int) -> dict[str, str]:
    """The environment that torchrun gives its processes; the first one hosts the store."""
    named = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    named |= {"TORCHELASTIC_RUN_ID": "tests", "TORCHELASTIC_RESTART_COUNT": 0}
    return {name: str(value) for name, value in named.items()}


def wait_for_records(out: Path, process: multiprocessing.Process | subprocess.Popen, records: int = 1) -> None:
    """Until the run has written so many more lines of metrics.jsonl; fails after a minute."""
    began, path = time.monotonic(), out / "metrics.jsonl"
    count = lambda: path.read_text().count("\n") if path.exists() else 0  # noqa: E731
    before = count()
    while count() < before + records:
        alive = process.is_alive() if hasattr(process, "is_alive") else process.poll() is None
        assert alive and time.monotonic() - began < 60, "the run writes no records"
        time.sleep(0.005)
