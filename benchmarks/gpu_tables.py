"""Tables and plots of docs/performance_gpu.md from results files of benchmarks.gpu, and from nothing else.

    python -m benchmarks.gpu_tables benchmarks/results/GPU-DATE.json                     prints the tables
    python -m benchmarks.gpu_tables benchmarks/results/GPU-DATE.json --docs docs/performance_gpu.md --plot docs/gpu.png

In the document the tables stand between the lines `<!-- gpu-tables -->` and `<!-- /gpu-tables -->`. What was not
measured is named below its table, with the reason.
"""

import argparse
import json
from pathlib import Path

OPEN, CLOSE = "<!-- gpu-tables -->", "<!-- /gpu-tables -->"


def tables(results: dict) -> str:
    """One Markdown table for each width, dtype and mode, and one of training steps; the machine is named above them."""
    machine = results["machine"]
    parts = [
        f"{machine['gpu']}, {machine['memory_gib']} GiB, driver {machine['driver']}, torch {machine['torch']}, "
        f"Triton {machine['triton']}, commit {machine['commit']}, {machine['date'][:10]}. Medians of paired runs; "
        "share: of the 8192^3 matrix product timed between them; memory above the inputs, results included.",
    ]
    if results.get("tests"):
        parts.append(_tests(results["tests"]))
    rows = [row for row in results["rows"] if row.get("peer")]
    for d, dtype, mode in dict.fromkeys((row["d"], row["dtype"], row["mode"]) for row in rows):
        group = [row for row in rows if (row["d"], row["dtype"], row["mode"]) == (d, dtype, mode)]
        parts += [f"### {mode}, D = {d}, {dtype}", _table(group)]
    parts += _without(rows)
    if results.get("training"):
        parts += ["### Training steps", _training(results["training"]), *_reasons(results["training"])]
    return "\n\n".join(parts)


def _tests(tests: dict) -> str:
    failed = "".join(f", `{name}`" for name in tests["failed"])
    note = f" ({tests['note']})" if "note" in tests else ""
    told = f"failed: {failed[2:]}" if failed else "none failed"
    return f"GPU tests: {tests['passed']} passed, {tests['skipped']} skipped, {told}{note}; {tests['seconds']:.0f} s."


def _table(rows: list[dict]) -> str:
    columns = ("N", "loss", "ms", "TFLOP/s", "share", "times fastclip", "MiB", "relative error")
    lines = ["| " + " | ".join(columns) + " |", "|--:|:--|--:|--:|--:|--:|--:|--:|"]
    for row in sorted((row for row in rows if "ms" in row), key=lambda row: row["n"]):
        figures = (
            f"{row['ms']:.3f}",
            f"{row['tflops']:.0f}",
            f"{row['share']:.2f}",
            f"{row['times_of_fastclip']:.2f}" if "times_of_fastclip" in row else "",
            f"{row['peak_mib']:,.0f}" if "peak_mib" in row else "",
            f"{row['error']:.1e}" if "error" in row else "",
        )
        lines.append(f"| {row['n']:,} | {row['label']} | " + " | ".join(figures) + " |")
    return "\n".join(lines)


def _without(rows: list[dict]) -> list[str]:
    """Who has no figure at all, and why."""
    measured = {row["label"] for row in rows if "ms" in row}
    reasons = {row["label"]: row.get("note", "") for row in rows if row["label"] not in measured}
    return ["Not measured: " + "; ".join(f"{name} ({note})" for name, note in reasons.items()) + "."] if reasons else []


def _training(rows: list[dict]) -> str:
    """Peak: all that torch had allocated. MFU: forward and backward once, over the measured matrix product."""
    columns = ("model, batch", "step", "images/s", "MFU", "with the second forward pass", "loss's share", "peak GiB")
    lines = ["| " + " | ".join((*columns, "steps timed")) + " |", "|:--|:--|--:|--:|--:|--:|--:|--:|"]
    for row in rows:
        if "step_ms" not in row:
            continue
        figures = (
            f"{row['images_per_s']:,.0f}",
            f"{row['mfu']:.3f}",
            f"{row['mfu_with_recomputation']:.3f}",
            f"{row['loss_share']:.1%}",
            "" if row["peak_mib"] is None else f"{row['peak_mib'] / 1024:.1f}",
            str(row["steps_timed"]),
        )
        lines.append(f"| {row['model']}, {row['batch']:,} | {row['label']} | " + " | ".join(figures) + " |")
    return "\n".join(lines)


def _reasons(rows: list[dict]) -> list[str]:
    notes = [f"{row['label']} at {row['batch']:,} ({row['note']})" for row in rows if "note" in row]
    return ["Not measured: " + "; ".join(notes) + "."] if notes else []


def plot(results: dict, path: Path) -> None:
    """Time over N of a training step at the first width, one line a loss."""
    from matplotlib.figure import Figure

    rows = [r for r in results["rows"] if "ms" in r and r["mode"] == "forward+backward" and r["family"] == "softmax"]
    if not rows:
        raise SystemExit("gpu_tables: no softmax training step was measured, so there is nothing to plot")
    rows = [row for row in rows if row["d"] == rows[0]["d"] and row["dtype"] == rows[0]["dtype"]]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for label in dict.fromkeys(row["label"] for row in rows):
        points = sorted((row["n"], row["ms"]) for row in rows if row["label"] == label)
        axes.loglog(*zip(*points, strict=True), marker="o", markersize=3, label=label)
    title = f"{results['machine']['gpu']}, D = {rows[0]['d']}"
    axes.set(xlabel="pairs N", ylabel="forward + backward, ms", title=title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--docs", type=Path, help="document to put the tables into")
    parser.add_argument("--plot", type=Path, help="PNG file of the plot (needs matplotlib)")
    args = parser.parse_args()
    results = json.loads(args.results.read_text())
    if args.docs:
        before, rest = args.docs.read_text().split(OPEN)
        after = rest.split(CLOSE)[1]
        args.docs.write_text(f"{before}{OPEN}\n{tables(results)}\n{CLOSE}{after}")
    else:
        print(tables(results))
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
