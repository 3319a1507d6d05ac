"""`make gpu`: the GPU tests, then the benchmarks, on one NVIDIA GPU, within a time limit. Nothing from the network.

    python -m benchmarks.gpu                   tests, losses and training steps
    python -m benchmarks.gpu --only losses     the losses' table alone
    python -m benchmarks.gpu --minutes 4 --widths 512 --sizes 8192 32768

Every result is checked before it is timed (gpu_check.py). Runs are paired and interleaved, figures are medians, and the
matrix product that is the ceiling is timed between them. What fails is a row with a note, and the rest goes on. Writes
benchmarks/results/<gpu>-<date>.json, anew after each problem; gpu_tables.py makes the tables and plots of
docs/performance_gpu.md from such files. Without a GPU it says so and writes nothing; --rehearse runs it all on the
processor, with tiny numbers that mean nothing.
"""

import argparse
import json
import platform
import re
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import torch

from fastclip.benchmarks import gpu_losses, gpu_training
from fastclip.benchmarks.gpu_peers import GPU_PEERS
from fastclip.benchmarks.gpu_tests import run_tests
from fastclip.benchmarks.gpu_worker import Worker, WorkerDiedError
from fastclip.benchmarks.problems import LOGIT_SCALE, POSITIVE_COSINE

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PARTS = ("tests", "losses", "training")
CORE_SIZES = (8192, 32768, 65536, 131072)  # measured before the others
LARGEST = 1_048_576
COMPILED_SIZES = (8192, 32768)  # torch.compile takes many seconds a size
PEERS_LARGEST = 300_000
TESTS_SHARE, TRAINING_SHARE = 0.4, 0.4  # of the time limit, at most
STEP_S = {"losses": 75.0, "training": 150.0}  # without a sign of life, after which a process is ended
GRACE_S = 45.0  # after the time limit, for what has begun
SLOWEST_MS = 3000.0  # another's call that is expected to take longer is not made


def main(argv: list[str] | None = None) -> int:
    """argv: the flags, those of the command line if None. 1 if a test failed or the backend cannot run."""
    args = _arguments(argv)
    if not torch.cuda.is_available() and not args.rehearse:
        print("benchmarks.gpu: no CUDA device here; nothing was run and nothing was written")
        return 0
    if not args.rehearse:
        from fastclip.backends import triton

        reason = triton.why_not(None)
        if reason is not None:
            print(f"benchmarks.gpu: the Triton backend cannot run here: {reason}", file=sys.stderr)
            return 1
    suite = Suite(args)
    if "tests" in args.only:
        suite.tests()
    try:
        suite.benchmarks()
    finally:
        suite.close()
    print(f"Results: {suite.path}")
    return 1 if suite.report.get("tests", {}).get("note") else 0


