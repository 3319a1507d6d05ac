"""The GPU benchmark's training steps and its worker, on a processor: the values are the same there."""

import os
import time

import pytest
import torch

from fastclip import clip_loss
from fastclip.benchmarks import gpu_training
from fastclip.benchmarks.gpu_training import Step, small
from fastclip.benchmarks.gpu_worker import Worker, WorkerDiedError

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: the benchmark runs on it")
BATCH, MICRO_BATCH = 23, 5  # four whole micro-batches and one of 3


@pytest.fixture
def from_formula(monkeypatch):
    """Without open_clip, whose import takes seconds."""
    monkeypatch.setitem(__import__("sys").modules, "open_clip", None)


def whole_batch(step):
    """Gradients of one graph over the whole batch, pictures made in the same micro-batches."""
    images = torch.cat([step.encode_image(rows) for rows in step.rows.split(MICRO_BATCH)])
    clip_loss(images, step.model.encode_text(step.tokens), step.model.logit_scale).backward()
    found = {name: p.grad for name, p in step.model.named_parameters()}
    step.model.zero_grad()
    return found


@pytest.mark.parametrize("way", gpu_training.LABELS)
def test_gradients_are_the_whole_batch_s(way, from_formula):
    step = Step(small(way, BATCH, MICRO_BATCH))
    want = whole_batch(step)
    loss = step.gradients(BATCH)
    assert loss.isfinite()
    for name, parameter in step.model.named_parameters():
        # --accum-freq gives the scale its gradient once for every micro-batch.
        times = 5.0 if (way, name) == ("accumulated", "log_scale") else 1.0
        torch.testing.assert_close(parameter.grad, times * want[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_case_gives_one_row_of_figures(dtype, from_formula):
    *tried, row = gpu_training.run_case(small("cached", BATCH, MICRO_BATCH, dtype), left_s=1e3)
    assert all("trying" in message for message in tried)
    assert row["images_per_s"] == pytest.approx(1e3 * BATCH / row["step_ms"], rel=1e-2)
    assert row["steps_timed"] == len(row["runs_ms"]) >= 1
    assert 0 < row["loss_share"] < 1 and 0 < row["mfu"] < row["mfu_with_recomputation"] < 2
    assert row["loss_from"] == "fastclip.clip_loss"


def test_the_ways_go_through_the_same_losses(from_formula):
    rows = [list(gpu_training.run_case(small(way, BATCH, MICRO_BATCH), 1e3))[-1] for way in gpu_training.LABELS]
    first, *others = (row["losses"][0] for row in rows)
    assert others == pytest.approx([first] * len(others), rel=1e-3)


def test_model_flops_are_three_forward_passes(from_formula):
    from torch.utils.flop_counter import FlopCounterMode

    step = Step(small("cached", BATCH, BATCH))
    with FlopCounterMode(display=False) as counter:
        step.encode_image(step.rows), step.model.encode_text(step.tokens)
    assert step.model_flop() == pytest.approx(3 * counter.get_total_flops(), rel=0.05)


def test_a_step_that_does_not_fit_the_time_is_not_made(from_formula):
    *_, row = gpu_training.run_case(small("cached-dense", BATCH, MICRO_BATCH), left_s=0.0)
    assert "not run" in row["note"] and "step_ms" not in row and row["loss_from"] == "its formula"


def test_the_issue_s_batches_are_cases():
    cases = {(case.way, case.batch) for case in gpu_training.CASES}
    assert {("cached", 32768), ("cached", 131072), ("cached-dense", 32768), ("accumulated", 32768)} <= cases
    assert all(case.model == "ViT-B/32" and case.dtype == "bf16" for case in gpu_training.CASES)


def rows_of(numbers):
    yield {"trying": "rows"}
    yield from ({"number": number} for number in numbers)


def fails():
    yield {"trying": "a failure"}
    raise KeyError("a message")


def dies():
    yield {"trying": "death"}
    os._exit(7)


def hangs():
    yield {"trying": "sleep"}
    time.sleep(60)


def test_a_worker_survives_what_its_tasks_do():
    worker, limits = Worker(), {"step_s": 60.0, "until": time.monotonic() + 120}
    try:
        assert worker.run(rows_of, [1, 2], **limits) == [{"number": 1}, {"number": 2}]
        with pytest.raises(RuntimeError, match="KeyError: 'a message'"):
            worker.run(fails, **limits)
        with pytest.raises(WorkerDiedError, match="ended with code 7") as died:
            worker.run(dies, **limits)
        assert died.value.trying == "death"
        assert worker.run(rows_of, [3], **limits) == [{"number": 3}]
        with pytest.raises(WorkerDiedError, match="without a result") as died:
            worker.run(hangs, **limits | {"step_s": 1.0})
        assert died.value.trying == "sleep"
    finally:
        worker.close()
