"""A results file as one HTML page: no script, nothing from the network, pictures inside.

python -m benchmarks.page benchmarks/results/X.json          writes X.html beside it
"""

from __future__ import annotations

import base64
import html
import io
from dataclasses import dataclass
from pathlib import Path

import tyro

from fastclip.benchmarks import noise, tables
from fastclip.benchmarks.capacity import capacity_table
from fastclip.benchmarks.case import TRAINING
from fastclip.benchmarks.external import MODULES
from fastclip.benchmarks.machine import headline
from fastclip.benchmarks.pictures import TITLES, Picture, pictures
from fastclip.benchmarks.results import Results, Row, load
from fastclip.benchmarks.tables import Table

KINDS = {
    "time": "Time of one call, median",
    "ratio": "Times as long as the first line, same rounds: median (spread of rounds and processes)",
    "memory": "Peak memory above inputs and results",
    "floor": "Share of the floor (of fp32's floor in parentheses)",
    "error": "Worst relative error against float64",
}
FOLDED = ("floor", "error")  # shown on a click
MATRIX = ("dense-fp32", "dense")  # the better one for 16 bits first
MACHINE = (
    *("gpu", "driver", "cpu", "isa", "cores", "threads", "memory_gib", "system", "python", "torch", "cuda", "triton"),
    *("fastclip", "commit", "compiler", "huge_pages", "date"),
)

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1c1c; background: #fff; max-width: 1080px; margin: 2rem auto;
  padding: 0 1rem }
