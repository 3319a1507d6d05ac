"""How fast things go: measured rates, where they come from, and the time they give for a step's work."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fastclip.errors import UserError
from fastclip.plan.work import Work

TRAINING = "forward+backward"


@dataclass(frozen=True)
class Rates:
    """FLOP/s of the towers in forward and backward together, and in forward alone; of the loss, counted as 8 N^2 D; and
    bytes/s that a GPU sends. None where nothing was measured. source: what was measured, and where."""

    towers: float | None = None
    forward: float | None = None
    loss: float | None = None
    network: float | None = None
    source: str = ""


@dataclass(frozen=True)
class Times:
    """Seconds of a step's parts, one after the other; None where a rate is missing. The optimiser is not counted."""

    towers: float | None
    again: float | None
    loss: float | None
    messages: float | None

    @property
    def step(self) -> float | None:
        parts = (self.towers, self.again, self.loss, self.messages)
        return None if None in parts else sum(parts)


def times(work: Work, rates: Rates) -> Times:
    return Times(
        towers=_seconds(work.towers, rates.towers),
        again=_seconds(work.again, rates.forward),
        loss=_seconds(work.loss, rates.loss),
        messages=_seconds(work.bytes_sent, rates.network),
    )


def _seconds(amount: float, rate: float | None) -> float | None:
    if amount == 0:
        return 0.0
    return None if rate is None else amount / rate


def read(path: Path, dtype: str) -> Rates:
    """From a file that `save` wrote, or the loss's rate alone from a results file of `fastclip bench`.

    UserError where it holds neither for this dtype.
    """
    try:
        content = json.loads(path.read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a JSON file: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no rates")
    for line in content.get("extra", {}).get("rates", []):
        if line["dtype"] == dtype:
            return Rates(
                **{name: line.get(name) for name in ("towers", "forward", "loss", "network")}, source=line["source"]
            )
    rows = [row for row in content.get("rows", []) if _is_loss(row, dtype)]
    if not rows:
        raise UserError(
            f"{path} holds no measured rate for {dtype}: write one with fastclip plan --measure --save-rates"
        )
    row = max(rows, key=lambda row: row["n"])
    flops = 8 * row["n"] ** 2 * row["d"] / row["seconds"]["median"]
    where = content["machine"].get("gpu") or content["machine"].get("cpu")
    return Rates(loss=flops, source=f"loss: {row['label']}, N = {row['n']:,}, D = {row['d']}, {dtype}, {where}")


def _is_loss(row: dict, dtype: str) -> bool:
    ours = row.get("label", "").startswith("fastclip") and row.get("status") == "measured"
    return ours and (row.get("case"), row.get("mode"), row.get("dtype")) == ("clip", TRAINING, dtype)


def save(path: Path, rates: Rates, dtype: str) -> None:
    path.write_text(json.dumps({"extra": {"rates": [{"dtype": dtype, **asdict(rates)}]}}, indent=1) + "\n")


def with_network(rates: Rates, gigabytes: float | None) -> Rates:
    """The same with a network's rate as the user gives it, GB/s."""
    if gigabytes is None:
        return rates
    return replace(rates, network=gigabytes * 1e9, source="; ".join(filter(None, [rates.source, "network as given"])))
