"""A task's rows, ready to be tokenised: built once by TFDS, read at random, worded when they are read."""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mlora_jax.data.chat import render_chat, without_end
from mlora_jax.data.tasks import ChatStyle, Style, Task, find_task
from mlora_jax.models.tokenizer import Tokenizer

COMPLETION = Style(prompt="{prompt}", answer="{completion}")


class Rows(Sequence):
    """A random-access view of stored rows: a choice of them, each rendered when it is read.

    A row is {"prompt": str, "answer": str, "choices": list of str, "label": int, "row": int}; `choices` is
    empty and `label` -1 where the answer is generated; `row` counts from 0 in the stored split (in a file:
    line - 1). A chat has further keys, "pieces" among them (see `render_chat`).
    """

    def __init__(self, source: Sequence, indices: Sequence[int], render: Callable[[Mapping, int], dict]):
        self._source = source
        self._indices = indices
        self._render = render

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return Rows(self._source, self._indices[index], self._render)
        row = self._indices[index]
        return self._render(self.stored(index), row) | {"row": row}

    def stored(self, index: int) -> dict[str, Any]:
        """A row as it is stored, before any wording."""
        return {key: _plain(value) for key, value in self._source[self._indices[index]].items()}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))


@dataclasses.dataclass(frozen=True)
class TaskData:
    """A task's rows by use.

    Attributes:
        train, test: rows to train on and to evaluate on.
        task: the row of `TASKS` they came from.
        boundary: how the border between prompt and answer is tokenised, for `tokenize`.
        validation: further held-out rows, where the data set has them (may be empty).
        build: the folder of the build that was read.
    """

    train: Rows
    test: Rows
    task: Task
    boundary: str
    validation: Rows
    build: pathlib.Path


def load_task(
    name: str,
    *,
    raw_dir: str = "",
    cache_dir: str = "",
    style: str = "",
    file: str = "",
    evaluation_file: str = "",
    holdout: float = 0.1,
    ignored_keys: Sequence[str] = (),
    tokenizer: Tokenizer | None = None,
) -> TaskData:
    """A task's rows; the first call builds them, later ones read the build.

    A build is named by the digest of its raw files, so a changed file is another build.

    Args:
        name: a name in `TASKS`.
        raw_dir: folder of the raw files (itself, or a folder of the task's name in it); empty: download them.
        cache_dir: where builds and downloads go; empty: `mlora_jax` in the user's cache folder.
        style: the wording, one of the task's `styles`; empty: its first.
        file: own data, a JSONL file; with it the task is "jsonl", whatever `name` says.
        evaluation_file: the own data's test rows; empty: a part of `file` is held out.
        holdout: the fraction of the training rows held out as test rows where there are no others (own data without
            an evaluation file, "platypus"): those with the smallest sha256 of "0:ROW", at least one, so the same rows
            always and, nearly, when rows are added.
        ignored_keys: keys of own rows and of their messages that are not looked at; `own_rows` says what the others do.
        tokenizer: the model's; needed for chats written by its chat template.

    Raises:
        ValueError: an unknown task or style, a malformed line or one with a key that is not understood, or a holdout
            that leaves no rows.
        FileNotFoundError: names the missing file and its folder.
    """
    if file or evaluation_file:
        name = "jsonl"
    task = find_task(name)
    chosen = task.style(style)
    config = task.builder.config_for(
        raw_dir=raw_dir, file=file, evaluation_file=evaluation_file, ignored_keys=tuple(ignored_keys)
    )
    builder = _prepare(task.builder, config, cache_dir)
    sources = builder.as_data_source()
    parts = {split: (source, range(len(source))) for split, source in sources.items()}
    if "test" not in parts:
        source, rows = parts["train"]
        held = hold_out(len(rows), holdout)
        parts["train"] = source, [row for row in rows if row not in held]
        parts["test"] = source, sorted(held)
    paths = {"test": evaluation_file} if evaluation_file else {}
    views = {
        split: Rows(
            source,
            rows,
            functools.partial(_render, style=chosen, tokenizer=tokenizer, file=paths.get(split, file)),
        )
        for split, (source, rows) in parts.items()
    }
    empty = Rows((), (), _render)
    return TaskData(
        train=views["train"],
        test=views["test"],
        task=task,
        boundary=chosen.boundary,
        validation=views.get("validation", empty),
        build=pathlib.Path(builder.data_dir),
    )


def hold_out(count: int, fraction: float, *, limit: int | None = None, name: str = "data.holdout") -> frozenset[int]:
    """The rows held out of `count`: those with the smallest sha256 of "0:ROW", one at least and at most `limit`.

    Raises:
        ValueError: a fraction outside 0..1, or nothing left to train on.

    Example:
        >>> sorted(hold_out(10, 0.2))
        [4, 7]
    """
    if not 0.0 < fraction < 1.0:
        raise ValueError(
            f"{name} must be above 0 and below 1, got {fraction}; to train on every row of own data, set "
            "data.evaluation_file"
        )
    held = min(max(1, round(count * fraction)), limit or count)
    if held >= count:
        raise ValueError(
            f"{name}={fraction} of {count} row(s) leaves none to train on: add rows, or set data.evaluation_file"
        )
    by_hash = sorted(range(count), key=lambda row: hashlib.sha256(f"0:{row}".encode()).digest())
    return frozenset(by_hash[:held])


def _render(
    stored: Mapping[str, Any],
    row: int,
    *,
    style: Style | ChatStyle,
    tokenizer: Tokenizer | None,
    file: str,
) -> dict[str, Any]:
    if isinstance(style, Style):
        return style.render(stored)
    if not stored["chat"]:
        return COMPLETION.render({**stored, "completion": without_end(stored["completion"], tokenizer)})
    chat = json.loads(stored["chat"])
    return render_chat(chat.pop("messages"), style, tokenizer, f"{file}, line {row + 1}", **chat)


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if hasattr(value, "__len__") and not isinstance(value, str):
        return [_plain(element) for element in value]
    return value


def _cache_folder() -> pathlib.Path:
    root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(root) / "mlora_jax"


def _prepare(builder_class: type, config: Any, cache_dir: str) -> Any:
    import tensorflow_datasets as tfds  # slow to import, and not needed until a task is loaded

    root = (pathlib.Path(cache_dir).expanduser() if cache_dir else _cache_folder()).absolute()
    make = functools.partial(builder_class, data_dir=root, config=config, file_format="array_record")
    builder = make()
    local = getattr(config, "files", True)
    if local:
        tfds.disable_progress_bar()  # a second's work; downloads show theirs
    try:
        builder.download_and_prepare(download_dir=root / "downloads")
    except OSError:
        builder = make()  # another process may have finished the same build first
        if not builder.is_prepared():
            raise
    finally:
        if local:
            tfds.enable_progress_bar()
    if not builder.is_prepared():
        raise RuntimeError(f"the build {builder.data_dir} is damaged: delete that folder and run again")
    return builder
