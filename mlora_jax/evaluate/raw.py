"""Data sets of the harness's tasks from local files: which are there, what each lacks, its rows as published.

A file in the published schema is taken as it is; other forms are converted. What the harness needs and a file does not
hold is a reason not to compare: nothing is made up.
"""

from __future__ import annotations

import bz2
import dataclasses
import json
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mlora_jax.data.load import load_task

Row = dict[str, Any]

INSTRUCTION = re.compile(
    r"Please choose the correct answer to the question: (?P<question>.*?)\s+(?P<answers>Answer1: .*?)"
    r"\s+Answer format: (?P<format>answer1(?:/answer\d+)*)\s*",
    re.DOTALL,
)
HELLASWAG_LINES = 6  # context, label, four endings


@dataclasses.dataclass(frozen=True)
class LocalTask:
    """A task that local files hold whole.

    Attributes:
      name: the harness's.
      splits: split -> rows in the published schema.
    """

    name: str
    splits: Mapping[str, Sequence[Row]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schema:
    """What the harness needs of a data set.

    Attributes:
      fields: of every row.
      evaluated: the split that is scored.
      shots: the split that few-shot examples are drawn from.
      convert: row in another form -> row in the published schema; a published one is returned as it is.
      others: split -> (file, reader) of further forms.
    """

    fields: tuple[str, ...]
    evaluated: str
    shots: str
    convert: Callable[[Row, int], Row] = lambda row, number: row
    others: Mapping[str, tuple[str, Callable[[pathlib.Path], list[Row]]]] = dataclasses.field(default_factory=dict)


def local_tasks(raw_dir, names: Sequence[str] | None = None, *, cache_dir: str = "") -> dict[str, LocalTask | str]:
    """The tasks of a folder of raw files, and why each of the others cannot be compared.

    Args:
      raw_dir: has a folder for every task, of its name (or is that folder), with one file `{split}.json` (a list of
        rows) or `{split}.jsonl` a split; trec and sst2 are in the forms that their builders read.
      names: which tasks; None: all of `SCHEMAS` and `OWN_TASKS`.
      cache_dir: where builds of our own tasks go, see `load_task`.

    Returns:
      name -> `LocalTask`, or the reason (str) why there is none.

    Raises:
      ValueError: an unknown name, or a file that cannot be read; the message names it.
    """
    names = (*SCHEMAS, *OWN_TASKS) if names is None else names
    for name in names:
        if name not in SCHEMAS and name not in OWN_TASKS:
            raise ValueError(f"no local form is known of the task {name!r}; known: {', '.join((*SCHEMAS, *OWN_TASKS))}")
    return {name: _find(pathlib.Path(raw_dir).expanduser(), name, cache_dir) for name in names}


def own_task(name: str, *, raw_dir: str = "", cache_dir: str = "") -> LocalTask:
    """trec, sst2 or the quickstart's task by its builder; without `raw_dir` what is published is downloaded."""
    data = load_task(name, raw_dir=raw_dir, cache_dir=cache_dir)
    splits = {"train": data.train, "validation": data.validation, "test": data.test}
    return LocalTask(name, {split: [*map(rows.stored, range(len(rows)))] for split, rows in splits.items() if rows})


def arc_row(row: Row, number: int) -> Row:
    """A row of ARC in the published schema from its instruction form.

    The choices are labelled A, B, ... and the id is the row's number: the instruction form keeps neither.

    Raises:
      ValueError: another instruction than this form's, or an answer that is none of its choices.

    >>> arc_row({"instruction": "Please choose the correct answer to the question: Is ice cold?\\n\\n"
    ...          "Answer1: yes Answer2: no\\n\\nAnswer format: answer1/answer2", "answer": "answer1"}, 7)
    {'id': '7', 'question': 'Is ice cold?', 'choices': {'text': ['yes', 'no'], 'label': ['A', 'B']}, 'answerKey': 'A'}
    """
    if "instruction" not in row:
        return row
    found = INSTRUCTION.fullmatch(row["instruction"])
    if not found:
        raise ValueError(f"not the instruction form of ARC: {row['instruction'][:60]!r}")
    allowed = found["format"].split("/")
    rest, texts = found["answers"], []
    for count in range(1, len(allowed) + 1):
        head = f"Answer{count}: "
        before, found_head, rest = rest.partition(head if count == 1 else f" {head}")
        if not found_head:
            raise ValueError(f"no {head!r} in {row['instruction'][:60]!r}")
        texts.append(before)
    texts = [*texts[1:], rest]
    if row.get("answer") not in allowed:
        raise ValueError(f"the answer {row.get('answer')!r} is none of {', '.join(allowed)}")
    labels = [chr(ord("A") + index) for index in range(len(allowed))]
    return {
        "id": str(number),
        "question": found["question"],
        "choices": {"text": texts, "label": labels},
        "answerKey": labels[allowed.index(row["answer"])],
    }


def hellaswag_rows(path: pathlib.Path) -> list[Row]:
    """HellaSwag from six lines an item: "ACTIVITY: CONTEXT", the label, four endings.

    The fields ctx_a and ctx_b are missing: this form keeps no trace of where one ends.

    Raises:
      ValueError: lines that are no item; the message has the first one's number.
    """
    with bz2.open(path, "rt", encoding="utf-8") as file:
        lines = [line.rstrip("\n") for line in file]
    rows = []
    for start in range(0, len(lines), HELLASWAG_LINES):
        context, *rest = lines[start : start + HELLASWAG_LINES]
        activity, colon, text = context.partition(": ")
        if len(rest) != HELLASWAG_LINES - 1 or not colon or rest[0].strip() not in ("0", "1", "2", "3"):
            raise ValueError(f"{path}, line {start + 1}: expected 'ACTIVITY: CONTEXT', a label 0..3 and four endings")
        rows.append(
            {"ind": len(rows), "activity_label": activity, "ctx": text, "endings": rest[1:], "label": rest[0].strip()}
        )
    return rows


# The harness's own tasks; trec, sst2 and the quickstart's are in the project's table of tasks.
SCHEMAS: dict[str, Schema] = {
    "gsm8k": Schema(fields=("question", "answer"), evaluated="test", shots="train"),
    "arc_challenge": Schema(
        fields=("question", "choices", "answerKey"), evaluated="test", shots="train", convert=arc_row
    ),
    "arc_easy": Schema(fields=("question", "choices", "answerKey"), evaluated="test", shots="train", convert=arc_row),
    "hellaswag": Schema(
        fields=("ctx_a", "ctx_b", "activity_label", "endings", "label"),
        evaluated="validation",
        shots="train",
        others={"validation": ("hellaswag_val_full.txt.bz2", hellaswag_rows)},
    ),
    "mmlu": Schema(fields=("question", "subject", "choices", "answer"), evaluated="test", shots="dev"),
    "winogrande": Schema(fields=("sentence", "option1", "option2", "answer"), evaluated="validation", shots="train"),
}
OWN_TASKS = ("trec", "sst2", "quickstart")


def _find(raw_dir: pathlib.Path, name: str, cache_dir: str) -> LocalTask | str:
    if name in OWN_TASKS:
        try:
            return own_task(name, raw_dir=str(raw_dir), cache_dir=cache_dir)
        except FileNotFoundError as error:
            return str(error)
    folder = raw_dir / name
    if not folder.is_dir() and raw_dir.name == name:
        folder = raw_dir
    if not folder.is_dir():
        return f"{name}: no folder {name} in {raw_dir}"
    schema = SCHEMAS[name]
    splits, reasons = {}, []
    for split in dict.fromkeys((schema.evaluated, schema.shots, "validation")):
        rows = _read(folder, split, schema)
        if rows is not None:
            splits[split] = rows
    for split, use in ((schema.evaluated, "which is scored"), (schema.shots, "which few-shot examples come from")):
        if not splits.get(split):
            reasons.append(f"no split {split}, {use}")
    for split, rows in splits.items():
        missing = [field for field in schema.fields if any(field not in row for row in rows)]
        if missing:
            reasons.append(f"the split {split} lacks the field{'s' * (len(missing) > 1)} {', '.join(missing)}")
    return f"{name}: {'; '.join(reasons)} (in {folder})" if reasons else LocalTask(name, splits)


def _read(folder: pathlib.Path, split: str, schema: Schema) -> list[Row] | None:
    for ending in ("jsonl", "json"):
        path = folder / f"{split}.{ending}"
        if path.is_file():
            rows = []
            for number, row in enumerate(_json_rows(path)):
                try:
                    rows.append(schema.convert(row, number))
                except ValueError as error:
                    raise ValueError(f"{path}, row {number}: {error}") from None
            return rows
    file, reader = schema.others.get(split, ("", None))
    return reader(folder / file) if reader and (folder / file).is_file() else None


def _json_rows(path: pathlib.Path) -> Iterator[Row]:
    """The rows of a JSON list, or one of each line."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json" and text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from None
        numbered = enumerate(rows)
    else:
        numbered = _parsed_lines(path, text)
    for number, row in numbered:
        if not isinstance(row, dict):
            raise ValueError(f"{path}, row {number}: expected a JSON object, got {type(row).__name__}")
        yield row


def _parsed_lines(path: pathlib.Path, text: str) -> Iterator[tuple[int, Any]]:
    lines = (line for line in text.split("\n") if line.strip())
    for number, line in enumerate(lines):
        try:
            yield number, json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, row {number} is not valid JSON: {error}") from None
