"""The records of a cell in one file of JSON lines, from which a study goes on without the folders of its runs.

The first line holds the config with which the cell began. Every other line holds one whole curve with its verdicts, or
a failed trial. A study that is given a folder of such files appends to them when a trial is finished, does not train
again what they hold, and makes its tables from them. The adapters are not in the file, so a read-out that is added
later has to train its trial again.
"""

from __future__ import annotations

import base64
import dataclasses
import datetime
import json
import os
import pathlib
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from mlora_jax.config import changed_keys
from mlora_jax.config_type import ConfigDict
from mlora_jax.run.folder import LEDGER, load_verdicts
from mlora_jax.study.keys import without_study
from mlora_jax.training.curve_records import CURVES, CurveKey, CurveRecord, CurvesOnRecord, failed_line, read_curves
from mlora_jax.training.records import JsonLines, read_json_lines
from mlora_jax.trials import Trial

# Keys whose values say where something lies, or what else is trained and read out: they change no curve.
FREE = ("data.cache_dir", "data.raw_dir", "model.path", "evaluation.readouts")


@dataclasses.dataclass(frozen=True)
class CellRecords:
    """The curves and verdicts of a cell.

    Attributes:
      curves: the curves and the failed trials.
      verdicts: key of a curve -> [ranks, items] bool, whether each item is answered correctly.
      inputs: the digests of the base and of the data in a file of records; empty if there is none.
    """

    curves: CurvesOnRecord = dataclasses.field(default_factory=CurvesOnRecord)
    verdicts: Mapping[CurveKey, np.ndarray] = dataclasses.field(default_factory=dict)
    inputs: Mapping[str, str] = dataclasses.field(default_factory=dict)


def records_file(folder: str | os.PathLike[str], cell: str) -> pathlib.Path:
    """Returns the file of a cell in a folder of records."""
    return pathlib.Path(folder) / f"{cell}.jsonl"


def read_measured(
    folder: str | os.PathLike[str], records: str | os.PathLike[str] | None = None, config: ConfigDict | None = None
) -> CellRecords:
    """Reads the measurements of a cell from the folder of its run and from its file of records.

    Args:
      folder: the folder of the run; it may not exist. If both hold a curve, that of the folder counts.
      records: the file of records, which may not exist; None: there is none.
      config: the config of the cell, for which the records must have been made; None: any.

    Raises:
      ValueError: the records belong to another config, which the message names key by key; or a line is not a record.
    """
    found = CellRecords() if records is None else _read_records(pathlib.Path(records), config)
    own = read_curves(pathlib.Path(folder) / CURVES)
    verdicts = dict(found.verdicts)
    for key in own.whole:
        of_item = None if key.task else load_verdicts(folder, key.trial, key.readout, key.split)
        if of_item is not None:
            verdicts[key] = of_item
    curves = CurvesOnRecord({**found.curves.whole, **own.whole}, {**found.curves.failed, **own.failed})
    return CellRecords(curves, verdicts, found.inputs)


def append_new(
    folder: str | os.PathLike[str], records: str | os.PathLike[str], config: ConfigDict, *, origin: Mapping[str, Any]
) -> int:
    """Appends to a file of records what the folder of a run holds in addition, and returns the number of new lines.

    Args:
      folder: the folder of the cell's run.
      records: the file, which is made if it does not exist.
      config: the config of the cell.
      origin: what every new line says about the code that made it, such as the version of the package.

    Raises:
      ValueError: the records belong to another config, base or data.
    """
    file, inputs = pathlib.Path(records), _inputs(pathlib.Path(folder))
    known, own = _read_records(file, config), read_measured(folder)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    if known.inputs and inputs and known.inputs != inputs:
        differing = ", ".join(name for name in inputs if inputs[name] != known.inputs.get(name))
        raise ValueError(f"{file} holds records of another {differing} than the run in {folder}: give another file")
    lines = [] if file.is_file() else [{"config": _stored(config), "inputs": inputs}]
    for name, trial in own.curves.failed.items():
        if name not in known.curves.failed:
            lines.append({**failed_line(trial), "date": now, **origin})
    for key, record in own.curves.whole.items():
        if key not in known.curves:
            packed = {"verdicts": pack(own.verdicts[key])} if key in own.verdicts else {}
            lines.append({**_curve_line(record), **packed, "date": now, **origin})
    if lines:
        file.parent.mkdir(parents=True, exist_ok=True)
        with JsonLines(file) as appended:
            appended.write(*lines)
    return len(lines)


