"""A run's folder: which batches its trials train in, what of them is done, and what a kill left half written."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jaxlib
import numpy as np

from mlora_jax.compilation_cache import threads
from mlora_jax.config import changed_keys, resolve_stored
from mlora_jax.config_type import ConfigDict
from mlora_jax.disk import write_aside
from mlora_jax.parallel import hosts
from mlora_jax.training.curve_records import CURVES, CurvesOnRecord, drop_partial_curves, read_curves
from mlora_jax.training.grid import TrialBatch
from mlora_jax.trials import Trial, expand_trials

logger = logging.getLogger(__name__)

LEDGER, CONFIG, METRICS = "batches.json", "config.json", "metrics.jsonl"
ADAPTERS = "adapters"
NOT_COMPARED = "not_compared.json"
SCHEMA = 1


def stored_threads(workdir: str | os.PathLike[str]) -> int | None:
    """Returns the number of threads with which the run in a folder began; None if there is no run.

    The last bits of the run's results depend on this number.

    Args:
      workdir: the folder.
    """
    ledger = pathlib.Path(workdir) / LEDGER
    return json.loads(ledger.read_text(encoding="utf-8"))["machine"]["threads"] if ledger.is_file() else None


@contextlib.contextmanager
def only_one_run(path: str | os.PathLike[str]) -> Iterator[None]:
    """Keeps other processes out of a run's folder until the context ends.

    Args:
      path: the folder, which is made if it does not exist.

    Raises:
      ValueError: another process runs in the folder, or `path` is a URL.
    """
    if "://" in str(path):
        raise ValueError(f"--workdir must be a folder, got {path}: mount the bucket, by gcsfuse for example")
    folder = pathlib.Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another process is running in {folder}: wait for it, or give another --workdir"
            ) from None
        except OSError as error:  # a file system without locks
            logger.warning("%s cannot be locked (%s): see to it that no other process runs in it", folder, error)
        yield


def find_trial(path: str | os.PathLike[str], name: str) -> tuple[ConfigDict, Trial, pathlib.Path]:
    """Returns the run's config, a trained trial of the run, and the folder of the trial's adapter. It changes no file.

    Args:
      path: the folder of a run.
      name: the trial's name.

    Raises:
      FileNotFoundError: this is not the folder of a run, or the trial has no adapter yet.
      ValueError: the run has no such trial; the message lists those it has.
    """
    path = pathlib.Path(path)
    if not (path / CONFIG).is_file():
        raise FileNotFoundError(f"{path} is not the folder of a run: it has no {CONFIG}")
    stored = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    stored.pop("parallel", None)  # of the machine that it ran on
    config = resolve_stored(stored)
    trials = {trial.name: trial for trial in expand_trials(config)}
    if name not in trials:
        raise ValueError(f"{path} has no trial {name!r}; its trials: {', '.join(trials)}")
    folder = path / ADAPTERS / name
    if not folder.is_dir():
        raise FileNotFoundError(f"the trial {name} of {path} has no adapter yet: run it to its end first")
    return config, trials[name], folder


class RunFolder:
    """The folder of a run and its files.

    With several processes it lies where all of them see it. The first one writes, and what it reads all of them get.

    Args:
      path: the path of the folder, which is made if it does not exist.
      config: resolved.

    Attributes:
      path: the path of the folder.
      batches: every batch of this run so far, in the order in which they train.

    Raises:
      ValueError: the folder holds a run of another config.
    """

    def __init__(self, path: str | os.PathLike[str], config: ConfigDict) -> None:
        self.path = pathlib.Path(path)
        hosts.on_first_process(lambda: self._prepare(config))
        self.batches: list[TrialBatch] = []
        self._trained: set[str] = set()
        self._machine = _machine()
        self._inputs: dict[str, str] = {}
        if (self.path / LEDGER).is_file():
            self._read_ledger()

    def _prepare(self, config: ConfigDict) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        self._drop_partial_files()
        self._check_config(config)
        drop_partial_curves(self.path / CURVES)

    def _drop_partial_files(self) -> None:
        """Deletes the files that a killed process was writing; a lock keeps out any other process."""
        for pattern in (".*.partial", f"{ADAPTERS}/*/.*.partial", "verdicts/*/.*.partial"):
            for file in self.path.glob(pattern):
                file.unlink()

    def _check_config(self, config: ConfigDict) -> None:
        file, new = self.path / CONFIG, json.loads(json.dumps(config.to_dict()))
        changed = changed_keys(json.loads(file.read_text(encoding="utf-8")), new) if file.is_file() else []
        if changed and self._begun():
            raise ValueError(
                f"{self.path} holds a run of another config: {'; '.join(changed)}. Give another --workdir, or "
                "delete this one"
            )
        if changed:
            (self.path / LEDGER).unlink(missing_ok=True)  # a plan of nothing but trials that are wanted no more
        with write_aside(file) as aside:
            aside.write_text(json.dumps(new, indent=2) + "\n", encoding="utf-8")

    def _begun(self) -> bool:
        """Whether anything was measured, logged, saved or trained.

        Before that a run has only looked at its config, model and data, and may have found something to correct.
        """
        ledger, metrics = self.path / LEDGER, self.path / METRICS
        batches = json.loads(ledger.read_text(encoding="utf-8"))["batches"] if ledger.is_file() else ()
        logged = metrics.is_file() and metrics.stat().st_size > 0
        saved = any(self.path.glob("checkpoints/*/*"))
        return (
            logged or saved or any(batch["trained"] for batch in batches) or bool(read_curves(self.path / CURVES).whole)
        )

    def _read_ledger(self) -> None:
        record = json.loads((self.path / LEDGER).read_text(encoding="utf-8"))
        if record.get("schema") != SCHEMA:
            raise ValueError(f"{self.path / LEDGER} has schema {record.get('schema')!r}; this version reads {SCHEMA}")
        for name, before in record["machine"].items():
            if name == "x64" and before != self._machine[name]:
                raise ValueError(
                    f"{self.path} holds a run that began with JAX_ENABLE_X64={int(before)}: set that environment "
                    "variable to go on, or give another --workdir"
                )
            if before != self._machine[name]:
                logger.warning(
                    "this run began with %s %s and goes on with %s: its last bits may differ",
                    name, before, self._machine[name],
                )  # fmt: skip
        self._machine, self._inputs = record["machine"], record.get("inputs", {})
        for batch in record["batches"]:
            trials = tuple(Trial.from_json(trial) for trial in batch["trials"])
            self.batches.append(TrialBatch(batch["name"], trials, batch["slots"]))
            if batch["trained"]:
                self._trained.add(batch["name"])

    def _write_ledger(self) -> None:
        if not hosts.is_first():
            return
        batches = [{**dataclasses.asdict(batch), "trained": self.trained(batch)} for batch in self.batches]
        record = {"schema": SCHEMA, "machine": self._machine, "inputs": self._inputs, "batches": batches}
        with write_aside(self.path / LEDGER) as aside:
            aside.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    def check_inputs(self, digests: Mapping[str, str]) -> None:
        """Remembers what the run's base model and data are.

        Args:
          digests: name -> digest, as `Experiment.digests` gives them.

        Raises:
          ValueError: they are not those that the run began with.
        """
        changed = [name for name, before in self._inputs.items() if digests.get(name) != before]
        if changed:
            raise ValueError(
                f"{self.path} holds a run on other inputs: {' and '.join(changed)} changed since it began. Put back "
                "what was there, or give another --workdir"
            )
        self._inputs = dict(digests)

    def trained(self, batch: TrialBatch) -> bool:
        """Returns whether all adapters of a batch are on disk."""
        return batch.name in self._trained

    def unplanned(self, trials: Sequence[Trial]) -> list[Trial]:
        """Returns the trials that are in no batch yet."""
        planned = {trial for batch in self.batches for trial in batch.trials}
        return [trial for trial in trials if trial not in planned]

    def add(self, batches: Sequence[tuple[tuple[Trial, ...], int]]) -> None:
        """Adds batches: their trials and slots. From here on they are trained in these and no others."""
        for trials, slots in batches:
            self.batches.append(TrialBatch(f"batch-{len(self.batches):04d}", trials, slots))
        self._write_ledger()

    def finish(self, batch: TrialBatch) -> None:
        """Marks a batch as trained, and deletes its checkpoints."""
        self._trained.add(batch.name)
        self._write_ledger()
        if hosts.is_first():
            shutil.rmtree(self.checkpoints(batch), ignore_errors=True)

    def checkpoints(self, batch: TrialBatch) -> pathlib.Path:
        """Returns the folder of the checkpoints of a batch."""
        return self.path / "checkpoints" / batch.name

    def adapter(self, trial: Trial) -> pathlib.Path:
        """Returns the folder of the adapter of a trial."""
        return self.path / ADAPTERS / trial.name

    def curves(self) -> CurvesOnRecord:
        """The curves of the run that are whole, and the trials that failed."""
        return hosts.broadcast(read_curves(self.path / CURVES) if hosts.is_first() else CurvesOnRecord())

    def save_verdicts(self, trial: str, readout: str, measured_on: str, verdicts: np.ndarray) -> None:
        """Keeps the per-item results [ranks, items] bool behind a curve.

        Args:
          trial: its name, or "base".
          readout: the read-out of the curve.
          measured_on: the split of the run's own task, or what `task_key` says of another one.
          verdicts: one row per rank.
        """
        if not hosts.is_first():
            return
        path = _verdicts(self.path, trial, readout, measured_on)
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_aside(path) as aside, aside.open("wb") as file:
            np.save(file, verdicts)

    def verdicts(self, trial: str, readout: str, measured_on: str) -> np.ndarray | None:
        """Returns the verdicts that `save_verdicts` kept, or None."""
        return load_verdicts(self.path, trial, readout, measured_on)

    def list_not_compared(self, reasons: dict[str, str]) -> None:
        """Notes the tasks that cannot be measured, and why; the report says so."""
        if not hosts.is_first():
            return
        if reasons:
            with write_aside(self.path / NOT_COMPARED) as aside:
                aside.write_text(json.dumps(reasons, indent=2) + "\n", encoding="utf-8")
        else:
            (self.path / NOT_COMPARED).unlink(missing_ok=True)

    def not_compared(self) -> dict[str, str]:
        """The tasks that `list_not_compared` noted, and the reasons."""
        file = self.path / NOT_COMPARED
        reads = hosts.is_first() and file.is_file()
        return hosts.broadcast(json.loads(file.read_text(encoding="utf-8")) if reads else {})


def _machine() -> dict[str, Any]:
    """Returns the versions and settings that the last bits of a run's results depend on, besides its config."""
    # jaxlib and jax.config have these attributes, but no types for them.
    return {
        "threads": threads(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,  # pyright: ignore[reportPrivateImportUsage]
        "device": jax.devices()[0].device_kind,
        "x64": jax.config.jax_enable_x64,  # pyright: ignore[reportAttributeAccessIssue]
        "matmul_precision": jax.config.jax_default_matmul_precision,  # pyright: ignore[reportAttributeAccessIssue]
    }


def load_verdicts(path: str | os.PathLike[str], trial: str, readout: str, measured_on: str) -> np.ndarray | None:
    """Returns the per-item results [ranks, items] bool that `RunFolder.save_verdicts` wrote; None if there are none.

    Args:
      path: the folder of the run.
      trial: the name of the trial.
      readout: the read-out.
      measured_on: the split, or the key of a task that `task_key` returns.
    """
    file = _verdicts(pathlib.Path(path), trial, readout, measured_on)
    return np.load(file) if file.is_file() else None


def _verdicts(path: pathlib.Path, trial: str, readout: str, measured_on: str) -> pathlib.Path:
    return path / "verdicts" / measured_on / f"{trial}-{readout}.npy"


def task_key(task: str, shots: int) -> str:
    """Returns the name, in a folder of verdicts, of a harness task with a number of examples."""
    return f"{task}-{shots}"
