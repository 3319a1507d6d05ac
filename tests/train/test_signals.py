"""SIGTERM and SIGINT: the step is finished, a checkpoint written, and the run can go on."""

import os
import signal
import threading

import pytest
from tiny import assert_same, run, wait_for_records

from fastclip.train.interrupt import interrupts

SIGNALS = pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["TERM", "INT"]
)


@SIGNALS
def test_signal_writes_a_checkpoint_and_the_resumed_run_ends_as_one_never_stopped(tiny, tmp_path, fork, number, code):
    # Long enough to be met in the middle; no checkpoint but that of the signal.
    settings = {"schedule": {"steps": 150}, "checkpoint": {"every": 0}, "log": {"every": 1}}
    process = fork(tiny(tmp_path / "run", **settings))
    wait_for_records(tmp_path / "run", process, 3)
    os.kill(process.pid, number)
    process.join(60)
    said = process.said.read_text()
    assert process.exitcode == code, said
    assert "Stopped by a signal after step" in said and "Traceback" not in said
    (folder,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert 0 < int(folder.name.removeprefix("step-")) < 150 and not (tmp_path / "run" / "model.safetensors").exists()
    assert_same(run(tiny(tmp_path / "run", resume="latest", **settings)), run(tiny(tmp_path / "never", **settings)))


@pytest.fixture
def alone(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)


@pytest.mark.parametrize(("number", "error"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_second_signal_stops_at_once(alone, number, error):
    before = signal.getsignal(number)
    with pytest.raises(error), interrupts() as interrupted:
        assert interrupted() == 0
        os.kill(os.getpid(), number)
        assert interrupted() == number
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) == before


def test_torchruns_echo_of_a_signal_is_not_a_second_one(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with interrupts() as interrupted:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupted() == signal.SIGINT


def test_outside_the_main_thread_signals_are_left_alone():
    seen = []

    def enter():
        with interrupts() as interrupted:
            seen.append(interrupted())

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [0]
