"""A results file of the GPU suite (benchmarks.gpu) in the form of the others, for the same tables, plots and page."""

from __future__ import annotations

from dataclasses import asdict

from fastclip.benchmarks.measure import Spread, paired
from fastclip.benchmarks.results import Results, Row

CASES = {"softmax": "clip", "sigmoid": "siglip"}
FLOP = {("clip", True): 8, ("clip", False): 2, ("siglip", True): 6, ("siglip", False): 2}  # over N^2 D
OURS = ("triton", "sigmoid")  # the peer of each family that the others are divided by


def from_gpu(content: dict) -> Results:
    """Milliseconds become seconds; the ceiling of a row is the matrix product that was timed between its runs."""
    lines = [line for line in content["rows"] if line.get("peer") and line.get("family") in CASES]
    runs = {_problem(line): line["runs_ms"] for line in lines if line["peer"] in OURS and "runs_ms" in line}
    rows = [_row(line, runs.get(_problem(line))) for line in lines]
    part = {"settings": content["settings"], "date": content["machine"]["date"], "commit": content["machine"]["commit"]}
    extra = {"training": [_training(line) for line in content["training"]]} if content.get("training") else {}
    return Results("gpu", content["machine"], rows, extra, [part])


def _training(line: dict) -> dict:
    """A training step, flat."""
    figures = {"images/s": "images_per_s", "MFU": "mfu", "loss's share": "loss_share", "peak MiB": "peak_mib"}
    told = {"step": line["label"], "N": line["batch"], **{name: line.get(key) for name, key in figures.items()}}
    return told | {"note": line.get("note", "")}


def _problem(line: dict) -> tuple:
    return line["family"], line["n"], line["d"], line["dtype"], line["mode"]


def _row(line: dict, base_ms: list[float] | None) -> Row:
    case, note = CASES[line["family"]], line.get("note", "")
    row = Row(case, line["peer"], line["label"], line["n"], line["d"], line["dtype"], line["mode"], note=note)
    if "error" in line:
        row.error = {"worst": line["error"]}
    row.peak_mib, row.peak_method = line.get("peak_mib"), "torch.cuda.max_memory_allocated"
    if "runs_ms" not in line:
        row.status = _status(note)
        return row
    runs = [ms / 1e3 for ms in line["runs_ms"]]
    flop = FLOP[case, "backward" in row.mode] * row.n**2 * row.d
    row.status, row.seconds = "measured", asdict(Spread.of(runs))
    row.gemm_gflops, row.gemm_library = line["ceiling_tflops"] * 1e3, "cuBLAS"
    row.floor_s = flop / line["ceiling_tflops"] / 1e12
    row.share = row.fp32_share = asdict(Spread.of([row.floor_s / run for run in runs]))
    if base_ms is not None and len(base_ms) == len(runs):
        row.ratio = asdict(paired(line["runs_ms"], base_ms))
    return row


def _status(note: str) -> str:
    if "would need" in note or "OutOfMemory" in note:
        return "out of memory"
    if note.startswith(("wrong", "failed")):
        return note.partition(":")[0]
    return "failed" if note.partition(":")[0].endswith(("Error", "Exception")) else "not run"