class Suite:
    """The tests, then every task in a process that may die; the report is on disk after each."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.worker = args, Worker()
        self.seconds = 60 * args.minutes
        self.start_s = time.monotonic()
        settings = vars(args) | {"scale": LOGIT_SCALE, "cosine": POSITIVE_COSINE}
        self.report = {"machine": machine(), "settings": settings, "rows": [], "training": []}
        folder = ROOT / "build" if args.rehearse else RESULTS
        self.path = args.out or folder / f"{file_stem()}.json"
        self.banned: dict[str, str] = {}
        self.slow: dict[tuple, tuple[int, float]] = {}
        self.training_s = 0.0

    def left_s(self) -> float:
        return self.seconds - (time.monotonic() - self.start_s)

    def tests(self) -> None:
        timeout_s = self.seconds * (TESTS_SHARE if len(self.args.only) > 1 else 1.0)
        self.report["tests"] = run_tests(timeout_s, sanitizer=self.args.sanitizer)
        self._save()
        if "note" in self.report["tests"]:
            print(f"benchmarks.gpu: tests: {self.report['tests']['note']}; the benchmark goes on", file=sys.stderr)

    def benchmarks(self) -> None:
        head = ("N", "D", "dtype", "mode", "peer", "ms", "TFLOP/s", "share", "MiB")
        print("{:>9} {:>5} {:5} {:17} {:32} {:>10} {:>8} {:>6} {:>8}".format(*head))
        for task in _tasks(self.args):
            if isinstance(task, gpu_training.Case):
                self._training(task)
            else:
                self._problem(task)
            self._save()
        self._save()

    def close(self) -> None:
        self.worker.close()

    def _problem(self, problem: dict) -> None:
        if self.left_s() <= 0:
            self.report["rows"].append({**problem, "peer": None, "note": "not run: the time limit had passed"})
            return
        for row in self._rows(problem):
            if "ms" in row:
                self.slow[_series(row)] = (row["n"], row["ms"])
            self.report["rows"].append(row)
            print(_line(row), flush=True)

    def _rows(self, problem: dict) -> list[dict]:
        """Of one problem; a peer that ends the process is left out of the next attempt."""
        skip = self._skip(problem)
        for _ in GPU_PEERS:
            try:
                return self._run("losses", gpu_losses.run_problem, *problem.values(), skip)
            except RuntimeError as error:
                return [{**problem, "peer": None, "note": str(error)}]
            except WorkerDiedError as error:
                peer, note = error.trying, f"failed: it ended the process ({error})"
                print(f"benchmarks.gpu: {problem}: {peer or 'start'}: {note}", file=sys.stderr, flush=True)
                if peer not in GPU_PEERS or self.left_s() <= 0:
                    return [{**problem, "peer": None, "note": f"{peer or 'start'}: {note}"}]
                skip[peer] = note
                if peer not in gpu_losses.OURS.values():
                    self.banned[peer] = f"not run: it had ended the process at N = {problem['n']:,}, D = {problem['d']}"
        return [{**problem, "peer": None, "note": "every peer ended the process"}]

    def _skip(self, problem: dict) -> dict[str, str]:
        """Peers that are not to be run on this problem, and why."""
        skip = dict(self.banned)
        n, ours = problem["n"], gpu_losses.OURS.values()
        for peer in GPU_PEERS.values():
            if peer.name in ours or peer.name in skip:
                continue
            before = self.slow.get((peer.name, problem["d"], problem["dtype"], problem["training"]))
            if n > PEERS_LARGEST:
                skip[peer.name] = f"measured up to {PEERS_LARGEST:,} pairs"
            elif peer.compiles and (n not in COMPILED_SIZES or problem["d"] != self.args.widths[0]):
                skip[peer.name] = "compiled at the first width and a few sizes alone, to save time"
            elif before is not None and (expected := before[1] * (n / before[0]) ** 2) > SLOWEST_MS:
                skip[peer.name] = f"not run: it would take about {expected / 1e3:.0f} s a call"
        if n > PEERS_LARGEST:
            skip["sigmoid"] = "the softmax alone at this size"
        return skip

    def _training(self, case: gpu_training.Case) -> None:
        start_s = time.monotonic()
        left_s = min(self.left_s(), TRAINING_SHARE * self.seconds - self.training_s)
        row = {"way": case.way, "label": gpu_training.LABELS[case.way], "batch": case.batch, "model": case.model}
        if left_s <= 0:
            row["note"] = "not run: the time limit had passed"
        else:
            try:
                (row,) = self._run("training", gpu_training.run_case, case, left_s)
            except RuntimeError as error:
                row["note"] = str(error)
            except WorkerDiedError as error:
                row["note"] = f"failed: {error.trying or 'start'}: {error}"
        self.training_s += time.monotonic() - start_s
        self.report["training"].append(row)
        print(_training_line(row), flush=True)

    def _run(self, part: str, task, *arguments: object) -> list[dict]:
        until = self.start_s + self.seconds + GRACE_S
        return self.worker.run(task, *arguments, step_s=STEP_S[part], until=until)

    def _save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".new")
        partial.write_text(json.dumps(self.report, indent=1, default=str) + "\n")
        partial.replace(self.path)


def machine() -> dict:
    """Everything a reader needs to judge or repeat a measurement."""
    about = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _output("git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    if not torch.cuda.is_available():
        return {"gpu": "none, a rehearsal", "memory_gib": 0.0, "driver": None, "triton": None, **about}
    import triton

    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "clocks": _output("nvidia-smi", "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        **about,
    }


def file_stem() -> str:
    """Such as nvidia-h200-2026-01-31."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "rehearsal"
    return f"{_slug(name)}-{datetime.now(timezone.utc).date()}"


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=7.0, help="nothing new is begun after this many minutes")
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=PARTS, help="parts to run")
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 768, 1024, 256], help="embedding widths D")
    parser.add_argument("--sizes", type=int, nargs="+", default=[4096, 8192, 16384, 32768, 65536, 131072, 262144])
    parser.add_argument("--dtypes", nargs="+", default=["bf16"], choices=list(gpu_losses.DTYPES))
    parser.add_argument("--no-largest", dest="largest", action="store_false", help="leave the million pairs out")
    parser.add_argument("--sanitizer", action="store_true", help="as tests those under compute-sanitizer alone: slow")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, in small: figures mean nothing")
    parser.add_argument("--out", type=Path, default=None, help="results file")
    return parser.parse_args(argv)


