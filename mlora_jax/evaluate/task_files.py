"""Task files for lm-evaluation-harness: its own files, the same tasks on local data, and this package's tasks.

A local task is a generated file that includes the harness's file (or one from this package) and says where the data
are. Therefore wording, few-shot sampling, filters and metrics are those of the installed harness.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import importlib.util
import json
import pathlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

from mlora_jax.data.published import SCHEMAS, Row
from mlora_jax.disk import write_aside
from mlora_jax.evaluate.raw import OWN_TASKS, LocalTask, local_tasks, own_task
from mlora_jax.models.text_file import read_text

# Name of a task -> its file in the harness. The files of MMLU are found in their folder.
HARNESS_FILES = {
    "gsm8k": "gsm8k/gsm8k.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
}
# The names of the option of the harness that limits the number of tokens of an answer.
GENERATED = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
MMLU_FOLDER, MMLU = "mmlu/default", "mmlu"
DATA_DIGITS = 16


def harness_tasks_folder() -> pathlib.Path:
    """The folder in which the installed harness keeps its task files.

    Raises:
      ModuleNotFoundError: the harness is not installed.
    """
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("lm_eval is not installed: pip install 'lm-eval>=0.4.13'", name="lm_eval")
    return pathlib.Path(spec.origin).parent / "tasks"


def write_local_tasks(folder: str | pathlib.Path, tasks: Iterable[LocalTask]) -> pathlib.Path:
    """Writes data and task files. A file that already has the same content is not written again.

    Args:
      folder: the folder to write to, which is created if it does not exist; give it to the harness as `include_path`.
      tasks: complete tasks, from `local_tasks` or `own_task`.

    Returns:
      The folder.

    Raises:
      ValueError: MMLU lacks some of its subjects, so that its average would be another quantity.
    """
    folder = pathlib.Path(folder).absolute()
    for task in tasks:
        if task.name == MMLU:
            _write_mmlu(folder, task)
        else:
            here = pathlib.Path(__file__).parent / "tasks" / f"{task.name}.yaml"
            included = here if task.name in OWN_TASKS else harness_tasks_folder() / HARNESS_FILES[task.name]
            _write_task(folder, task.name, included, task.splits)
    return folder


def load_tasks(
    names: Sequence[str], *, raw_dir: str = "", cache_dir: str = "", unavailable: dict[str, str] | None = None
) -> dict[str, Any]:
    """Loads tasks and groups of the harness by their names, with their data.

    Args:
      names: the names of tasks, groups or tags. This package's tasks always use data that are written here; the
        harness's own tasks do so only with `raw_dir`.
      raw_dir: the folder of raw files, see `local_tasks`; if it is empty, the harness's own tasks are used unchanged.
        With it, no network is used.
      cache_dir: the folder for builds, converted data and the arrow files of local tasks. If it is empty, builds go to
        the user's cache folder and the rest to a temporary folder.
      unavailable: a dict that gets the name and the reason of every task that cannot be compared; with None, such a
        task is an error.

    Returns:
      The result of the harness's `TaskManager.load`: "tasks", "groups" and "group_map".

    Raises:
      ValueError: the local data of a task lack something and `unavailable` is None.
    """
    from lm_eval.tasks import TaskManager

    local, reasons = gather_local(names, raw_dir=raw_dir, cache_dir=cache_dir)
    if reasons and unavailable is None:
        raise ValueError("; ".join(reasons.values()))
    if unavailable is not None:
        unavailable.update(reasons)
    wanted = [name for name in names if name not in reasons]
    others = [name for name in wanted if name not in {task.name for task in local}]
    known = [_known_folder(name) for name in others]
    folders = [write_local_tasks(task_folder(local, cache_dir), local)] if local else []
    # Reading the thousands of files of the harness takes seconds, so it is only done for names that are not known here.
    paths: list[str | pathlib.Path] = [*dict.fromkeys(path for path in known if path), *folders]
    manager = TaskManager(include_path=paths or None, include_defaults=not all(known))
    with contextlib.nullcontext() if others else offline():
        return cast("dict[str, Any]", manager.load(wanted))


def check_names(names: Sequence[str]) -> None:
    """Checks that tasks can be found, and that the user's own task files can be read.

    Raises:
      ValueError: a name is no task, group or tag of the harness or of this package, or a file cannot be read.
    """
    others = [name for name in names if name not in OWN_TASKS and not _known_folder(name)]
    files = [name for name in others if pathlib.Path(name).expanduser().is_file()]
    for name in files:
        _read_task_file(pathlib.Path(name).expanduser())
    others = [name for name in others if name not in files]
    if not others:
        return  # reading the thousands of files of the harness takes seconds
    from lm_eval.tasks import TaskManager

    known = [*TaskManager().task_index, *OWN_TASKS]
    for name in others:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown task {name!r} of config.evaluation.tasks{hint}")


def _read_task_file(path: str | pathlib.Path) -> dict[str, Any]:
    """Reads the keys that a task file itself has; a value with one of the harness's own YAML tags becomes None.

    Raises:
      ValueError: the file is not valid YAML, or names no task or group.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("!", lambda loader, suffix, node: None)
    text = read_text(path)
    try:
        found = yaml.load(text, Loader=Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(found, dict) or not (found.get("task") or found.get("group")):
        raise ValueError(f"{path} is no task file of the harness: it names no task or group")
    return found


def generated_tokens(name: str, default: int) -> int | None:
    """The largest number of tokens of an answer to a task, as the task's own file states it.

    Args:
      name: the name of a task, or the path of a task file.
      default: the number for a task whose file states none.

    Returns:
      The number, or None if the task generates nothing or its file is not in `HARNESS_FILES`.

    Raises:
      ValueError: a task file cannot be read.
    """
    if name in HARNESS_FILES:
        path = harness_tasks_folder() / HARNESS_FILES[name]
    else:
        path = pathlib.Path(name).expanduser()
    if not path.is_file():
        return None
    task = _read_task_file(path)
    if task.get("output_type") != "generate_until":
        return None
    options = task.get("generation_kwargs") or {}
    return next((int(options[key]) for key in GENERATED if options.get(key)), default)


def gather_local(
    names: Sequence[str], *, raw_dir: str = "", cache_dir: str = ""
) -> tuple[list[LocalTask], dict[str, str]]:
    """The tasks among `names` that use data written here, and why others cannot: (tasks, {name: reason})."""
    if not raw_dir:
        return [own_task(name, cache_dir=cache_dir) for name in names if name in OWN_TASKS], {}
    found = local_tasks(raw_dir, [name for name in names if name in SCHEMAS or name in OWN_TASKS], cache_dir=cache_dir)
    for name in names:
        if name not in found:
            found[name] = f"{name}: no local form of this task is known; known: {', '.join((*SCHEMAS, *OWN_TASKS))}"
    mmlu = found.get(MMLU)
    if isinstance(mmlu, LocalTask) and (missing := _missing_subjects(mmlu)):
        found[MMLU] = f"{MMLU}: {missing}"
    tasks = [task for task in found.values() if isinstance(task, LocalTask)]
    return tasks, {name: reason for name, reason in found.items() if isinstance(reason, str)}


def task_folder(tasks: Sequence[LocalTask], cache_dir: str | pathlib.Path) -> pathlib.Path:
    """The folder for these task files. Its name depends on the tasks, so that two sets of tasks do not mix."""
    name = hashlib.sha256(" ".join(sorted(task.name for task in tasks)).encode()).hexdigest()[:DATA_DIGITS]
    root = pathlib.Path(cache_dir).expanduser() if cache_dir else pathlib.Path(_temporary_folder().name)
    return root / "lm_eval_tasks" / name


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Keeps the `datasets` library off the network, where it would otherwise report each load of a local file."""
    import datasets.config

    before = datasets.config.HF_HUB_OFFLINE, datasets.config.HF_DATASETS_OFFLINE
    datasets.config.HF_HUB_OFFLINE = datasets.config.HF_DATASETS_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, datasets.config.HF_DATASETS_OFFLINE = before


def _write_task(folder: pathlib.Path, name: str, included: pathlib.Path, splits: Mapping[str, Sequence[Row]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {
        "include": str(included),
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {split: str(_write_rows(folder / "data", rows)) for split, rows in splits.items()},
            "cache_dir": str(folder / "arrow"),
        },
    }
    # The harness's file may name a validation split besides the split that it scores; the data need not have it.
    if "validation" not in splits:
        config["validation_split"] = None
    _write_text(folder / f"{name}.yaml", json.dumps(config, indent=1))  # JSON is valid YAML


def _write_mmlu(folder: pathlib.Path, task: LocalTask) -> None:
    if missing := _missing_subjects(task):
        raise ValueError(missing)
    folder.mkdir(parents=True, exist_ok=True)
    for subject, file in _mmlu_files().items():
        rows = {split: [row for row in rows if row["subject"] == subject] for split, rows in task.splits.items()}
        _write_task(folder, file.stem, file, {split: rows for split, rows in rows.items() if rows})
    for file in sorted((harness_tasks_folder() / MMLU_FOLDER).glob("_mmlu*.yaml")):  # the groups of subjects
        _write_text(folder / file.name, json.dumps({"include": str(file)}))


def _mmlu_files() -> dict[str, pathlib.Path]:
    """Subject of MMLU -> its file in the harness."""
    files = sorted((harness_tasks_folder() / MMLU_FOLDER).glob("mmlu_*.yaml"))
    return {file.stem.removeprefix("mmlu_"): file for file in files}


def _missing_subjects(task: LocalTask) -> str:
    """The first split of MMLU that lacks subjects, with their names; empty if all subjects are there."""
    for split in (SCHEMAS[MMLU].evaluated, SCHEMAS[MMLU].shots):
        here = {row["subject"] for row in task.splits[split]}
        missing = [subject for subject in _mmlu_files() if subject not in here]
        if missing:
            return f"the split {split} lacks {len(missing)} subject(s): {', '.join(missing)}"
    return ""


def _known_folder(name: str) -> pathlib.Path | None:
    if name == MMLU or name.startswith("mmlu_"):
        return harness_tasks_folder() / MMLU_FOLDER
    return (harness_tasks_folder() / HARNESS_FILES[name]).parent if name in HARNESS_FILES else None


def _write_rows(folder: pathlib.Path, rows: Sequence[Row]) -> pathlib.Path:
    """Writes the rows to a file that is named by its content, one row per line."""
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:DATA_DIGITS]}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        _write_text(path, text)
    return path


def _write_text(path: pathlib.Path, text: str) -> None:
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return
    with write_aside(path) as file:
        file.write_text(text, encoding="utf-8")


@functools.cache
def _temporary_folder() -> tempfile.TemporaryDirectory:
    """A temporary folder for this process, which is removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="mlora_jax_tasks_", ignore_cleanup_errors=True)
