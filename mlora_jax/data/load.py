"""Loads the rows of a task for tokenisation. TFDS builds them once; a row gets its wording when it is read."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, overload

from mlora_jax.data.chat import render_chat, without_end
from mlora_jax.data.tasks import ChatStyle, Style, Task, find_task
from mlora_jax.disk import user_cache_folder
from mlora_jax.models.tokenizer import Tokenizer

COMPLETION = Style(prompt="{prompt}", answer="{completion}")


class Rows(Sequence[dict[str, Any]]):
    """A random-access view of some of the stored rows, which renders a row when it is read.

    A row is {"prompt": str, "answer": str, "choices": list of str, "label": int, "row": int}. If the answer is
    generated, `choices` is empty and `label` is -1. `row` counts from 0 in the stored split; in a file, it is the line
    number minus 1. A chat has further keys, such as "pieces" (see `render_chat`).

    Args:
      source: the stored rows of a split.
      indices: the numbers of the rows of this view.
      render: a function from a stored row and its number to a row.
    """

    def __init__(
        self,
        source: Sequence[Mapping[str, Any]],
        indices: Sequence[int],
        render: Callable[[Mapping[str, Any], int], dict[str, Any]],
    ) -> None:
        self._source = source
        self._indices = indices
        self._render = render

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> Rows: ...

    def __getitem__(self, index: int | slice) -> dict[str, Any] | Rows:
        if isinstance(index, slice):
            return Rows(self._source, self._indices[index], self._render)
        row = self._indices[index]
        return self._render(self.stored(index), row) | {"row": row}

    def stored(self, index: int) -> dict[str, Any]:
        """Returns a row as it is stored, without a wording."""
        return {key: _plain(value) for key, value in self._source[self._indices[index]].items()}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))


@dataclasses.dataclass(frozen=True)
class TaskData:
    """The rows of a task by their use.

    Attributes:
      train: the rows to train on.
      test: the rows to evaluate on.
      task: the row of `TASKS` that they come from.
      boundary: how the boundary between prompt and answer is tokenised, for `tokenize`.
      validation: further held-out rows; empty if the data set has none.
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
    """Loads the rows of a task. The first call builds them, and later calls read the build.

    A build is named by the digest of its raw files, so a changed file gets a new build.

    Args:
      name: a name in `TASKS`.
      raw_dir: the folder of the raw files, or a folder that holds a folder with the task's name; empty: the files are
        downloaded.
      cache_dir: the folder of builds and downloads; empty: `mlora_jax` in the user's cache folder.
      style: the wording, one of the task's `styles`; empty: the first of them.
      file: a JSONL file of own data; if it is given, the task is "jsonl" and `name` is ignored.
      evaluation_file: a JSONL file of the test rows of own data; empty: a part of `file` is held out.
      holdout: the fraction of the training rows that is held out as test rows if there are no others (own data without
        an evaluation file, and "platypus"). At least one row is held out. The rows with the smallest sha256 of "0:ROW"
        are chosen, so the choice is always the same, and it hardly changes when rows are added.
      ignored_keys: the keys of own rows and of their messages that are ignored; `own_rows` describes the other keys.
      tokenizer: the model's tokenizer; chats that its chat template writes need it.

    Raises:
      ValueError: the task or the style is unknown, a line is malformed or has a key that is not understood, or the
        holdout leaves no rows.
      FileNotFoundError: a file is missing; the message names the file and its folder.
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
    parts: dict[str, tuple[Sequence[Mapping[str, Any]], Sequence[int]]] = {
        split: (source, range(len(source))) for split, source in sources.items()
    }
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
    empty = Rows((), (), functools.partial(_render, style=chosen, tokenizer=tokenizer, file=file))
    return TaskData(
        train=views["train"],
        test=views["test"],
        task=task,
        boundary=chosen.boundary,
        validation=views.get("validation", empty),
        build=pathlib.Path(builder.data_dir),
    )


def hold_out(count: int, fraction: float, *, limit: int | None = None, name: str = "data.holdout") -> frozenset[int]:
    """Chooses the rows to hold out: those with the smallest sha256 of "0:ROW".

    Args:
      count: the number of rows.
      fraction: the fraction to hold out, between 0 and 1; at least one row is held out.
      limit: the largest number of rows to hold out; None: no limit.
      name: the name of the fraction in errors.

    Returns:
      The numbers of the rows that are held out.

    Raises:
      ValueError: the fraction is not between 0 and 1, or no row is left to train on.

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


def _prepare(builder_class: type[Any], config: Any, cache_dir: str) -> Any:
    import tensorflow_datasets as tfds  # slow to import, and not needed until a task is loaded

    root = (pathlib.Path(cache_dir).expanduser() if cache_dir else user_cache_folder()).absolute()
    make = functools.partial(builder_class, data_dir=root, config=config, file_format="array_record")
    builder = make()
    local = getattr(config, "files", True)
    if local:
        tfds.disable_progress_bar()  # this takes about a second; only downloads show their progress
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
