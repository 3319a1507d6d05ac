"""The regression guard, agreement of two runs, and the command."""

import json
from dataclasses import replace

import pytest
from benchmark_cases import SMALL, in_this_process, results, row

from fastclip import cli
from fastclip.benchmarks import agree, guard, suite
from fastclip.benchmarks.results import load


def compared(tmp_path, old, new) -> int:
    """Exit code of the comparison of two files."""
    for name, found in (("old", old), ("new", new)):
        found.save(tmp_path / f"{name}.json")
    return guard.main(guard.GuardConfig(tmp_path / "old.json", tmp_path / "new.json"))


def test_a_lower_share_of_the_floor_fails_whatever_the_seconds(tmp_path, capsys):
    # The clock was twice as fast: seconds say better, the share of the floor says 1.25 times as slow.
    assert compared(tmp_path, results(row(64, 1.0, of_floor=0.8)), results(row(64, 0.5, of_floor=0.64))) == 1
    printed = capsys.readouterr().out
    assert "1.25x as slow  clip N=64" in printed and "share of the floor 0.800 -> 0.640" in printed
    assert "SLOWER" in printed and "1 compared, 1 more than 1.15 times as slow, 0 unclear" in printed


def test_spreads_that_overlap_leave_it_unclear(tmp_path, capsys):
    def noisy(median: float):
        return {"median": median, "low": 0.4, "high": 0.9, "runs": [0.4, median, 0.9]}

    old, new = (results(row(64, 1.0, share=noisy(value))) for value in (0.8, 0.5))
    assert compared(tmp_path, old, new) == 0
    assert "UNCLEAR: the spreads overlap" in capsys.readouterr().out


def test_a_change_below_the_threshold_passes(tmp_path):
    assert compared(tmp_path, results(row(64, 1.0, of_floor=0.8)), results(row(64, 9.0, of_floor=0.75))) == 0


def test_other_peoples_slowness_is_not_ours(tmp_path):
    theirs = {"peer": "dense", "label": "dense, one matmul"}
    old = results(row(64, 1.0), row(64, 1.0, of_floor=0.8, **theirs))
    assert compared(tmp_path, old, results(row(64, 1.0), row(64, 1.0, of_floor=0.1, **theirs))) == 0


def test_without_a_floor_the_plain_form_of_the_same_rounds_is_the_measure(tmp_path, capsys):
    def found(ours_s: float, theirs_s: float):
        plain = {"share": None, "fp32_share": None, "case": "loading"}
        return results(
            row(64, ours_s, label="fastclip", **EMPTY | plain), row(64, theirs_s, peer="x", label="x", **EMPTY | plain)
        )

    assert compared(tmp_path, found(1.0, 1.0), found(3.0, 2.0)) == 1
    assert "time over that of x 1.000 -> 1.500" in capsys.readouterr().out
    assert compared(tmp_path, found(1.0, 1.0), found(3.0, 3.0)) == 0


EMPTY = {"floor_s": None, "gemm_gflops": None}


def test_a_result_that_is_now_wrong_fails(tmp_path, capsys):
    now = row(64, 1.0, status="wrong", note="wrong loss: relative error 1", seconds=None, share=None)
    assert compared(tmp_path, results(row(64, 1.0)), results(now)) == 1
    assert "WRONG: wrong loss" in capsys.readouterr().out


def test_nothing_in_common_is_no_success(tmp_path):
    assert compared(tmp_path, results(row(64, 1.0)), results(row(128, 1.0))) == 1


def test_runs_agree_where_their_spreads_overlap(tmp_path, capsys):
    theirs = {"peer": "dense", "label": "dense, one matmul"}

    def found(ratio: list[float], seconds: float):
        spread = {"median": ratio[1], "low": ratio[0], "high": ratio[2], "runs": ratio}
        return results(row(64, seconds), row(64, seconds, ratio=spread, **theirs))

    a, near, far = found([1.0, 1.1, 1.2], 1.0), found([1.15, 1.3, 1.4], 1.0), found([1.3, 1.4, 1.5], 2.0)
    assert agree.agree(a, near).good and agree.agree(a, near).compared == {"ratio": 1, "share": 2, "seconds": 2}
    verdict = agree.agree(a, far)
    assert not verdict.good and verdict.agreeing == {"ratio": 0, "share": 2, "seconds": 0}
    a.save(tmp_path / "a.json")
    far.save(tmp_path / "far.json")
    assert agree.main(agree.AgreeConfig(tmp_path / "a.json", tmp_path / "far.json")) == 1
    assert "ratio of clip N=64" in capsys.readouterr().out
    assert not agree.agree(a, results(row(128, 1.0))).good  # nothing in common


@pytest.fixture
def quick_bench(monkeypatch, tmp_path):
    """suite.run of a tiny problem, in this process; returns (exit code, results)."""
    monkeypatch.setattr("fastclip.benchmarks.run.run_in_child", in_this_process)
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")
    settings = replace(SMALL, modes=("forward",), memory=False, device="cpu", plots=False)

    def bench(name: str, **changes):
        path = tmp_path / name
        config = replace(settings, **({} if "add" in changes else {"out": path}) | changes)
        return suite.run(config), load(path)

    return bench


def test_against_measures_what_seems_slower_again_before_it_fails(quick_bench, tmp_path, capsys):
    _, found = quick_bench("a.json")
    assert found.parts[0]["settings"]["sizes"] == [96]
    faster = tmp_path / "faster.json"
    for known in found.rows:
        known.share = {key: [v * 100 for v in value] if key == "runs" else value * 100
                       for key, value in known.share.items()}  # fmt: skip
    found.save(faster)
    code, _ = quick_bench("b.json", against=faster)
    printed = capsys.readouterr().out
    assert code == 1 and "1 seem slower; measuring these again." in printed and "SLOWER" in printed
    slower = json.loads(faster.read_text())
    for known in slower["rows"]:
        known["share"]["median"] /= 1e6
    faster.write_text(json.dumps(slower))
    code, _ = quick_bench("c.json", against=faster)
    assert code == 0 and "1 compared, 0 more than 1.15" in capsys.readouterr().out


def test_a_later_part_is_added_to_a_file(quick_bench, tmp_path):
    quick_bench("a.json")
    code, both = quick_bench("a.json", add=tmp_path / "a.json", sizes=(64,))
    assert code == 0 and {known.n for known in both.rows} == {96, 64} and len(both.parts) == 2
    # The file tells how long a call takes.
    _, third = quick_bench("a.json", add=tmp_path / "a.json", sizes=(200,), call_limit_s=1e-9)
    assert {known.status for known in third.find(n=200)} == {"not run"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "clap"], "--only takes clip, siglip"),
        (["--peers", "nobody"], "--peers takes"),
        (["--against", "no/such/file.json"], "No such file"),
        (["--device", "gpu"], "no CUDA device here"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_mistakes_end_in_one_line(capsys, monkeypatch, arguments, said):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", *arguments])
    error = capsys.readouterr().err
    assert stopped.value.code == 1 and error.startswith("fastclip: ") and said in error and error.count("\n") == 1
