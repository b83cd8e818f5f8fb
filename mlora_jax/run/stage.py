"""What the stages of a run share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from mlora_jax.config_type import ConfigDict
from mlora_jax.parallel import hosts
from mlora_jax.run.experiment import Experiment
from mlora_jax.run.folder import RunFolder
from mlora_jax.training.loop import Interrupted
from mlora_jax.training.progress import RunProgress
from mlora_jax.training.records import JsonLines, NoRecords
from mlora_jax.training.trackers import Tracker


@dataclasses.dataclass(frozen=True)
class Stage:
    """The state that all stages of a run share.

    Attributes:
      config: resolved.
      folder: what the run has on disk.
      experiment: loaded.
      metrics, curves: where records are written.
      progress: what is shown.
      trackers: TensorBoard and its like.
      signal_came: () -> the number of the signal that came to this process, or 0.
    """

    config: ConfigDict
    folder: RunFolder
    experiment: Experiment
    metrics: JsonLines | NoRecords
    curves: JsonLines | NoRecords
    progress: RunProgress
    trackers: list[Tracker]
    signal_came: Callable[[], int]

    def leave_if_asked(self) -> None:
        """Raises Interrupted if a signal came to any process; only where everything is saved."""
        if signal_number := hosts.largest(self.signal_came()):
            raise Interrupted(128 + signal_number)

    def record(self, **values: Any) -> None:
        """Writes one record to metrics.jsonl and to every tracker."""
        self.metrics.write(values)
        for tracker in self.trackers:
            tracker.write(values)
