"""One problem of the GPU benchmark: N pairs of width D. Every peer is checked, then all are timed in turn."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

import torch

from fastclip.benchmarks import gpu_measure as measure
from fastclip.benchmarks.gpu_check import (
    CHUNKED_ROWS,
    PEERS_TOLERANCE,
    SAMPLE,
    TOLERANCE,
    sampled_error,
    truth,
    worst_error,
)
from fastclip.benchmarks.gpu_measure import Batch, Call
from fastclip.benchmarks.gpu_peers import GPU_PEERS, GpuPeer
from fastclip.benchmarks.problems import LOGIT_SCALE, POSITIVE_COSINE

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
GROUP_MS = 1200.0  # time for the paired runs of one N, D and mode
OURS = {"softmax": "triton", "sigmoid": "sigmoid"}  # checked by themselves; above CHUNKED_ROWS the others beside them


def run_problem(n: int, d: int, dtype: str, training: bool, skip: dict[str, str]) -> Iterator[dict]:
    """{"trying": peer} before what may go wrong, then one row a peer. skip: peers not to be run, and why."""
    data = measure.batch(n, d, DTYPES[dtype], scale=LOGIT_SCALE, cosine=POSITIVE_COSINE)
    base = {"n": n, "d": d, "dtype": dtype, "mode": "forward+backward" if training else "forward"}
    expected, rows, calls, estimates_ms = {}, [], {}, {}
    for name, peer in GPU_PEERS.items():
        row = {**base, "peer": name, "label": peer.label, "family": peer.family}
        rows.append(row)
        note = skip.get(name) or peer.why_not() or _too_large(peer, n) or _no_dtype(peer, dtype)
        if note is None:
            yield {"trying": name}
            call = _attempt(peer, data, training, expected, row)
            if call is not None:
                calls[name], estimates_ms[name] = call, row.pop("estimate_ms")
        else:
            row["note"] = note
    expected.clear()
    if calls:
        yield {"trying": "timing"}
        _time(rows, calls, estimates_ms, data, base)
    yield from rows


def _attempt(peer: GpuPeer, data: Batch, training: bool, expected: dict, row: dict) -> Call | None:
    """The peer's call if its result is right; fills in its row, with a note if it is not."""
    try:
        call = measure.make_call(peer.build(), data, training)
        found = call()
        row["error"] = _error(found, data, training, expected, row)
        allowed = TOLERANCE[data.image.dtype] if peer.name in OURS.values() else PEERS_TOLERANCE
        if not row["error"] <= allowed:
            row["note"] = f"wrong: relative error {row['error']:.1e}"
            return None
        del found
        peak_mib, row["estimate_ms"] = measure.peak_mib(call)
        row["peak_mib"] = round(peak_mib, 1)
        return call
    except Exception as error:  # other people's code: whatever it raises is what its row says
        row["note"] = one_line(error)
        return None
    finally:
        if len(data.image) > CHUNKED_ROWS or "note" in row:
            measure.give_back()


def _error(found: tuple, data: Batch, training: bool, expected: dict, row: dict) -> float:
    family = row["family"]
    if family not in expected and len(data.image) <= CHUNKED_ROWS:
        expected[family] = truth(data, family, training)
    if family in expected:
        row["checked_by"] = "float64" if len(data.image) <= CHUNKED_ROWS else f"fastclip's {OURS[family]}"
        return worst_error(found, expected[family])
    if row["peer"] != OURS[family]:
        raise ValueError("nothing to check it against: fastclip's own result is missing")
    if family == "softmax":
        row["checked_by"] = f"float64 of {SAMPLE} rows and columns"
        error = sampled_error(data, found)
    else:
        row["checked_by"] = "not checked at this size"
        error = 0.0 if all(t.isfinite().all() for t in found if t is not None) else float("nan")
    if error <= TOLERANCE[data.image.dtype]:
        expected[family] = found
    return error


def _time(rows: list[dict], calls: dict[str, Call], estimates_ms: dict[str, float], data: Batch, base: dict) -> None:
    """Fills in the rows' times, beside the ceiling and, where it fits, x @ y.T alone (a row of its own)."""
    n, d, training = base["n"], base["d"], base["mode"] != "forward"
    beside = {"ceiling": measure.ceiling(data.image.dtype)}
    if not training and n * n * 4 / 2**20 < measure.free_mib() / 2:
        beside["x @ y.T"] = measure.logits_alone(data)
    for name, call in beside.items():
        call()
        calls[name], estimates_ms[name] = call, measure.milliseconds(call)
    times = measure.interleaved(calls, estimates_ms, GROUP_MS)
    rate = measure.tflops(2 * measure.CEILING_ROWS**3, times.pop("ceiling"))
    if "x @ y.T" in times:
        rows.append({**base, "peer": "x @ y.T", "label": "x @ y.T alone, stored", "family": "product"})
    for row in rows:
        if row["peer"] not in times:
            continue
        runs = times[row["peer"]]
        achieved = measure.tflops(_flop(row["family"], training) * n * n * d, runs)
        row |= {"ms": round(median(runs), 4), "runs_ms": [round(t, 4) for t in runs]}
        row |= {"tflops": round(achieved, 1), "ceiling_tflops": round(rate, 1), "share": round(achieved / rate, 3)}
        if row["family"] == "softmax" and "triton" in times:
            paired = [a / b for a, b in zip(runs, times["triton"], strict=False)]
            row["times_of_fastclip"] = round(median(paired), 3)
    calls.clear()
    measure.give_back()


def one_line(error: BaseException) -> str:
    said = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {said[0][:200]}"


def _flop(family: str, training: bool) -> int:
    """FLOP over N^2 D that the loss cannot avoid: S, and in training S again (softmax alone) and two products."""
    if not training or family == "product":
        return 2
    return 8 if family == "softmax" else 6


def _too_large(peer: GpuPeer, n: int) -> str | None:
    needed = peer.matrices * 4 * n * n / 2**20
    return f"it would need {needed / 1024:.0f} GiB" if needed > 0.8 * measure.free_mib() else None


def _no_dtype(peer: GpuPeer, dtype: str) -> str | None:
    return None if dtype in peer.dtypes else f"it has no {dtype}"
