"""Several processes under torchrun, gloo on the CPU: DDP, FSDP2, a killed rank, another number of processes."""

import os
import re
import time
from dataclasses import replace

import psutil
import pytest
import torch
from tiny import assert_same, command, run, start, torchrun, wait_for_records, weights

from fastclip.clip import CausalTextConfig, Clip, VitConfig
from fastclip.clip.tokenizer import ClipTokenizer
from fastclip.train.files import save_model_folder

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A model folder without batch normalisation, whose statistics would be those of each process."""
    from tiny import COLOURS, MODEL, PAIRS

    tokenizer = ClipTokenizer.train([f"{c} picture number {i}" for c in COLOURS for i in range(PAIRS)], 540, 8)
    torch.manual_seed(0)
    image = VitConfig(image_size=8, patch_size=4, width=8, layers=2, head_width=4)
    text = CausalTextConfig(vocabulary=len(tokenizer), context=8, width=8, layers=2, head_width=4)
    config = replace(MODEL, image=image, text=text)
    folder = tmp_path_factory.mktemp("vit")
    save_model_folder(folder, config, tokenizer, Clip(config).state_dict())
    return folder


@pytest.fixture
def launch():
    """launch(config, folder, *options) starts `fastclip train` in two processes; what a test leaves is killed."""
    started = []

    def begin(config, folder, *options):
        started.append(start(torchrun(command(config, folder), *options)))
        return started[-1]

    yield begin
    for process in started:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
            process.communicate()


def finish(process, code=0):
    said, errors = process.communicate(timeout=180)
    assert process.returncode == code, errors[-9000:]
    return said, errors


def close(got, want):
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-3, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


SLOW = os.environ.get("FASTCLIP_SLOW") == "1"
# A larger eps than the default keeps Adam from making steps of the rounding errors of gradients that are zero.
ADAM = {"learning_rate": 1e-2, "eps": 1e-3, "ema": 0.5, "clip_norm": 0.3}
# A rate that only rises, so that other batches after a checkpoint would show.
STEADY = {"steps": 12, "warmup": 12.0}


FSDP = {"parallel": "fsdp", "micro_batch": 3, "loss": "siglip"}


@pytest.fixture
def settings(vit):
    return {"model": {"start_from": vit}, "optimizer": ADAM, "schedule": STEADY, "crop": (1.0, 1.0)}


def finish_two(processes):
    """What the first and the second process said."""
    for process in processes:
        process.join(120)
    said = [process.said.read_text() for process in processes]
    assert [process.exitcode for process in processes] == [0, 0], said
    return said


def test_ddp_is_one_process_and_a_killed_rank_changes_nothing(tiny, settings, tmp_path, fork_two, launch):
    want = run(tiny(tmp_path / "one", **settings))
    both = tiny(tmp_path / "two", **settings)
    said = finish_two(fork_two(both))
    assert "Training" in said[0] and not said[1]
    close(weights(tmp_path / "two"), want)
    close(weights(tmp_path / "two" / "ema"), weights(tmp_path / "one" / "ema"))

    # Evaluations change nothing, but give time to kill a process between two steps.
    evaluation = replace(both.evaluation, every=1, source=both.data.source, batch=8)
    often = replace(both.checkpoint, every=1)
    killed = replace(both, out=tmp_path / "killed", evaluation=evaluation, checkpoint=often)
    process = launch(killed, tmp_path, "--max-restarts=1")
    wait_for_records(killed.out, process, 4)
    workers_of(process)[1].kill()
    said, _ = finish(process)
    assert re.search(r"Resumed from \S+step-000000\d\d, after step \d+\.", said)
    assert_same(weights(killed.out), weights(tmp_path / "two"))


def test_fsdp_is_one_process_and_its_checkpoints_go_on_anywhere(tiny, settings, tmp_path, fork_two):
    alone = {**settings, **FSDP, "parallel": "ddp"}
    want = run(tiny(tmp_path / "one", **alone))
    both = tiny(tmp_path / "two", **settings, **FSDP)
    finish_two(fork_two(both))
    close(weights(tmp_path / "two"), want)
    close(weights(tmp_path / "two" / "ema"), weights(tmp_path / "one" / "ema"))

    # From step 8: in one process nearly the same, in two again bit for bit, and from one process's in two.
    step = "checkpoints/step-00000008"
    close(run(tiny(tmp_path / "down", resume=str(tmp_path / "two" / step), **alone)), want)
    again = replace(both, out=tmp_path / "again", resume=str(tmp_path / "two" / step))
    finish_two(fork_two(again))
    assert_same(weights(again.out), weights(both.out))
    up = replace(both, out=tmp_path / "up", resume=str(tmp_path / "one" / step))
    assert "not bit for bit: processes 1 -> 2" in finish_two(fork_two(up))[0]
    close(weights(up.out), want)


def workers_of(launcher):
    """The training processes of torchrun, by rank."""
    found = {}
    for child in psutil.Process(launcher.pid).children(recursive=True):
        rank = child.environ().get("RANK")
        if rank is not None and "fastclip" in child.cmdline():
            found[int(rank)] = child
    return found


@pytest.mark.skipif(not SLOW, reason="tests/distributed has it for the loss; FASTCLIP_SLOW=1 for the trainer")
def test_a_dead_rank_without_restarts_ends_all_within_seconds(tiny, tmp_path, launch):
    long = {"schedule": {"steps": 4000}, "checkpoint": {"every": 0}, "log": {"every": 1}}
    process = launch(tiny(tmp_path, **long), tmp_path)
    wait_for_records(tmp_path, process, 2)
    workers = list(workers_of(process).values())
    workers[0].kill()
    began = time.monotonic()
    process.communicate(timeout=60)
    assert process.returncode != 0 and time.monotonic() - began < 30
    assert not any(worker.is_running() for worker in workers)


def test_signal_to_one_process_stops_both_with_a_checkpoint(tiny, tmp_path, fork_two):
    long = {"schedule": {"steps": 4000}, "checkpoint": {"every": 0}, "log": {"every": 1}}
    processes = fork_two(tiny(tmp_path, **long))
    wait_for_records(tmp_path, processes[0], 2)
    processes[1].terminate()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [143, 143]
    assert "Stopped by a signal after step" in processes[0].said.read_text()
    (folder,) = (tmp_path / "checkpoints").iterdir()
    assert {"process-0.pt", "process-1.pt"} <= {path.name for path in folder.iterdir()}
