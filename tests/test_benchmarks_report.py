"""What a run leaves: its file, tables in documents, pictures and the page."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from benchmark_cases import SMALL, D, N, results, row, run

from fastclip.benchmarks import machine, merge, report, tables
from fastclip.benchmarks.capacity import capacities, capacity_table
from fastclip.benchmarks.gpu_rows import from_gpu
from fastclip.benchmarks.results import load, new_path

pytest.importorskip("matplotlib")

from fastclip.benchmarks import page, pictures

ROOT = Path(__file__).parent.parent


def dense(n: int, took_s: float, **changes):
    """Four float32 matrices at its peak."""
    return row(n, took_s, peer="dense", label="dense, one matmul", mib=16 * n**2 / 2**20, **changes)


def some_results():
    """Two sizes of two peers, one that does not fit, another case, and another benchmark's table."""
    found = results(
        row(4096, 0.05, mib=24.0),
        dense(4096, 0.07),
        row(8192, 0.2, mib=40.0),
        dense(8192, 0.3),
        dense(65536, 1.0, status="out of memory", seconds=None, note="needs about 64 GiB, the limit is 18 GiB"),
        *(row(N, 0.01, peer=p, label=label, case="step", mode="one step") for p, label in STEP_PEERS),
    )
    found.extra = {"sharded": [{"processes": 2, "seconds": 0.123456, "n": 4096}, {"processes": 3, "note": "<b>"}]}
    return found


STEP_PEERS = (("fastclip", "fastclip in OpenCLIP's loop"), ("openclip", "OpenCLIP's loop & ClipLoss"))


def test_a_run_is_read_back_as_it_was_written(tmp_path):
    found = run(SMALL)
    path = tmp_path / "new" / "x.json"
    found.save(path)
    assert load(path) == found
    assert json.loads(path.read_text())["machine"]["cpu"] == machine.cpu_model()
    assert new_path(path.parent, "x").name == "x-2.json"
    path.write_text(json.dumps({"schema": 0}))
    with pytest.raises(ValueError, match="schema 0, expected 2"):
        load(path)


def test_what_is_measured_again_replaces_the_earlier_run():
    first, second = results(row(64, 1.0)), results(row(64, 2.0))
    first.parts = [{"settings": {"sizes": (64,), "group_s": 1.0}}, {"settings": {"sizes": (32,)}}]
    second.parts = [{"settings": {"sizes": [64], "group_s": 2.0}}]
    first.merge(second)
    assert [part["settings"]["sizes"] for part in first.parts] == [(32,), [64]]
    assert [row.seconds["median"] for row in first.rows] == [2.0]


def test_parts_are_merged_and_the_later_one_counts(tmp_path):
    first, second = results(row(64, 1.0), row(128, 1.0)), results(row(128, 2.0), row(256, 1.0))
    second.extra, second.parts = {"sharded": [{"n": 1}]}, [{"settings": {"sizes": [128, 256]}}]
    first.save(tmp_path / "a.json")
    second.save(tmp_path / "b.json")
    parts = (tmp_path / "a.json", tmp_path / "b.json")
    merge.main(merge.MergeConfig(tmp_path / "all.json", parts))
    merged = load(tmp_path / "all.json")
    assert [(r.n, r.seconds["median"]) for r in merged.rows] == [(64, 1.0), (128, 2.0), (256, 1.0)]
    assert len(merged.parts) == 2 and merged.extra == second.extra
    with pytest.raises(ValueError, match="exists"):
        merge.main(merge.MergeConfig(tmp_path / "all.json", parts))
    second.machine["threads"] = 64
    with pytest.raises(ValueError, match="threads 1 and 64"):
        first.merge(second)


def test_the_exponent_is_fitted_from_4096_to_16384():
    rows = [row(n, n**2.5 * 1e-9) for n in (4096, 8192, 16384)]
    assert results(row(1024, 5.0), *rows).exponent(peer="eager") == pytest.approx(2.5)
    assert results(*rows[:2]).exponent(peer="eager") is None


def test_tables_are_rewritten_between_their_markers():
    found = some_results()
    document = (
        "a\n<!-- bench:cpu-time-fp32-training -->\nold\n<!-- /bench -->\nb\n<!-- bench:gpu-x -->\n<!-- /bench -->\n"
        "<!-- bench:cpu-step-time-fp32-one-step -->\n<!-- /bench -->\n<!-- bench:cpu-extra-sharded -->\n<!-- /bench -->"
    )
    once = report.rewrite(document, found)
    assert "| fastclip eager | 50.0 ms | 0.200 s | - |" in once
    assert "| dense, one matmul | 70.0 ms | 0.300 s | out of memory |" in once
    assert "| OpenCLIP's loop & ClipLoss | 10.0 ms |" in once
    assert "| 2 | 0.1235 | 4,096 |  |" in once
    assert "old" not in once
    assert "<!-- bench:gpu-x -->\n<!-- /bench -->" in once
    assert report.rewrite(once, found) == once
    for wrong in ("thyme-fp32-training", "time-bf16-training", "extra-nothing", "ranks-time-fp32-x"):
        with pytest.raises(ValueError, match="has no table"):
            report.named_table(found, wrong)


