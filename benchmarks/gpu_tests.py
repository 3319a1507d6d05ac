"""The GPU tests in a process of their own: what passed, what failed and how."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = (ROOT / "tests" / "kernels" / "gpu", ROOT / "tests" / "test_grad_cache_gpu.py")
# Its own settings: the suite's conftest and strict warnings ask for packages and versions that may not be here.
OPTIONS = (
    "-v", "--tb=short", "--maxfail=20", "-p", "no:cacheprovider", "-o", "addopts=", "-o", "filterwarnings=default",
    "--confcutdir", str(TESTS[0]), "--durations=8",
)  # fmt: skip
SANITIZER = "sanitizer"  # in the names of the tests that run under compute-sanitizer, minutes each
OUTCOME = re.compile(r"^(\S+?::.+?) (PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS)\b")
LOG_CHARACTERS = 20_000


def run_tests(timeout_s: float, *, tests: tuple[Path, ...] = TESTS, sanitizer: bool = False) -> dict:
    """{"passed", "skipped": numbers, "failed": names, "seconds", "note", "log"}: note and log where something failed.

    What was done before the time was over counts. Prints pytest's output as it comes.
    """
    chosen = SANITIZER if sanitizer else f"not {SANITIZER}"
    command = [sys.executable, "-u", "-m", "pytest", *OPTIONS, "-k", chosen, *map(str, tests)]
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    start_s, outcomes, lines, late = time.monotonic(), {}, [], []
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )

    def stop() -> None:
        late.append(f"ended after {timeout_s:.0f} s")
        os.killpg(process.pid, signal.SIGKILL)  # pytest and what its tests have started

    timer = threading.Timer(timeout_s, stop)
    timer.start()
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
            if found := OUTCOME.match(line):
                outcomes[found[1]] = found[2]
        code = process.wait()
    finally:
        timer.cancel()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()
    failed = [name for name, outcome in outcomes.items() if outcome in ("FAILED", "ERROR")]
    report = {
        "passed": sum(outcome == "PASSED" for outcome in outcomes.values()),
        "skipped": sum(outcome == "SKIPPED" for outcome in outcomes.values()),
        "failed": failed,
        "seconds": round(time.monotonic() - start_s, 1),
    }
    if late or code != 0:
        report["note"] = late[0] if late else f"pytest ended with code {code}"
        report["log"] = "".join(lines)[-LOG_CHARACTERS:]
    return report
