"""kill -9 at random moments: every resume succeeds, and the last one ends where the run that was never killed did."""

import os
import random
import signal
import time

import pytest
from tiny import assert_same, run, wait_for_records, weights

from fastclip.train import checkpoint

SLOW = os.environ.get("FASTCLIP_SLOW") == "1"
KILLS = 20 if SLOW else 3
STEPS_A_KILL = 40  # more than a process gets done before it is killed


def test_killed_at_random_moments(tiny, tmp_path, fork):
    steps = KILLS * STEPS_A_KILL
    settings = {"schedule": {"steps": steps}, "checkpoint": {"every": 1, "keep": 2}, "log": {"every": 5}}
    want = run(tiny(tmp_path / "never", **{**settings, "checkpoint": {"every": 0}}))

    luck = random.Random(0)
    out, reached = tmp_path / "killed", []
    for _ in range(KILLS):
        process = fork(tiny(out, resume="latest", **settings))
        # From the first record on, so that the moments fall into steps and checkpoints, not into the start.
        wait_for_records(out, process)
        time.sleep(luck.uniform(0, 0.3))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "it was to be killed, not to end"
        reached.append(newest_step(out))
    process = fork(tiny(out, resume="latest", **settings))
    process.join()
    assert process.exitcode == 0
    assert reached == sorted(reached) and 0 < reached[-1] < steps
    assert_same(weights(out), want)
    print(f"{KILLS} kills, after the checkpoints of steps {reached} of {steps}")


def newest_step(out):
    folder = checkpoint.newest(out, lambda text: pytest.fail(text))
    return 0 if folder is None else checkpoint.load_json(folder / "manifest.json")["step"]