@pytest.mark.parametrize("name", ("machine", "exponent", "not-run", "capacity", "width-time", *tables.KINDS))
def test_every_kind_of_table_is_there(name):
    found = some_results()
    found.add([row(4096, 0.02, d=2 * D)])
    named = report.named_table(found, f"{name}-fp32-training" if name in tables.KINDS else name)
    assert named.strip()
    if name == "width-time":
        assert f"| D={D} | D={2 * D} |" in named


def test_a_wrong_result_says_so_beside_its_time():
    found = results(row(64, 1.0, status="wrong", note="wrong loss"))
    assert tables.by_size(found, "time", "clip", "fp32", "forward+backward")[1][1] == "1.00 s (wrong)"
    assert "(wrong)" in report.problem_table(found.rows)


def test_figures_in_documents_come_from_results_files():
    files = [path for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")) if is_ours(path)]
    if not files:
        pytest.skip("no results file of this form yet")
    measured = [load(path) for path in files]
    for document in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for match in report.MARKED.finditer(document.read_text()):
            _, suite, name, _ = match.groups()
            shown = match.group(0).split("-->\n", 1)[1].rsplit("<!--", 1)[0].strip()
            known = [text for found in measured if found.suite == suite and (text := table_of(found, name))]
            assert shown in known, f"{document.name}: {name} is in no results file"


def is_ours(path: Path) -> bool:
    content = json.loads(path.read_text())
    return content.get("schema") == 2 and any(known["case"] == "clip" for known in content["rows"])


def table_of(found, name: str) -> str | None:
    try:
        return report.named_table(found, name).strip()
    except ValueError:
        return None


def test_capacity_extends_matrices_as_squares_and_the_rest_along_a_line():
    # 4 N D floats, and 16 bytes for each entry of the matrix, or 4 KiB a pair over 8 MiB.
    found = results(row(4096, 0.05, mib=24.0), dense(4096, 0.07), row(8192, 0.2, mib=40.0), dense(8192, 0.3))
    ours, matrix = capacities(found)
    for n in (10_000, 1_000_000):
        gigabytes = (16 * D * n + 4096 * n + 8 * 2**20) / 1e9
        assert ours.largest(gigabytes) == pytest.approx(n, rel=1e-6)
        assert matrix.largest((16 * D * n + 16 * n**2) / 1e9) == pytest.approx(n, rel=1e-6)
    assert ours.largest(0.005) == 0
    assert capacity_table(found)[0][1] == "1 GB" and len(capacity_table(found)) == 3


def test_every_picture_is_drawn(tmp_path):
    files = pictures.save(some_results(), tmp_path / "x.json")
    names = [file.name.removeprefix("x-").removesuffix(".png") for file in files]
    assert names == ["time", "memory", "floor", "capacity", "cases"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


class _Page(HTMLParser):
    """Sources of everything a page would load, its cells, and whether its tags close."""

    def __init__(self):
        super().__init__()
        self.sources, self.cells, self.open, self.tags = [], [], [], set()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "td":
            self.cells.append(data)


def test_the_page_holds_everything_and_loads_nothing(tmp_path):
    found = some_results()
    path = page.save(found, tmp_path / "x.json")
    read = _Page()
    read.feed(path.read_text())
    assert not read.open and "script" not in read.tags
    assert all(source.startswith("data:") for source in read.sources)
    assert sum(source.startswith("data:image/svg+xml;base64,") for source in read.sources) == 5
    wanted = ("fastclip eager", "0.200 s", "out of memory", "<b>", found.machine["torch"], "x.json", "abc1234")
    text = " ".join(read.cells) + path.read_text()
    assert all(word in text for word in wanted)
    assert "<b>" not in path.read_text()  # what is no markup is shown, not taken for it
    assert "the fastest other form (dense, one matmul) 0.300 s" in path.read_text()


def test_a_gpu_suites_file_has_the_same_tables_and_page(tmp_path):
    base = {"n": 8192, "d": 512, "dtype": "bf16", "mode": "forward+backward", "family": "softmax", "error": 1e-3}
    base |= {"ceiling_tflops": 700.0, "peak_mib": 600.0}
    content = {
        "machine": {"gpu": "NVIDIA H200", "memory_gib": 139.0, "driver": "570", "torch": "2.9", "triton": "3.5",
                    "commit": "abc", "date": "2026-01-31T10:00:00+00:00"},
        "settings": {},
        "rows": [
            {**base, "peer": "triton", "label": "fastclip triton", "runs_ms": [1.0, 2.0, 1.0]},
            {**base, "peer": "dense", "label": "dense, one matmul", "runs_ms": [3.0, 6.0, 3.0]},
            {**base, "peer": "openclip", "label": "OpenCLIP form", "note": "it would need 64 GiB"},
            {**base, "peer": "x @ y.T", "label": "product", "family": "product", "runs_ms": [1.0]},
        ],
    }  # fmt: skip
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(content))
    found = load(path)
    assert found == from_gpu(content) and found.suite == "gpu"
    assert "| dense, one matmul | 3.00x (3.00-3.00) |" in report.named_table(found, "ratio-bf16-training")
    assert found.rows[0].share["median"] == pytest.approx(8 * 8192**2 * 512 / 700e12 / 1e-3)
    assert found.rows[2].status == "out of memory"
    assert re.search("NVIDIA H200, 139.0 GiB", page.page(found, "gpu.json"))