def _tasks(args: argparse.Namespace) -> list:
    """What matters most comes first: some is left over when the time is."""
    first, *others = args.widths
    core = [n for n in sorted(args.sizes) if n in CORE_SIZES]
    rest = [n for n in sorted(args.sizes) if n not in CORE_SIZES]
    losses, training = "losses" in args.only, "training" in args.only
    tasks: list = _problems(core, [first], args.dtypes[0]) if losses else []
    tasks += _training_cases(args) if training else []
    if losses:
        largest = [{"n": LARGEST, "d": first, "dtype": args.dtypes[0], "training": True}] if args.largest else []
        tasks += largest + _problems(rest, [first], args.dtypes[0])
        tasks += _problems(core, others, args.dtypes[0]) + _problems(rest, others, args.dtypes[0])
        tasks += [problem for dtype in args.dtypes[1:] for problem in _problems(core + rest, [first], dtype)]
    return tasks


def _problems(sizes: list[int], widths: list[int], dtype: str) -> list[dict]:
    """Arguments of gpu_losses.run_problem, in order."""
    return [
        {"n": n, "d": d, "dtype": dtype, "training": training}
        for d in widths
        for n in sizes
        for training in (False, True)
    ]


def _training_cases(args: argparse.Namespace) -> list[gpu_training.Case]:
    if args.rehearse:
        return [gpu_training.small(way) for way in gpu_training.LABELS]
    return list(gpu_training.CASES)


def _series(row: dict) -> tuple:
    return row["peer"], row["d"], row["dtype"], row["mode"] != "forward"


def _line(row: dict) -> str:
    mode = row.get("mode") or ("forward+backward" if row["training"] else "forward")
    head = f"{row['n']:9,d} {row['d']:5d} {row['dtype']:5} {mode:17} {row.get('label', ''):32}"
    if "ms" not in row:
        return f"{head} {row.get('note', '')}"
    return f"{head} {row['ms']:10.3f} {row['tflops']:8.1f} {row['share']:6.3f} {row.get('peak_mib', 0):8.0f}"


def _training_line(row: dict) -> str:
    head = f"{row['batch']:9,d} {row['model']} {row['label']}:"
    if "step_ms" not in row:
        return f"{head} {row['note']}"
    return (
        f"{head} {row['images_per_s']:,.0f} images/s, MFU {row['mfu']:.3f}, loss {row['loss_share']:.2%} of "
        f"{row['step_ms'] / 1e3:.2f} s, peak {(row['peak_mib'] or 0):,} MiB"
    )


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


if __name__ == "__main__":
    sys.exit(main())
