"""Trackers that copy the records of metrics.jsonl to TensorBoard or to Weights & Biases."""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import pathlib
import secrets
import threading
from typing import Any, Protocol

from mlora_jax.disk import DiskFullError, ignore_echoes, lack_of_room, naming, write_aside

STEP_FIELDS = ("trial", "step", "time")
WANDB_ID = "wandb_id"


class Tracker(Protocol):
    """An object that receives the records of metrics.jsonl as they are written."""

    def write(self, record: dict[str, Any]) -> None:
        """Writes one record."""

    def go_back(self, trials: list[str], step: int) -> None:
        """Prepares for records that come again, because these trials resume training from an earlier step.

        Args:
          trials: the names of the trials.
          step: the number of finished steps from which they resume.
        """

    def finish(self, trials: list[str]) -> None:
        """Ends the records of these trials and sends those that were written.

        Args:
          trials: the names of the trials.
        """

    def close(self) -> None:
        """Ends the records of all trials."""


def _numbers(record: dict[str, Any]) -> dict[str, float]:
    values = {name: value for name, value in record.items() if name not in STEP_FIELDS}
    return {name: value for name, value in values.items() if isinstance(value, (int, float)) and math.isfinite(value)}


class TensorBoard:
    """Writes TensorBoard event files, in one folder per trial.

    Args:
      folder: the folder that `tensorboard --logdir` takes.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self._folder = pathlib.Path(folder)
        self._writers: dict[str, Any] = {}
        self._failed: BaseException | None = None
        self._hook, self._before = self._note, threading.excepthook
        threading.excepthook = self._hook

    def _note(self, failure) -> None:
        """Keeps the error of a writer's thread that found no room; the next `write` raises it."""
        if lack_of_room(failure.exc_value) is None:
            self._before(failure)
        else:
            self._failed = failure.exc_value
            ignore_echoes()  # the writer is closed once more when the program ends

    def write(self, record: dict[str, Any]) -> None:
        with naming(self._folder / record["trial"]):
            writer = self._writer(record["trial"])
            for name, value in _numbers(record).items():
                writer.add_scalar(name, value, record["step"], walltime=record["time"])
            if self._failed is not None:
                raise self._failed

    def _writer(self, trial: str, **options):
        if trial not in self._writers:
            from tensorboardX import SummaryWriter  # slow to import

            # The queue has no limit: a thread that found no room never empties it again, and a full queue would block.
            self._writers[trial] = SummaryWriter(str(self._folder / trial), max_queue=0, **options)
        return self._writers[trial]

    def go_back(self, trials: list[str], step: int) -> None:
        for trial in trials:
            if (self._folder / trial).is_dir():
                self._writer(trial, purge_step=step + 1)

    def finish(self, trials: list[str]) -> None:
        for trial in trials:
            if trial in self._writers:
                with naming(self._folder / trial):
                    self._writers.pop(trial).close()

    def close(self) -> None:
        with contextlib.suppress(DiskFullError) if self._failed is not None else contextlib.nullcontext():
            self.finish(list(self._writers))
        if threading.excepthook == self._hook:
            threading.excepthook = self._before


class WeightsAndBiases:
    """Logs each trial as a run of Weights & Biases, grouped by the run folder; a resumed trial continues its run.

    Args:
      project: the name of the project on Weights & Biases.
      workdir: the run folder. Its name is the name of the group, and a file in it keeps the random part of the run ids.

    Raises:
      ModuleNotFoundError: wandb is not installed.
    """

    def __init__(self, project: str, workdir: pathlib.Path) -> None:
        try:
            self._wandb = importlib.import_module("wandb")
        except ModuleNotFoundError as error:
            message = f"config.records.wandb_project={project!r} needs wandb: pip install 'mlora_jax[wandb]'"
            raise ModuleNotFoundError(message, name="wandb") from error
        self._project, self._group, file = project, workdir.name, workdir / WANDB_ID
        if not file.is_file():
            with write_aside(file) as aside:
                aside.write_text(secrets.token_hex(8), encoding="utf-8")
        self._id = file.read_text(encoding="utf-8")
        self._runs: dict[str, Any] = {}

    def write(self, record: dict[str, Any]) -> None:
        trial = record["trial"]
        if trial not in self._runs:
            self._runs[trial] = self._wandb.init(
                project=self._project,
                group=self._group,
                name=trial,
                id=f"{self._id}-{trial}",
                resume="allow",
                reinit="create_new",
            )
        self._runs[trial].log(_numbers(record), step=record["step"])

    def go_back(self, trials: list[str], step: int) -> None:
        """Does nothing, because Weights & Biases drops repeated values of a step, which are the same."""

    def finish(self, trials: list[str]) -> None:
        for trial in trials:
            if trial in self._runs:
                self._runs.pop(trial).finish()

    def close(self) -> None:
        self.finish(list(self._runs))


def make_trackers(workdir: str | os.PathLike, *, tensorboard: bool, wandb_project: str) -> list[Tracker]:
    """Makes the trackers that `config.records` asks for.

    Args:
      workdir: the run folder.
      tensorboard: whether to write TensorBoard event files.
      wandb_project: the project on Weights & Biases; empty for none.
    """
    workdir = pathlib.Path(workdir).absolute()
    found: list[Tracker] = [TensorBoard(workdir / "tensorboard")] if tensorboard else []
    return [*found, *([WeightsAndBiases(wandb_project, workdir)] if wandb_project else [])]