def pack(verdicts: np.ndarray) -> dict[str, Any]:
    """Returns verdicts [ranks, items] bool as JSON: their shape, and their bits, compressed, in base64.

    >>> unpack(pack(np.array([[True, False, True]]))).tolist()
    [[True, False, True]]
    """
    bits = zlib.compress(np.packbits(np.asarray(verdicts, bool)).tobytes(), 9)
    return {"shape": list(verdicts.shape), "bits": base64.b64encode(bits).decode("ascii")}


def unpack(packed: Mapping[str, Any]) -> np.ndarray:
    """Returns the verdicts [ranks, items] bool that `pack` wrote."""
    shape = tuple(packed["shape"])
    bits = np.frombuffer(zlib.decompress(base64.b64decode(packed["bits"])), np.uint8)
    return np.unpackbits(bits, count=int(np.prod(shape))).astype(bool).reshape(shape)


def _curve_line(record: CurveRecord) -> dict[str, Any]:
    """Returns a whole curve as one record: the fields of its lines, those that differ as lists over the ranks."""
    lines = record.to_lines()
    differing = {"at_rank", "accuracy", "stderr"}
    return {name: [line[name] for line in lines] if name in differing else value for name, value in lines[0].items()}


def _curve_of(line: Mapping[str, Any]) -> CurveRecord:
    columns = zip(line["at_rank"], line["accuracy"], line["stderr"], strict=True)
    lines = [{**line, "at_rank": rank, "accuracy": accuracy, "stderr": error} for rank, accuracy, error in columns]
    record = CurveRecord.from_lines(lines)
    if record is None:
        raise KeyError("of_ranks")
    return record


def _read_records(file: pathlib.Path, config: ConfigDict | None) -> CellRecords:
    curves, verdicts, failed, inputs = {}, {}, {}, {}
    for number, line in enumerate(read_json_lines(file) if file.is_file() else (), start=1):
        if "config" in line:
            if config is not None and (changed := _changed(line["config"], config)):
                raise ValueError(f"{file} holds records of another config of the cell: {'; '.join(changed)}")
            inputs = line.get("inputs", {})
            continue
        try:
            if line.get("failed"):
                failed[line["trial"]] = Trial.from_json(line)
                continue
            record = _curve_of(line)
            curves[record.key] = record
            if "verdicts" in line:
                verdicts[record.key] = unpack(line["verdicts"])
        except (KeyError, TypeError, ValueError, zlib.error) as error:
            raise ValueError(f"{file}: line {number} is not the record of a curve: {error!r}") from None
    return CellRecords(CurvesOnRecord(curves, failed), verdicts, inputs)


def _stored(config: ConfigDict) -> dict[str, Any]:
    """Returns a cell's config as JSON without the keys of `FREE`, and without its study and trials."""
    stored = json.loads(json.dumps(without_study(config).to_dict()))
    stored.pop("trials", None)
    for name in FREE:
        group, key = name.split(".")
        stored[group].pop(key, None)
    return stored


def _changed(stored: Mapping[str, Any], config: ConfigDict) -> list[str]:
    """Returns the differences that change curves; a method that is new or gone changes none."""
    new = _stored(config)
    shared = set(stored["methods"]) & set(new["methods"])
    of_both = [{**values, "methods": {name: values["methods"][name] for name in shared}} for values in (stored, new)]
    return changed_keys(*of_both)


def _inputs(folder: pathlib.Path) -> dict[str, str]:
    """Returns the digests of the base and of the data with which the run in a folder began."""
    ledger = folder / LEDGER
    return json.loads(ledger.read_text(encoding="utf-8")).get("inputs", {}) if ledger.is_file() else {}
