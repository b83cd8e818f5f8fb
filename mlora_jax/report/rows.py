"""Records of single trials, gathered into one row per method, read-out and learning rate."""

from __future__ import annotations

import collections
import dataclasses
import pathlib
import statistics
from collections.abc import Iterable, Sequence

from mlora_jax.core import POLICIES, summarize
from mlora_jax.train.records import read_json_lines


@dataclasses.dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over seeds; the deviation of one seed is None."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


@dataclasses.dataclass(frozen=True)
class CurveRow:
    """One rank-accuracy curve over seeds.

    Attributes:
      setting: (scaling, R, weights), what the rows of one table share.
      method: a key of `POLICIES`.
      readout: "prefix", "nested", "masked" or "squeeze".
      learning_rate: peak.
      seeds: the seeds that finished.
      accuracies: rank -> accuracy in 0..1.
      linear, log2, mean: AURAC over either axis, and the plain mean.
    """

    setting: tuple[str, int, tuple[float, ...]]
    method: str
    readout: str
    learning_rate: float
    seeds: tuple[int, ...]
    accuracies: dict[int, Spread]
    linear: Spread
    log2: Spread
    mean: Spread

    @property
    def label(self) -> str:
        """How tables and figures call the row."""
        return {"prefix": self.method, "squeeze": f"{self.method} + squeeze"}.get(
            self.readout, f"{self.method} ({self.readout})"
        )


@dataclasses.dataclass(frozen=True)
class RunRecords:
    """What a run measured.

    Attributes:
      base: accuracy of the model without an adapter.
      rows: one per (setting, method, read-out, learning rate), in the table's order.
      failed: names of the trials whose loss became infinite or NaN; they have no row.
    """

    base: float
    rows: list[CurveRow]
    failed: list[str]


def read_rows(workdir) -> RunRecords:
    """Gathers a run's records.

    Args:
      workdir: folder of a run.

    Raises:
      FileNotFoundError, ValueError: there are no records, or unreadable ones.
    """
    records = read_json_lines(pathlib.Path(workdir) / "curves.jsonl")
    base = [record["accuracy"] for record in records if record["trial"] == "base"]
    if not base:
        raise ValueError(f"{workdir} holds no accuracy of the base model")
    curves: dict[tuple, dict[int, dict[int, float]]] = collections.defaultdict(lambda: collections.defaultdict(dict))
    for record in records:
        if record["trial"] == "base" or record.get("failed"):
            continue
        setting = (record["scaling"], record["rank"], tuple(record["weights"]))
        key = (setting, record["method"], record["readout"], record["learning_rate"])
        curves[key][record["seed"]][record["at_rank"]] = record["accuracy"]
    rows = [_row(*key, by_seed) for key, by_seed in curves.items()]
    order = list(POLICIES)
    rows.sort(key=lambda row: (row.setting, order.index(row.method), row.learning_rate))
    return RunRecords(base[0], rows, [record["trial"] for record in records if record.get("failed")])


def best_rows(rows: Iterable[CurveRow]) -> list[CurveRow]:
    """Per (setting, method, read-out) the row of the learning rate with the highest mean AURAC over log2 rank."""
    best: dict[tuple, CurveRow] = {}
    for row in rows:
        key = (row.setting, row.method, row.readout)
        if key not in best or row.log2.mean > best[key].log2.mean:
            best[key] = row
    return list(best.values())


def _row(setting, method, readout, learning_rate, by_seed) -> CurveRow:
    ranks = sorted(next(iter(by_seed.values())))
    curves = {seed: [curve[rank] for rank in ranks] for seed, curve in sorted(by_seed.items())}
    areas = [summarize(curve, ranks) for curve in curves.values()]
    return CurveRow(
        setting,
        method,
        readout,
        learning_rate,
        tuple(curves),
        {rank: Spread.of(values) for rank, values in zip(ranks, zip(*curves.values(), strict=True), strict=True)},
        *(Spread.of([getattr(area, name) for area in areas]) for name in ("linear", "log2", "mean")),
    )
