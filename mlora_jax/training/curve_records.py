"""The rank-accuracy curves of a run in a file: one line of JSON for each rank of a curve.

A curve counts only if the file holds a line for each of its ranks. A process that was killed while it wrote leaves
fewer lines, and the curve is then measured again.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from mlora_jax.training.records import keep_records, read_json_lines
from mlora_jax.trials import REQUIRED_AXES, Trial

CURVES = "curves.jsonl"
BASE = "base"  # the name, and the read-out, of the model without an adapter

Line = Mapping[str, Any]
# The fields of every line of a curve, besides the axes of its trial.
NEEDED = ("split", "readout", "at_rank", "of_ranks", "accuracy")


class CurveKey(NamedTuple):
    """The key that identifies a curve within a run.

    Attributes:
      trial: the trial's name, or `BASE`.
      split: "test" or "validation".
      readout: the read-out's name; `BASE` for the base model.
      task: a task of the harness; "" is the run's own task.
      asked_shots: the number of examples that the config asks for; None is the task's own number.
    """

    trial: str
    split: str
    readout: str
    task: str = ""
    asked_shots: int | None = None


@dataclasses.dataclass(frozen=True)
class HarnessRun:
    """How lm-evaluation-harness measured a curve.

    Attributes:
      version: "lm-eval" and its version.
      metric: the metric that the accuracy is.
      asked_shots: the number of examples that the config asks for; None is the task's own number.
    """

    version: str
    metric: str
    asked_shots: int | None


@dataclasses.dataclass(frozen=True)
class CurveRecord:
    """One whole curve.

    Attributes:
      trial: the trial that was measured; None is the base model, whose curve has the one rank 0.
      task: the task's name.
      split: "test" or "validation".
      readout: the read-out's name; `BASE` for the base.
      ranks: the ranks, in increasing order.
      accuracies: one per rank, in 0..1.
      standard_errors: one per rank; None where an older record has none.
      items: the number of items over which each accuracy is the mean; None where an older record does not say.
      shots: the number of examples in every prompt.
      truncated: the number of prompts that were cut to fit.
      harness: how the harness measured the curve; None if the run measured its own task.
      name: the trial's name as the file has it, or `BASE`; by default it is the name of `trial`.
    """

    trial: Trial | None
    task: str
    split: str
    readout: str
    ranks: tuple[int, ...]
    accuracies: tuple[float, ...]
    standard_errors: tuple[float | None, ...]
    items: int | None
    shots: int = 0
    truncated: int = 0
    harness: HarnessRun | None = None
    name: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or (self.trial.name if self.trial else BASE))

    @property
    def key(self) -> CurveKey:
        """The key that identifies this curve within its run."""
        if self.harness:
            return CurveKey(self.name, self.split, self.readout, self.task, self.harness.asked_shots)
        return CurveKey(self.name, self.split, self.readout)

    def to_lines(self) -> list[dict[str, Any]]:
        """Returns one line for each rank, in the order of the ranks."""
        values = zip(self.ranks, self.accuracies, self.standard_errors, strict=True)
        return [self._line(*at) for at in values]

    def _line(self, rank: int, accuracy: float, error: float | None) -> dict[str, Any]:
        trial = {"trial": self.name, **(self.trial.to_json() if self.trial else {})}
        measured = {
            "readout": self.readout,
            "at_rank": rank,
            "of_ranks": len(self.ranks),
            "accuracy": accuracy,
            "stderr": error,
            "items": self.items,
        }
        if self.harness is None:
            where = {"task": self.task, "split": self.split, "shots": self.shots}
            return {**trial, **where, **measured, "truncated": self.truncated}
        where = {
            "harness": self.harness.version,
            "task": self.task,
            "shots": self.shots,
            "asked_shots": self.harness.asked_shots,
            "metric": self.harness.metric,
            "split": self.split,
            "truncated_requests": self.truncated,
        }
        return {**trial, **where, **measured}

    @classmethod
    def from_lines(cls, lines: Iterable[Line]) -> CurveRecord | None:
        """Makes a curve from all lines that have its key; returns None if the line of a rank is missing.

        Args:
          lines: the lines, in any order. If a rank has several lines, the last one counts.
        """
        at = {line["at_rank"]: line for line in lines}
        if any(line["of_ranks"] != len(at) for line in at.values()):
            return None
        ranks = sorted(at)
        first = at[ranks[0]]
        harness = None
        if first.get("harness"):
            harness = HarnessRun(first["harness"], first.get("metric", ""), first["asked_shots"])
        return cls(
            trial=None if first["trial"] == BASE else Trial.from_json(first),
            task=first.get("task", ""),
            split=first["split"],
            readout=first["readout"],
            ranks=tuple(ranks),
            accuracies=tuple(at[rank]["accuracy"] for rank in ranks),
            standard_errors=tuple(at[rank].get("stderr") for rank in ranks),
            items=first.get("items"),
            shots=first.get("shots", 0),
            truncated=first.get("truncated_requests" if harness else "truncated") or 0,
            harness=harness,
            name=first["trial"],
        )


@dataclasses.dataclass(frozen=True)
class CurvesOnRecord:
    """The whole curves and the failed trials of a run.

    Attributes:
      whole: the curves by their keys.
      failed: name -> trial, for the trials whose loss became infinite or NaN.
    """

    whole: dict[CurveKey, CurveRecord] = dataclasses.field(default_factory=dict)
    failed: dict[str, Trial] = dataclasses.field(default_factory=dict)

    def __contains__(self, key: CurveKey) -> bool:
        return key in self.whole

    def __iter__(self) -> Iterator[CurveRecord]:
        return iter(self.whole.values())

    def get(self, key: CurveKey) -> CurveRecord | None:
        """Returns the curve of a key, or None."""
        return self.whole.get(key)

    def base(self) -> dict[str, CurveRecord]:
        """Returns split -> the base model's record on the run's own task."""
        return {record.split: record for record in self if record.trial is None and record.harness is None}


def failed_line(trial: Trial) -> dict[str, Any]:
    """Returns the line that stands for a trial whose loss became infinite or NaN."""
    return {"trial": trial.name, **trial.to_json(), "failed": True}


def read_curves(path: str | os.PathLike) -> CurvesOnRecord:
    """Reads the whole curves of a run's file, to which another process may still write.

    Args:
      path: the file; if it does not exist, there are no curves.

    Raises:
      ValueError: a line is not a record of a curve. The message names the line.
    """
    lines: dict[CurveKey, list[Line]] = {}
    failed: dict[str, Trial] = {}
    for line in _checked(path):
        if line.get("failed"):
            failed[line["trial"]] = Trial.from_json(line)
        else:
            lines.setdefault(_key(line), []).append(line)
    found = {key: CurveRecord.from_lines(of_key) for key, of_key in lines.items()}
    return CurvesOnRecord({key: record for key, record in found.items() if record is not None}, failed)


def drop_partial_curves(path: str | os.PathLike) -> None:
    """Rewrites a run's file without the lines of curves that are not whole."""
    whole = read_curves(path)
    keep_records(path, lambda line: bool(line.get("failed")) or _key(line) in whole)


def _key(line: Line) -> CurveKey:
    of_harness = (line["task"], line["asked_shots"]) if line.get("harness") else ()
    return CurveKey(line["trial"], line["split"], line["readout"], *of_harness)


def _checked(path: str | os.PathLike) -> Iterator[Line]:
    """Yields the lines of a run's file, each with all fields that it needs."""
    path = pathlib.Path(path)
    for number, line in enumerate(read_json_lines(path) if path.is_file() else (), start=1):
        of_trial = () if line.get("trial") == BASE else REQUIRED_AXES
        of_harness = ("task", "shots", "asked_shots") if line.get("harness") else ()
        needed = ("trial", *of_trial, *(() if line.get("failed") else (*NEEDED, *of_harness)))
        if missing := [name for name in needed if name not in line]:
            raise ValueError(f"{path}: record {number} has no {', '.join(missing)}")
        yield line
