"""Other people's dashboards: what metrics.jsonl says, also as TensorBoard events or on Weights & Biases."""

from __future__ import annotations

import contextlib
import importlib
import math
import pathlib
import secrets
import threading
from typing import Any, Protocol

from mlora_jax.disk import DiskFullError, ignore_echoes, lack_of_room, naming, write_aside

STEP_FIELDS = ("trial", "step", "time")
WANDB_ID = "wandb_id"


class Tracker(Protocol):
    """Takes the records of metrics.jsonl as they are written."""

    def write(self, record: dict[str, Any]) -> None:
        """One record."""

    def go_back(self, trials: list[str], step: int) -> None:
        """Training of these trials goes on from a step: what came after it comes again."""

    def finish(self, trials: list[str]) -> None:
        """No more records of these trials will come; those that came are on their way."""

    def close(self) -> None:
        """The same of all trials."""


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
        self._failed: BaseException | None = None
        self._hook, self._before = self._note, threading.excepthook
        threading.excepthook = self._hook

    def _note(self, failure) -> None:
        """Keeps what ended a writer's thread for want of room: it is raised where the next record comes."""
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

            # Without a limit to the queue: it is never emptied again when its thread has found no room.
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
    """One run per trial, grouped by the run folder; a trial that is continued goes on in its run.

    Args:
      project: of Weights & Biases.
      workdir: the run folder; its name is the group's. It keeps the random part of the runs' ids in a file.

    Raises:
      ModuleNotFoundError: wandb is not installed.
    """

    def __init__(self, project: str, workdir: pathlib.Path):
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
        """Nothing to do: Weights & Biases drops what is logged a second time for a step, and it is the same."""

    def finish(self, trials: list[str]) -> None:
        for trial in trials:
            if trial in self._runs:
                self._runs.pop(trial).finish()

    def close(self) -> None:
        self.finish(list(self._runs))


def make_trackers(workdir, *, tensorboard: bool, wandb_project: str) -> list[Tracker]:
    """The trackers that `config.records` asks for."""
    workdir = pathlib.Path(workdir).absolute()
    found: list[Tracker] = [TensorBoard(workdir / "tensorboard")] if tensorboard else []
    return [*found, *([WeightsAndBiases(wandb_project, workdir)] if wandb_project else [])]
