"""What benchmarks/ranks.py makes of a run's metrics."""

import json

import pytest

from fastclip.benchmarks import ranks


def test_median_and_mean_of_the_steps_that_count(tmp_path):
    rates = [1.0, 1.0, 1.0, 100.0, 50.0, 100.0, 7.0]  # three to warm up; the last one also computed accuracy
    records = [{"step": i + 1, "loss": 0.1, "samples_per_second": rate} for i, rate in enumerate(rates)]
    records[-1]["accuracy"] = 0.5
    records.append({"step": 7, "recall@1": 0.5})
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    # Of 10 samples each: 30 in 0.1 + 0.2 + 0.1 s.
    assert ranks.speed(tmp_path) == {"median": 100.0, "mean": pytest.approx(75.0)}


def test_ratio_is_of_each_round(monkeypatch):
    runs = iter([[2.0, 2.0], [3.0], [4.0, 4.0], [4.0]])  # apart and together, in turn
    monkeypatch.setattr(ranks, "speeds", lambda *_: [{"median": v, "mean": v / 2} for v in next(runs)])
    row = ranks.compared(512, 15, 2)
    assert row["median"] == {"apart": [4.0, 8.0], "together": [3.0, 4.0], "ratio": 0.625}
    assert row["mean"]["together"] == [1.5, 2.0]
