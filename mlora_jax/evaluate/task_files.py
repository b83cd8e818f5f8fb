"""Task files for lm-evaluation-harness: its own as they are, or the same on local data, and ours.

A local task is a generated file that includes the harness's (or our packaged) one and says where the data lie. So
wording, few-shot sampling, filters and metrics are those of the installed harness.
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
from typing import Any

from mlora_jax.data.published import SCHEMAS, Row
from mlora_jax.disk import write_aside
from mlora_jax.evaluate.raw import OWN_TASKS, LocalTask, local_tasks, own_task
from mlora_jax.models.text_file import read_text

# Our task -> the harness's file; those of MMLU are found in its folder.
HARNESS_FILES = {
    "gsm8k": "gsm8k/gsm8k.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
}
# The names under which the harness takes the most tokens of an answer.
GENERATED = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
MMLU_FOLDER, MMLU = "mmlu/default", "mmlu"
DATA_DIGITS = 16


def harness_tasks_folder() -> pathlib.Path:
    """Where the installed harness keeps its task files."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("lm_eval is not installed: pip install 'lm-eval>=0.4.13'", name="lm_eval")
    return pathlib.Path(spec.origin).parent / "tasks"


def write_local_tasks(folder, tasks: Iterable[LocalTask]) -> pathlib.Path:
    """Writes data and task files; what is there already with the same content is left.

    Args:
      folder: made if it is not there; give it to the harness as `include_path`.
      tasks: whole, from `local_tasks` or `own_task`.

    Returns:
      The folder.

    Raises:
      ValueError: MMLU without some of its subjects, whose average would be another quantity.
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
    """Tasks and groups of the harness by their names, with their data.

    Args:
      names: of tasks, groups or tags. Ours are always on data written here, the harness's own only with `raw_dir`.
      raw_dir: folder of raw files, see `local_tasks`; empty: the harness's own tasks are used untouched. With it
        nothing is asked of a network.
      cache_dir: where builds, converted data and the arrow files of local tasks go; empty: builds in the user's cache
        folder, the rest in a temporary one.
      unavailable: takes the names that cannot be compared and the reasons; None: such a name is an error.

    Returns:
      What the harness's `TaskManager.load` gives: "tasks", "groups" and "group_map".

    Raises:
      ValueError: a task whose local data lack something, if `unavailable` is None.
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
    # Reading the harness's thousands of files takes seconds, so that it is done for names that we do not know only.
    paths = [*dict.fromkeys(path for path in known if path), *folders]
    manager = TaskManager(include_path=paths or None, include_defaults=not all(known))
    with contextlib.nullcontext() if others else offline():
        return manager.load(wanted)


def check_names(names: Sequence[str]) -> None:
    """Checks that tasks can be found, and that task files of a user's own can be read.

    Raises:
      ValueError: a name that is no task, group or tag of the harness and none of ours, or a file that cannot be read.
    """
    others = [name for name in names if name not in OWN_TASKS and not _known_folder(name)]
    files = [name for name in others if pathlib.Path(name).expanduser().is_file()]
    for name in files:
        _read_task_file(pathlib.Path(name).expanduser())
    others = [name for name in others if name not in files]
    if not others:
        return  # reading the harness's thousands of files takes seconds
    from lm_eval.tasks import TaskManager

    known = [*TaskManager().task_index, *OWN_TASKS]
    for name in others:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown task {name!r} of config.evaluation.tasks{hint}")


def _read_task_file(path: str | pathlib.Path) -> dict[str, Any]:
    """The keys of a task file as they stand in it; what the harness's own tags stand for is None.

    Raises:
      ValueError: it is not YAML, or no task's.
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
    """The most tokens of an answer to a task, where that is in its own file and the file is known by the task's name.

    Args:
      name: of a task, or the path of a task file.
      default: the number of a task that does not say.

    Returns:
      None for a task that generates nothing, or whose file is among the harness's thousands.

    Raises:
      ValueError: a task file that cannot be read.
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
    """The tasks among `names` that are run on data written here, and why others are not: (tasks, {name: reason})."""
    if not raw_dir:
        return [own_task(name, cache_dir=cache_dir) for name in names if name in OWN_TASKS], {}
    found = local_tasks(raw_dir, [name for name in names if name in SCHEMAS or name in OWN_TASKS], cache_dir=cache_dir)
    for name in names:
        if name not in found:
            found[name] = f"{name}: no local form of this task is known; known: {', '.join((*SCHEMAS, *OWN_TASKS))}"
    if isinstance(found.get(MMLU), LocalTask) and (missing := _missing_subjects(found[MMLU])):
        found[MMLU] = f"{MMLU}: {missing}"
    tasks = [task for task in found.values() if isinstance(task, LocalTask)]
    return tasks, {name: reason for name, reason in found.items() if isinstance(reason, str)}


def task_folder(tasks: Sequence[LocalTask], cache_dir) -> pathlib.Path:
    """The folder for these task files: named by the tasks, so that two sets do not see each other's."""
    name = hashlib.sha256(" ".join(sorted(task.name for task in tasks)).encode()).hexdigest()[:DATA_DIGITS]
    root = pathlib.Path(cache_dir).expanduser() if cache_dir else pathlib.Path(_temporary_folder().name)
    return root / "lm_eval_tasks" / name


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Keeps the `datasets` library off the network: it counts each load of a local file there, too."""
    import datasets

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
    # Where the harness's file has a validation split besides the one that it scores, it may be absent.
    if "validation" not in splits:
        config["validation_split"] = None
    _write_text(folder / f"{name}.yaml", json.dumps(config, indent=1))  # JSON is YAML


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
    """subject -> the harness's file."""
    files = sorted((harness_tasks_folder() / MMLU_FOLDER).glob("mmlu_*.yaml"))
    return {file.stem.removeprefix("mmlu_"): file for file in files}


def _missing_subjects(task: LocalTask) -> str:
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
    """A file of the rows, one a line, named by its content."""
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
    """One for this process, removed when it ends."""
    return tempfile.TemporaryDirectory(prefix="mlora_jax_tasks_", ignore_cleanup_errors=True)
