"""A plan as text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from fastclip.plan.gpus import Gpu
from fastclip.plan.memory import memory
from fastclip.plan.rates import Rates, Times, times
from fastclip.plan.setting import Setting
from fastclip.plan.work import work

LABELS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "AdamW's moments",
    "rounded_weights": "16-bit weights (autocast)",
    "batch": "images and tokens",
    "features": "features, their gradients",
    "activations": "activations",
    "loss": "loss, workspace",
}
GIB = 2**30
Lines = list[tuple[str, ...]]


def ways(setting: Setting) -> dict[str, Setting]:
    """The setting with and without gradient caching and recomputation; its micro_batch is that of caching."""
    whole, piece = replace(setting, micro_batch=None), f"cached, {setting.micro_batch:,}"
    return {
        "whole batch": replace(whole, recompute=False),
        "recomputed": replace(whole, recompute=True),
        piece: replace(setting, recompute=False),
        f"{piece}, recomputed": replace(setting, recompute=True),
    }


def report(name: str, setting: Setting, gpu: Gpu | None, rates: Rates) -> str:
    """Memory, FLOPs, messages and times, each way; what is missing, and why."""
    columns = ways(setting)
    head = ("", *columns)
    parts = [
        _headline(name, setting),
        "Memory of a GPU at its peak, GiB\n" + _table([head, *_memory_lines(columns, gpu)]),
        "Work of a GPU in a step\n" + _table([head, *_work_lines(columns)]),
        "Time of a step, seconds\n" + _table([head, *_time_lines(columns, rates)]),
        *_remarks(columns, gpu, rates),
    ]
    return "\n\n".join(parts)


def _headline(name: str, setting: Setting) -> str:
    image, text = setting.parameters
    width = setting.model.embed_dim
    spread = f"{setting.parallel.upper()}, loss: {setting.loss_mode}" if setting.gpus > 1 else "one process"
    return (
        f"{name}, embeddings of {width}: {(image + text) / 1e6:,.1f} M weights (image {image / 1e6:,.1f} M, text "
        f"{text / 1e6:,.1f} M), {sum(t.flops for t in setting.towers) / 1e9:,.2f} GFLOP forward a pair\n"
        f"{setting.batch:,} pairs a step on {setting.gpus} GPU(s), {setting.rows:,} each; {setting.dtype}, {spread}"
    )


def _memory_lines(columns: dict[str, Setting], gpu: Gpu | None) -> Lines:
    found = [memory(setting) for setting in columns.values()]
    lines: Lines = [(label, *(f"{m.parts()[part] / GIB:,.2f}" for m in found)) for part, label in LABELS.items()]
    lines.append(("peak", *(f"{m.peak / GIB:,.2f}" for m in found)))
    if gpu is not None:
        told = ("fits" if m.peak < gpu.memory else "does not fit" for m in found)
        lines.append((f"{gpu.name}, {gpu.memory / GIB:,.1f}", *told))
    return lines


def _work_lines(columns: dict[str, Setting]) -> Lines:
    found = [work(setting) for setting in columns.values()]

    def line(label: str, value: Callable, unit: float) -> tuple[str, ...]:
        return (label, *(f"{value(w) / unit:,.2f}" for w in found))

    return [
        line("towers, TFLOP", lambda w: w.towers, 1e12),
        line("forward again, TFLOP", lambda w: w.again, 1e12),
        line("loss, TFLOP", lambda w: w.loss, 1e12),
        line("loss's messages, GB sent", lambda w: w.loss_bytes, 1e9),
        line("weights and gradients, GB sent", lambda w: w.weight_bytes, 1e9),
    ]


def _time_lines(columns: dict[str, Setting], rates: Rates) -> Lines:
    found: Sequence[Times] = [times(work(setting), rates) for setting in columns.values()]
    names = {"towers": "towers", "again": "forward again", "loss": "loss", "messages": "messages", "step": "step"}
    lines: Lines = [
        (label, *("" if getattr(t, part) is None else f"{getattr(t, part):,.3g}" for t in found))
        for part, label in names.items()
    ]
    return lines


def _remarks(columns: dict[str, Setting], gpu: Gpu | None, rates: Rates) -> list[str]:
    told = [f"Rates: {rates.source}."] if rates.source else []
    missing = [
        ("towers and loss", rates.towers is None and rates.loss is None, "--measure, or --rates FILE"),
        ("towers", rates.towers is None and rates.loss is not None, "--measure, or --rates FILE"),
        ("messages", rates.network is None and next(iter(columns.values())).gpus > 1, "--network GB/s of a GPU"),
    ]
    told += [f"No time of {what}: no rate was measured ({how})." for what, blank, how in missing if blank]
    if gpu is not None:
        bounds = [work(setting).flops / gpu.peak[setting.dtype] for setting in columns.values()]
        peak = gpu.peak[next(iter(columns.values())).dtype] / 1e12
        each = ", ".join(f"{way} {bound:,.3g} s" for way, bound in zip(columns, bounds, strict=True))
        told.append(
            f"At the datasheet's peak of {peak:,.0f} TFLOP/s, which nothing reaches, a step takes at least {each}."
        )
    return told


def _table(lines: Lines) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  "
        + line[0].ljust(widths[0])
        + "".join(f"  {cell.rjust(width)}" for cell, width in zip(line[1:], widths[1:], strict=True))
        for line in lines
    )