h1 { font-size: 1.7rem; margin: 0 }
h2 { margin: 2.2rem 0 .4rem; border-bottom: 1px solid #ddd }
h3 { margin: 1.2rem 0 .2rem; font-size: 1rem }
p { margin: .4rem 0 }
.quiet, figcaption { color: #666; font-size: .85rem }
.warning { background: #fff4e0; padding: .5rem .8rem; border-radius: 4px }
.beside { display: flex; flex-wrap: wrap; gap: 0 2.5rem }
.beside > div { max-width: 100% }
summary { color: #666; cursor: pointer; font-size: .85rem }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums; margin: .3rem 0 }
th, td { padding: .22rem .6rem; text-align: right; border-bottom: 1px solid #eee; white-space: nowrap }
th { border-bottom: 1px solid #999; font-weight: 600 }
th:first-child, td:first-child { text-align: left }
tr.ours td { background: #fdf1ea }
.words td, .words th { text-align: left; white-space: normal }
figure { margin: 1rem 0 }
figure img { max-width: 100%; height: auto; border: 1px solid #eee }
"""


def page(results: Results, source: str) -> str:
    """The whole page. source: the results file's name, which stands on it."""
    shown = {picture.name: picture for picture in pictures(results)}
    where = headline(results.machine)
    disturbed = noise.warning(results.parts, results.machine.get("cores", 0))
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width,initial-scale=1"><link rel="icon" href="data:,">',
        f"<title>fastclip: {html.escape(where)}</title><style>{STYLE}</style></head><body>",
        f'<h1>fastclip, measured</h1><p class="quiet">{html.escape(where)}; from {html.escape(source)}</p>',
        f'<p class="warning">{html.escape(disturbed)}</p>' if disturbed else "",
        *(f"<p>{html.escape(sentence)}</p>" for sentence in headlines(results)),
        *_clip_section(results, shown),
        *(_case_section(results, case, shown) for case in results.names("case") if case != "clip"),
        _figure(shown["cases"]) if "cases" in shown else "",
        *(f"<h2>{MODULES.get(name, name)}</h2>{_table(tables.extra(lines))}" for name, lines in results.extra.items()),
        *_how(results),
        "</body></html>\n",
    ]
    return "\n".join(filter(None, parts))


def headlines(results: Results) -> list[str]:
    """Sentences for somebody who reads nothing else: the largest N where fastclip and a form with the matrix ran."""
    found = []
    for dtype in results.names("dtype", case="clip"):
        rows = results.measured(case="clip", dtype=dtype, mode=TRAINING, d=results.width("clip"))
        sizes = {row.n for row in rows if row.ours} & {row.n for row in rows if row.peer in MATRIX}
        if sizes:
            found.append(_compared([row for row in rows if row.n == max(sizes)]))
    return found


def _compared(rows: list[Row]) -> str:
    ours = next(row for row in rows if row.ours)
    matrix = next(row for row in rows if row.peer in MATRIX)
    best = min((row for row in rows if not row.ours), key=lambda row: row.seconds["median"])
    said = f"A training step of the CLIP loss at N = {ours.n:,}, D = {ours.d}, {ours.dtype}: {ours.label} takes "
    said += f"{tables.time_cell(ours)}, the fastest other form ({best.label}) {tables.time_cell(best)}"
    if ours.peak_mib is not None and matrix.peak_mib is not None:
        said += f"; above inputs and gradients it needs {tables.memory_cell(ours)}, "
        said += f"the form with the matrix ({matrix.label}) {tables.memory_cell(matrix)}"
    return said + "."


def _clip_section(results: Results, shown: dict[str, Picture]) -> list[str]:
    if not results.find(case="clip"):
        return []
    parts = [
        f"<h2>{TITLES['clip']}</h2>",
        *(_figure(shown[name]) for name in ("time", "memory", "floor") if name in shown),
    ]
    parts += _group_tables(results, "clip")
    if len(results.names("d", case="clip")) > 1:
        parts += ["<h3>Over the width D: fp32, forward+backward</h3>"]
        parts += [_titled(kind, tables.by_width(results, kind)) for kind in ("time", "ratio", "floor")]
    if "capacity" in shown:
        parts += ["<h2>Largest batch</h2>", _figure(shown["capacity"]), _table(capacity_table(results))]
    return parts


def _case_section(results: Results, case: str, shown: dict[str, Picture]) -> str:
    names = [f"{case}-{kind}" for kind in ("time", "memory", "floor")]
    figures = [_figure(shown[name]) for name in names if name in shown]
    return "\n".join([f"<h2>{TITLES.get(case, case)}</h2>", *figures, *_group_tables(results, case)])


def _group_tables(results: Results, case: str) -> list[str]:
    parts = []
    for dtype, mode in results.groups(case):
        parts.append(f"<h3>{html.escape(f'{dtype}, {mode}, D = {results.width(case)}')}</h3>")
        shown = {kind: _group_table(results, kind, case, dtype, mode) for kind in KINDS}
        parts.append(f'<div class="beside">{"".join(shown[kind] for kind in KINDS if kind not in FOLDED)}</div>')
        if folded := "".join(shown[kind] for kind in FOLDED):
            parts.append(f"<details><summary>floor and errors</summary>{folded}</details>")
    return parts


def _group_table(results: Results, kind: str, case: str, dtype: str, mode: str) -> str:
    """Nothing where no cell would hold a figure."""
    table = tables.by_size(results, kind, case, dtype, mode)
    if all(cell in ("", "-") for line in table[1:] for cell in line[1:]):
        return ""
    return _titled(kind, table)


def _titled(kind: str, table: Table) -> str:
    return f'<div><p class="quiet">{KINDS[kind]}</p>{_table(table)}</div>'


def _how(results: Results) -> list[str]:
    """Where it was measured, what was not, and how."""
    machine = results.machine
    known = [[name.replace("_", " "), str(machine[name])] for name in MACHINE if machine.get(name) is not None]
    known += [[name, version] for name, version in machine.get("packages", {}).items()]
    runs = [
        [part.get("date", ""), str(part.get("commit", "")), _seconds(part), _others(part)] for part in results.parts
    ]
    missing = tables.not_run(results)
    return [
        "<h2>Not measured</h2>" + _table(missing, words=True) if len(missing) > 1 else "",
        "<h2>Machine</h2>",
        _table([["", ""], *known], words=True),
        "<h3>Runs in this file</h3>",
        _table([["date", "commit", "took", "cores used by other programs"], *runs]),
        "<h2>How</h2><p>Every result is compared with float64 before it is timed. Runs are paired: each round calls "
        "everybody once, in alternating order, in several processes one after the other. Peak memory comes from a "
        "process for each call. Floating-point operations and bytes that cannot be avoided, at the rates of matrix "
        "products and copies measured in the same rounds, are the floor.</p>"
        if results.suite == "cpu"
        else "",
    ]


def _figure(picture: Picture) -> str:
    """As an image with its data inside, so that no two pictures share names."""
    file = io.BytesIO()
    picture.figure.savefig(file, format="svg")
    data = base64.b64encode(file.getvalue()).decode()
    image = f'<img alt="{picture.name}" src="data:image/svg+xml;base64,{data}">'
    return f"<figure>{image}<figcaption>{html.escape(picture.caption)}</figcaption></figure>"


def _table(table: Table, words: bool = False) -> str:
    head, *lines = table
    rows = ["<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>"] if any(head) else []
    for line in lines:
        ours = ' class="ours"' if line[0].startswith("fastclip") and not words else ""
        rows.append(f"<tr{ours}>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>")
    return f'<div class="scroll"><table{" class=words" if words else ""}>{"".join(rows)}</table></div>'


def _seconds(part: dict) -> str:
    return f"{part['took_s']:.0f} s" if "took_s" in part else ""


def _others(part: dict) -> str:
    return f"{part['others_cores']:g}" if "others_cores" in part else ""


def save(results: Results, path: Path) -> Path:
    """Writes the page beside the results file `path` and returns where."""
    target = path.with_suffix(".html")
    target.write_text(page(results, path.name))
    return target


@dataclass(frozen=True)
class PageConfig:
    """Write a results file as one HTML page beside it."""

    results: tyro.conf.Positional[Path]
    """A file that `fastclip bench` wrote."""


if __name__ == "__main__":
    chosen = tyro.cli(PageConfig).results
    print(f"Page: {save(load(chosen), chosen)}")
