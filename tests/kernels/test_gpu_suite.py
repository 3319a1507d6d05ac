"""What of the GPU suite can be held without a GPU: it stays silent here, and its tables say what a file says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_path, gpu_tables
from fastclip import backends
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


def test_the_largest_batch_is_measured_before_the_other_widths():
    problems = gpu._problems(gpu._arguments(["--sizes", "4096", "8192"]))
    assert [p["n"] for p in problems[:5]] == [4096, 4096, 8192, 8192, gpu.LARGEST]
    assert {p["d"] for p in problems} == {256, 512, 768, 1024}


def test_tables_hold_measured_rows_alone(tmp_path):
    file, document = tmp_path / "r.json", tmp_path / "d.md"
    file.write_text(json.dumps(RESULTS))
    document.write_text(f"before\n{gpu_tables.OPEN}\nold\n{gpu_tables.CLOSE}\nafter\n")
    command = [sys.executable, "-m", "benchmarks.gpu_tables", str(file), "--docs", str(document)]
    subprocess.run(command, check=True, cwd=Path(gpu.ROOT))
    text = document.read_text()
    assert "| 4,096 | fastclip | 1.500 | 500 | 0.64 |  | 1,234 | 1.0e-03 |" in text
    assert "memeff" not in text and "old" not in text and text.endswith("after\n")


def test_a_checkout_imports_without_an_install(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_path, "ROOT", tmp_path)
    for folder in ("fastclip", "kernels", "benchmarks"):
        (tmp_path / folder).mkdir()
    (tmp_path / "fastclip" / "loss.py").write_text("")
    for _ in range(2):
        folder = gpu_path.linked()
    assert (folder / "fastclip" / "kernels").resolve() == tmp_path / "kernels"
    assert (folder / "fastclip" / "loss.py").is_symlink() and (folder / "benchmarks").is_dir()
