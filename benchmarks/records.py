"""The records of the speed benchmarks: JSON lines that say what was measured, on what, and with which versions."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "results"
PACKAGES = ("mlora_jax", "jax", "jaxlib", "flax", "torch", "transformers", "peft", "accelerate", "lm_eval", "numpy")
BUSY = 0.5  # a load of the last minute above this disturbs the figures
# The keys of every record; a benchmark adds its own.
KEYS = ("benchmark", "shape", "date", "revision", "hardware", "versions", "settings", "peers")


def origin() -> dict[str, Any]:
    """Returns the date in UTC, the revision, the hardware and the versions; take it before anything is measured.

    A line on standard error warns if other programs keep the processor busy.
    """
    found = hardware()
    if found["load"] > BUSY:
        print(
            f"other programs keep the processor busy (load {found['load']}): the figures mean little", file=sys.stderr
        )
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"date": now, "revision": revision(), "hardware": found, "versions": versions()}


def new_record(
    benchmark: str, shape: str, settings: Mapping[str, Any], peers: Mapping[str, Any], *, made: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns a record with the keys of `KEYS`.

    Args:
      benchmark: the name of the program: "training", "generation" or "gpu".
      shape: the name of what is measured.
      settings: the values that define the work, such as the batch size, the threads and the repeats.
      peers: name -> the measurements of `measurements`, or {"error": text}, or {"skipped": text}.
      made: the value that `origin` returned before the measurements.
    """
    given = {"benchmark": benchmark, "shape": shape, **made, "settings": dict(settings), "peers": dict(peers)}
    return {key: given[key] for key in KEYS}


def measurements(seconds: Sequence[float], work: float, *, unit: str, first: float) -> dict[str, Any]:
    """Returns the seconds of the repeats, and the work per second.

    Args:
      seconds: [repeats], the seconds of each repeat.
      work: the work of one repeat, in the unit.
      unit: the name of the work, in the plural, such as "tokens".
      first: the seconds of the pass before the repeats, in which programs are compiled.

    Returns:
      "seconds", "{unit}_per_second" with "median", "low" and "high" over the repeats, and "compile_seconds", the time
      that the first pass took beyond the median.

    >>> measurements([2.0, 1.0, 4.0], 8, unit="tokens", first=5.0)["tokens_per_second"]
    {'median': 4.0, 'low': 2.0, 'high': 8.0}
    """
    median = statistics.median(seconds)
    spread = {"median": work / median, "low": work / max(seconds), "high": work / min(seconds)}
    return {
        "seconds": [round(each, 4) for each in seconds],
        f"{unit}_per_second": {name: round(value, 3) for name, value in spread.items()},
        "compile_seconds": round(max(0.0, first - median), 3),
    }


def append(record: Mapping[str, Any], folder: pathlib.Path = RESULTS) -> pathlib.Path:
    """Appends a record to the file of its benchmark, and returns the file.

    Args:
      record: a record with the keys of `KEYS`.
      folder: the folder of the files; it is made if it does not exist.

    Raises:
      ValueError: the record lacks a key.
    """
    if missing := [key for key in KEYS if key not in record]:
        raise ValueError(f"the record lacks {', '.join(missing)}")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{record['benchmark']}.jsonl"
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(record) + "\n")
    return file


def read(benchmark: str, folder: pathlib.Path = RESULTS) -> list[dict[str, Any]]:
    """Returns the records of a benchmark in the order in which they were written; none if there is no file."""
    file = folder / f"{benchmark}.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []


def latest(records: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Returns shape -> its last record, in the order in which the shapes first appear."""
    return {record["shape"]: record for record in records}


def versions() -> dict[str, str]:
    """Returns package -> version, for those of `PACKAGES` that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"python": platform.python_version(), **found}


def revision() -> str:
    """Returns the abbreviated commit of the repository, with "+" if files differ from it; "" outside a repository."""
    git = ["git", "-C", str(ROOT)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return commit.stdout.strip() + "+" * bool(changed.stdout.strip())


def hardware() -> dict[str, Any]:
    """Returns the processor, its number of cores, the memory in GiB and the load of the last minute."""
    model = platform.processor() or platform.machine()
    information, memory = pathlib.Path("/proc/cpuinfo"), pathlib.Path("/proc/meminfo")
    if information.is_file() and (found := re.search(r"model name\s*: (.*)", information.read_text())):
        model = found[1]
    gib = re.search(r"MemTotal:\s*(\d+)", memory.read_text()) if memory.is_file() else None
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gib": round(int(gib[1]) / 2**20, 1) if gib else None,
        "load": round(os.getloadavg()[0], 2),
    }


def without_paths(text: str) -> str:
    """Returns the first line of a message in which every absolute path is cut to its last part.

    >>> without_paths("no file /home/someone/model/config.json")
    'no file config.json'
    """
    line = text.strip().splitlines()[0] if text.strip() else ""
    return re.sub(r"(?<![\w.])(?:/[\w.@+-]+)+/([\w.@+-]*)", r"\1", line)[:300]
