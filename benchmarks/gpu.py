"""`make gpu`: the GPU tests, then the benchmark, on one NVIDIA GPU, within a time limit. Nothing from the network.

    python -m benchmarks.gpu                   tests and the whole table
    python -m benchmarks.gpu --no-tests        the table alone
    python -m benchmarks.gpu --minutes 4 --widths 512 --sizes 8192 32768

Every result is checked before it is timed (gpu_check.py). Runs are paired and interleaved, figures are medians, and the
matrix product that is the ceiling is timed between them. Writes benchmarks/results/<gpu>-<date>.json; gpu_tables.py
makes the tables and plots of docs/performance.md from such files. Without a GPU it says so and writes nothing.
"""

import argparse
import gc
import json
import os
import platform
import re
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from statistics import median

import torch

from fastclip.benchmarks.problems import LOGIT_SCALE, POSITIVE_COSINE

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
GROUP_MS = 1200.0  # time for the paired runs of one N, D and mode
LARGEST = 1_048_576


def main(argv: list[str] | None = None) -> int:
    """argv: the flags, those of the command line if None."""
    args = _arguments(argv)
    if not torch.cuda.is_available():
        print("benchmarks.gpu: no CUDA device here; nothing was run and nothing was written")
        return 0
    from fastclip.backends import triton

    reason = triton.why_not(None)
    if reason is not None:
        print(f"benchmarks.gpu: the Triton backend cannot run here: {reason}", file=sys.stderr)
        return 1
    deadline = time.monotonic() + 60 * args.minutes
    if args.tests and _run_tests(timeout_s=60 * args.minutes * 0.6):
        print("benchmarks.gpu: tests failed, nothing is timed", file=sys.stderr)
        return 1
    settings = vars(args) | {"scale": LOGIT_SCALE, "cosine": POSITIVE_COSINE}
    report = {"machine": machine(), "settings": settings, "rows": []}
    path = args.out or RESULTS / f"{file_stem()}.json"
    print(f"{'N':>9} {'D':>5} {'dtype':5} {'mode':17} {'peer':28} {'ms':>10} {'TFLOP/s':>8} {'share':>6} {'MiB':>8}")
    for problem in _problems(args):
        if time.monotonic() > deadline:
            report["rows"].append({**problem, "peer": None, "note": "not run: the time limit had passed"})
            continue
        for row in run_problem(**problem):
            report["rows"].append(row)
            print(_line(row), flush=True)
        _save(path, report)
    _save(path, report)
    print(f"Results: {path}")
    return 0


def run_problem(n: int, d: int, dtype: str, training: bool) -> list[dict]:
    """One row a peer: checked, then timed in turn with the others, the ceiling and x @ y.T alone."""
    from fastclip.benchmarks.gpu_check import CHUNKED_ROWS, TOLERANCE, sampled_error, truth, worst_error
    from fastclip.benchmarks.gpu_measure import batch, ceiling, interleaved, logits_alone, make_call, peak_mib, tflops
    from fastclip.benchmarks.gpu_peers import GPU_PEERS

    data = batch(n, d, DTYPES[dtype], scale=LOGIT_SCALE, cosine=POSITIVE_COSINE)
    expected, rows, calls = {}, [], {}
    mode = "forward+backward" if training else "forward"
    base = {"n": n, "d": d, "dtype": dtype, "mode": mode}
    free_mib = torch.cuda.mem_get_info()[0] / 2**20
    for name, peer in GPU_PEERS.items():
        row = {**base, "peer": name, "label": peer.label, "family": peer.family}
        note = peer.why_not() or _too_large(peer, n, free_mib)
        if dtype not in peer.dtypes:
            note = f"it has no {dtype}"
        if note is None:
            try:
                call = make_call(peer.build(), data, training)
                found = call()
                if peer.family not in expected:
                    small = n <= CHUNKED_ROWS
                    row["checked_by"] = "float64" if small else f"float64 of {64} rows"
                    expected[peer.family] = truth(data, peer.family, training) if small else found
                    first = small or peer.family != "softmax"
                    row["error"] = worst_error(found, expected[peer.family]) if first else sampled_error(data, found)
                else:
                    row["error"] = worst_error(found, expected[peer.family])
                del found
                if row["error"] <= TOLERANCE[DTYPES[dtype]]:
                    row["peak_mib"] = round(peak_mib(call), 1)
                    calls[name] = call
                else:
                    note = f"wrong: relative error {row['error']:.1e}"
            except (RuntimeError, TypeError, ValueError, ImportError, torch.OutOfMemoryError) as error:
                note = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}" if str(error) else "failed"
        if note is not None:
            row["note"] = note
        rows.append(row)
    if not calls:
        return rows
    expected.clear()
    calls["ceiling"] = ceiling(DTYPES[dtype])
    if not training and n * n * 4 / 2**20 < free_mib / 2:
        calls["x @ y.T"] = logits_alone(data)
    times = interleaved(calls, GROUP_MS)
    rate = tflops(2 * 8192**3, times.pop("ceiling"))
    if "x @ y.T" in times:
        rows.append({**base, "peer": "x @ y.T", "label": "x @ y.T alone, stored", "family": "product"})
    for row in rows:
        if row["peer"] in times:
            runs = times[row["peer"]]
            flop = _flop(row["family"], training) * n * n * d
            row |= {"ms": round(median(runs), 4), "runs_ms": [round(t, 4) for t in runs]}
            row |= {"tflops": round(tflops(flop, runs), 1), "ceiling_tflops": round(rate, 1)}
            row["share"] = round(row["tflops"] / rate, 3)
            if row["family"] == "softmax" and "triton" in times:
                paired = [a / b for a, b in zip(runs, times["triton"], strict=True)]
                row["times_of_fastclip"] = round(median(paired), 3)
    del calls, data
    gc.collect()
    torch.cuda.empty_cache()
    return rows


