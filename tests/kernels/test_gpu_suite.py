"""What of the GPU suite can be held without a GPU: it stays silent here, and its tables say what a file says."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_path, gpu_tables
from fastclip import backends
from fastclip.benchmarks import gpu_losses, gpu_tests, gpu_training, report
from fastclip.benchmarks.gpu_peers import GPU_PEERS
from fastclip.benchmarks.gpu_rows import from_gpu
from fastclip.benchmarks.gpu_worker import WorkerDiedError
from fastclip.tune import TuneConfig, tune

RESULTS = {
    "machine": {
        "gpu": "a GPU",
        "memory_gib": 80.0,
        "driver": "1",
        "torch": "2.10",
        "triton": "3.6",
        "commit": "abc",
        "date": "2026-01-31T00:00:00",
    },
    "rows": [
        {"n": 4096, "d": 512, "dtype": "bf16", "mode": "forward+backward", "peer": "triton", "label": "fastclip",
         "family": "softmax", "ms": 1.5, "tflops": 500.2, "share": 0.64, "peak_mib": 1234.5, "error": 1e-3},
        {"n": 4096, "d": 512, "dtype": "bf16", "mode": "forward+backward", "peer": "memeff", "label": "memeff",
         "family": "softmax", "note": "memeff is not installed"},
        {"n": 8192, "d": 512, "dtype": "bf16", "training": True, "peer": None, "note": "not run"},
    ],
    "tests": {"passed": 100, "skipped": 2, "failed": ["a::b"], "note": "pytest ended with code 1", "seconds": 99.9},
    "training": [
        {"way": "cached", "label": "GradCache", "model": "ViT-B/32", "batch": 32768, "step_ms": 8000.0,
         "images_per_s": 4096.0, "mfu": 0.4, "mfu_with_recomputation": 0.533, "loss_share": 0.011, "peak_mib": 40960,
         "steps_timed": 1},
        {"way": "cached-dense", "label": "dense", "model": "ViT-B/32", "batch": 131072, "note": "out of memory"},
    ],
}  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_nothing_is_run_or_written(capsys, monkeypatch, tmp_path):
    out = tmp_path / "results.json"
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(out)])
    assert gpu.main() == 0
    assert "no CUDA device" in capsys.readouterr().out and not out.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_tuning_and_the_backend_say_what_is_missing():
    with pytest.raises(RuntimeError, match="no CUDA device"):
        tune(TuneConfig())
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run this: no CUDA device"):
        backends.choose(torch.zeros(2, 2), "triton")


def test_tuning_refuses_unknown_names():
    with pytest.raises(ValueError, match="--kernels takes one or more of sums"):
        TuneConfig(kernels=("fast",))


def test_what_matters_most_is_measured_first():
    tasks = gpu._tasks(gpu._arguments(["--sizes", "4096", "8192"]))
    assert [task["n"] for task in tasks[:2]] == [8192, 8192]
    assert tuple(tasks[2:9]) == gpu_training.CASES
    assert [task["n"] for task in tasks[9:12]] == [gpu.LARGEST, 4096, 4096]
    assert {task["d"] for task in tasks[9:]} == {256, 512, 768, 1024}
    assert gpu._tasks(gpu._arguments(["--only", "training"])) == list(gpu_training.CASES)


def test_tables_hold_measured_rows_alone(tmp_path):
    file, document = tmp_path / "r.json", tmp_path / "d.md"
    file.write_text(json.dumps(RESULTS))
    document.write_text(f"before\n{gpu_tables.OPEN}\nold\n{gpu_tables.CLOSE}\nafter\n")
    command = [sys.executable, "-m", "benchmarks.gpu_tables", str(file), "--docs", str(document)]
    subprocess.run(command, check=True, cwd=Path(gpu.ROOT))
    text = document.read_text()
    assert "| 4,096 | fastclip | 1.500 | 500 | 0.64 |  | 1,234 | 1.0e-03 |" in text
    assert "Not measured: memeff (memeff is not installed)." in text
    assert "100 passed, 2 skipped, failed: `a::b` (pytest ended with code 1); 100 s." in text
    assert "| ViT-B/32, 32,768 | GradCache | 4,096 | 0.400 | 0.533 | 1.1% | 40.0 | 1 |" in text
    assert "Not measured: dense at 131,072 (out of memory)." in text
    assert "old" not in text and text.endswith("after\n")


def test_a_file_of_the_suite_is_read_like_the_others():
    notes = {"a": "it would need 64 GiB", "b": "AssertionError: not here", "c": "failed: it ended the process (x)",
             "d": "wrong: relative error 1.0e+00", "e": "e is not installed; pip install e"}  # fmt: skip
    rows = [{**RESULTS["rows"][1], "peer": peer, "note": note} for peer, note in notes.items()]
    found = from_gpu({**RESULTS, "rows": rows, "settings": {}})
    assert [row.status for row in found.rows] == ["out of memory", "failed", "failed", "wrong", "not run"]
    assert [line["images/s"] for line in found.extra["training"]] == [4096.0, None]
    assert "| dense | 131,072 |" in report.named_table(found, "extra-training")


def test_a_checkout_imports_without_an_install(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_path, "ROOT", tmp_path)
    for folder in ("fastclip", "kernels", "benchmarks"):
        (tmp_path / folder).mkdir()
    (tmp_path / "fastclip" / "loss.py").write_text("")
    for _ in range(2):
        folder = gpu_path.linked()
    assert (folder / "fastclip" / "kernels").resolve() == tmp_path / "kernels"
    assert (folder / "fastclip" / "loss.py").is_symlink() and (folder / "benchmarks").is_dir()


NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: the suite itself runs")


@NO_GPU
def test_a_rehearsal_runs_every_part_and_writes_the_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "run_tests", lambda *_, **__: {"passed": 0, "skipped": 0, "failed": [], "seconds": 0.0})
    out = tmp_path / "results.json"
    wanted = ["--sizes", "64", "--widths", "32", "--minutes", "3", "--no-largest"]
    assert gpu.main(["--rehearse", *wanted, "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert {row["way"] for row in report["training"] if "step_ms" in row} == set(gpu_training.LABELS)
    measured = {(row["peer"], row["mode"]) for row in report["rows"] if "ms" in row}
    assert {("triton", "forward"), ("triton", "forward+backward"), ("chunked", "forward+backward")} <= measured
    assert all(row["error"] < 0.03 for row in report["rows"] if row["peer"] == "triton")
    assert "MFU" in capsys.readouterr().out and "images/s" in gpu_tables.tables(report)


@NO_GPU
@pytest.mark.parametrize("training", [False, True])
def test_large_batches_are_checked_on_samples_and_peers_beside_fastclip(training, monkeypatch):
    monkeypatch.setattr(gpu_losses, "CHUNKED_ROWS", 100)
    monkeypatch.setattr(gpu_losses, "GROUP_MS", 1.0)
    skip = {name: "not here" for name, peer in GPU_PEERS.items() if peer.compiles}
    rows = [row for row in gpu_losses.run_problem(300, 64, "fp32", training, skip) if "trying" not in row]
    by_peer = {row["peer"]: row for row in rows}
    assert by_peer["triton"]["checked_by"] == "float64 of 64 rows and columns"
    assert by_peer["dense"]["checked_by"] == "fastclip's triton"
    assert all(by_peer[name]["error"] < 1e-3 for name in ("triton", "dense", "openclip", "chunked", "sigmoid"))
    assert by_peer["compile"]["note"] == "not here"


@NO_GPU
@pytest.mark.parametrize("n", [64, 300], ids=["beside float64", "sampled"])
def test_wrong_and_failing_peers_are_notes_and_the_rest_goes_on(n, monkeypatch):
    def twice(image, text, scale):
        return 2 * GPU_PEERS["dense"].build()(image, text, scale)

    def fails():
        raise AssertionError("not on this GPU")

    wrong, broken = replace(GPU_PEERS["dense"], build=lambda: twice), replace(GPU_PEERS["chunked"], build=fails)
    ours = {name: GPU_PEERS[name] for name in ("triton", "openclip")}
    for key, value in {"CHUNKED_ROWS": 100, "GROUP_MS": 1.0}.items():
        monkeypatch.setattr(gpu_losses, key, value)
    monkeypatch.setattr(gpu_losses, "GPU_PEERS", {**ours, "dense": wrong, "chunked": broken})
    rows = {row.get("peer"): row for row in gpu_losses.run_problem(n, 32, "bf16", True, {})}
    assert "ms" in rows["triton"] and "ms" in rows["openclip"]
    assert rows["dense"]["note"].startswith("wrong: relative error 1.0e+00")
    assert rows["chunked"]["note"] == "AssertionError: not on this GPU"
    # fastclip's own result, if wrong, is not what others are compared with.
    halved = replace(GPU_PEERS["triton"], build=lambda: lambda *args: 0.5 * GPU_PEERS["dense"].build()(*args))
    monkeypatch.setattr(gpu_losses, "GPU_PEERS", {"triton": halved, "openclip": GPU_PEERS["openclip"]})
    rows = {row.get("peer"): row for row in gpu_losses.run_problem(n, 32, "bf16", True, {})}
    assert rows["triton"]["note"].startswith("wrong") and ("ms" in rows["openclip"]) == (n == 64)


class _Dies:
    """A worker in which one peer ends the process each time."""

    def __init__(self, peer):
        self.peer, self.skipped = peer, []

    def run(self, task, *arguments, step_s, until):
        skip = arguments[-1]
        self.skipped.append(dict(skip))
        if self.peer not in skip:
            raise WorkerDiedError("illegal memory access", self.peer)
        return [{"n": 8192, "d": 512, "dtype": "bf16", "mode": "forward", "peer": "dense", "label": "dense", "ms": 1e3,
                 "tflops": 1.0, "share": 0.5}]  # fmt: skip

    def close(self):
        pass


def _suite(tmp_path, worker, *flags):
    suite = gpu.Suite(gpu._arguments(["--rehearse", "--out", str(tmp_path / "r.json"), *flags]))
    suite.worker = worker
    return suite


def test_a_peer_that_ends_the_process_is_left_out_from_then_on(tmp_path):
    worker = _Dies("inf-cl")
    suite = _suite(tmp_path, worker, "--only", "losses", "--sizes", "8192", "32768", "--no-largest", "--widths", "512")
    suite.benchmarks()
    assert len(worker.skipped) == 5 and "illegal memory access" in worker.skipped[1]["inf-cl"]
    assert all("had ended the process at N = 8,192" in skip["inf-cl"] for skip in worker.skipped[2:])
    # One second a call at 8,192 pairs would be sixteen at 32,768.
    assert worker.skipped[3]["dense"] == "not run: it would take about 16 s a call"
    assert len(json.loads(suite.path.read_text())["rows"]) == 4


def test_our_own_kernel_is_tried_again_on_the_next_problem(tmp_path):
    worker = _Dies("triton")
    suite = _suite(tmp_path, worker, "--only", "losses", "--sizes", "8192", "--no-largest", "--widths", "512")
    suite.benchmarks()
    assert ["triton" in skip for skip in worker.skipped] == [False, True, False, True]


def test_nothing_is_begun_after_the_time_limit(tmp_path):
    worker = _Dies("inf-cl")
    suite = _suite(tmp_path, worker, "--minutes", "0")
    suite.benchmarks()
    report = json.loads(suite.path.read_text())
    notes = {row["note"] for row in report["rows"] + report["training"]}
    assert notes == {"not run: the time limit had passed"} and worker.skipped == []


def test_failing_and_late_gpu_tests_are_told(tmp_path, capfd):
    file = tmp_path / "test_some.py"
    file.write_text("import time\ndef test_a(): pass\ndef test_b(): assert 0\ndef test_c(): time.sleep(60)\n")
    report = gpu_tests.run_tests(10.0, tests=(file,))
    assert report["passed"] == 1 and len(report["failed"]) == 1 and report["failed"][0].endswith("test_b")
    assert report["note"] == "ended after 10 s" and "test_b" in report["log"]
    assert "test_a PASSED" in capfd.readouterr().out
