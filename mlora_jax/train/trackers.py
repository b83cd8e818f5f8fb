"""Other people's dashboards: what metrics.jsonl says, also as TensorBoard events or on Weights & Biases."""

from __future__ import annotations

import importlib
import math
import pathlib
from typing import Any, Protocol

STEP_FIELDS = ("trial", "step", "time")


class Tracker(Protocol):
    """Takes the records of metrics.jsonl as they are written."""

    def write(self, record: dict[str, Any]) -> None:
        """One record."""

    def go_back(self, trials: list[str], step: int) -> None:
        """Training of these trials goes on from a step: what came after it comes again."""

    def close(self) -> None:
        """Everything written is on its way."""


def _numbers(record: dict[str, Any]) -> dict[str, float]:
    values = {name: value for name, value in record.items() if name not in STEP_FIELDS}
    return {name: value for name, value in values.items() if isinstance(value, (int, float)) and math.isfinite(value)}


class TensorBoard:
    """Event files, one folder per trial.

    Args:
      folder: that `tensorboard --logdir` is given.
    """

    def __init__(self, folder):
        self._folder = pathlib.Path(folder)
        self._writers: dict[str, Any] = {}

    def write(self, record: dict[str, Any]) -> None:
        writer = self._writer(record["trial"])
        for name, value in _numbers(record).items():
            writer.add_scalar(name, value, record["step"], walltime=record["time"])

    def _writer(self, trial: str, **options):
        if trial not in self._writers:
            from tensorboardX import SummaryWriter  # slow to import

            self._writers[trial] = SummaryWriter(str(self._folder / trial), **options)
        return self._writers[trial]

    def go_back(self, trials: list[str], step: int) -> None:
        for trial in trials:
            if (self._folder / trial).is_dir():
                self._writer(trial, purge_step=step + 1)

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()


class WeightsAndBiases:
    """One run per trial, grouped by the run folder; a trial that is continued goes on in its run.

    Args:
      project: of Weights & Biases.
      group: name of the run folder.

    Raises:
      ModuleNotFoundError: wandb is not installed.
    """

    def __init__(self, project: str, group: str):
        try:
            self._wandb = importlib.import_module("wandb")
        except ModuleNotFoundError as error:
            message = f"config.records.wandb_project={project!r} needs wandb: pip install 'mlora_jax[wandb]'"
            raise ModuleNotFoundError(message, name="wandb") from error
        self._project, self._group = project, group
        self._runs: dict[str, Any] = {}

    def write(self, record: dict[str, Any]) -> None:
        trial = record["trial"]
        if trial not in self._runs:
            self._runs[trial] = self._wandb.init(
                project=self._project,
                group=self._group,
                name=trial,
                id=f"{self._group}-{trial}",
                resume="allow",
                reinit="create_new",
            )
        self._runs[trial].log(_numbers(record), step=record["step"])

    def go_back(self, trials: list[str], step: int) -> None:
        """Nothing to do: Weights & Biases drops what is logged a second time for a step, and it is the same."""

    def close(self) -> None:
        for run in self._runs.values():
            run.finish()


def make_trackers(workdir, *, tensorboard: bool, wandb_project: str) -> list[Tracker]:
    """The trackers that `config.records` asks for."""
    workdir = pathlib.Path(workdir).absolute()
    found: list[Tracker] = [TensorBoard(workdir / "tensorboard")] if tensorboard else []
    return [*found, *([WeightsAndBiases(wandb_project, workdir.name)] if wandb_project else [])]