def machine() -> dict:
    """Everything a reader needs to judge or repeat a measurement."""
    import triton

    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "clocks": _output("nvidia-smi", "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "commit": _output("git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def file_stem() -> str:
    """Such as nvidia-h200-2026-01-31."""
    return f"{_slug(torch.cuda.get_device_name())}-{datetime.now(timezone.utc).date()}"


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="no new problem is begun after this many minutes")
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 256, 768, 1024], help="embedding widths D")
    parser.add_argument("--sizes", type=int, nargs="+", default=[4096, 8192, 16384, 32768, 65536, 131072, 262144])
    parser.add_argument("--dtypes", nargs="+", default=["bf16"], choices=list(DTYPES))
    parser.add_argument("--no-tests", dest="tests", action="store_false", help="the benchmark alone")
    parser.add_argument("--no-largest", dest="largest", action="store_false", help="leave the million pairs out")
    parser.add_argument("--out", type=Path, default=None, help="results file")
    return parser.parse_args(argv)


def _problems(args: argparse.Namespace) -> list[dict]:
    """The headline width first and whole, then the million pairs, then the other widths."""
    first, *others = args.widths
    sizes = sorted(args.sizes)
    problems = [_problem(n, first, args.dtypes[0], training) for n in sizes for training in (False, True)]
    if args.largest:
        problems.append(_problem(LARGEST, first, args.dtypes[0], True))
    problems += [_problem(n, d, args.dtypes[0], training) for d in others for n in sizes for training in (False, True)]
    for dtype in args.dtypes[1:]:
        problems += [_problem(n, first, dtype, training) for n in sizes for training in (False, True)]
    return problems


def _problem(n: int, d: int, dtype: str, training: bool) -> dict:
    return {"n": n, "d": d, "dtype": dtype, "training": training}


def _flop(family: str, training: bool) -> int:
    """FLOP over N^2 D that the loss cannot avoid: S, and in training S again (softmax alone) and two products."""
    if not training or family == "product":
        return 2
    return 8 if family == "softmax" else 6


def _too_large(peer, n: int, free_mib: float) -> str | None:
    needed = peer.matrices * 4 * n * n / 2**20
    if needed > 0.8 * free_mib:
        return f"it would need {needed / 1024:.0f} GiB"
    if n > 300_000 and peer.name != "triton":
        return "measured up to 262,144 pairs"
    return None


def _run_tests(timeout_s: float) -> int:
    tests = str(ROOT / "tests" / "kernels" / "gpu")
    # Its own settings: the suite's conftest and strict warnings ask for packages and versions that may not be here.
    options = ["-q", "-x", "-p", "no:cacheprovider", "-o", "addopts=", "-o", "filterwarnings=default", "--durations=5"]
    command = [sys.executable, "-m", "pytest", *options, "--confcutdir", tests, tests]
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    try:
        return subprocess.run(command, env=environment, timeout=timeout_s).returncode
    except subprocess.TimeoutExpired:
        print(f"benchmarks.gpu: the tests took more than {timeout_s:.0f} s", file=sys.stderr)
        return 1


def _line(row: dict) -> str:
    head = f"{row['n']:9,d} {row['d']:5d} {row['dtype']:5} {row['mode']:17} {row['label']:28}"
    if "ms" not in row:
        return f"{head} {row.get('note', '')}"
    return f"{head} {row['ms']:10.3f} {row['tflops']:8.1f} {row['share']:6.3f} {row.get('peak_mib', 0):8.0f}"


def _save(path: Path, report: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".new").write_text(json.dumps(report, indent=1, default=str) + "\n")
    path.with_suffix(".new").replace(path)


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


if __name__ == "__main__":
    sys.exit(main())
