"""Reads published data sets from the file forms that are in use, as rows of the published schema of each data set.

The harness's tasks on local files and the builders of this package read the same files, and both use this module.
"""

from __future__ import annotations

import bz2
import csv
import dataclasses
import io
import json
import lzma
import pathlib
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import IO, Any, cast

from mlora_jax.models.text_file import MalformedLineError, decode_text, text_lines

Row = dict[str, Any]

ENDINGS = ("jsonl", "json", "parquet")
INSTRUCTION = re.compile(
    r"Please choose the correct answer to the question: (?P<question>.*?)\s+(?P<answers>Answer1: .*?)"
    r"\s+Answer format: (?P<format>answer1(?:/answer\d+)*)\s*",
    re.DOTALL,
)
HELLASWAG_LINES = 6  # context, label, four endings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schema:
    """The published schema of a data set and its splits.

    Attributes:
      fields: the fields that every row has.
      evaluated: the split that is scored.
      shots: the split that few-shot examples are drawn from.
      training: the split to train on.
      validation: a further split with labels; empty: there is none.
      convert: a function from a row in any form and its number to a row in the published schema. It returns a row that
        is in the schema unchanged.
      others: split -> (file, reader), for splits that also come in a form other than JSON and Parquet.
    """

    fields: tuple[str, ...]
    evaluated: str
    shots: str
    training: str = "train"
    validation: str = ""
    convert: Callable[[Row, int], Row] = lambda row, number: row
    others: Mapping[str, tuple[str, Callable[[pathlib.Path], list[Row]]]] = dataclasses.field(default_factory=dict)


def find_split(folder: pathlib.Path, split: str, schema: Schema | None = None) -> pathlib.Path | None:
    """Finds the file of a split: SPLIT.jsonl, SPLIT.json, SPLIT.parquet, or a further form of the schema.

    Args:
      folder: the folder of the data set.
      split: the name of the split.
      schema: the schema with further forms, if any.

    Returns:
      The path of the first of these files that exists, or None.
    """
    files = [f"{split}.{ending}" for ending in ENDINGS]
    if schema and split in schema.others:
        files.append(schema.others[split][0])
    return next((folder / name for name in files if (folder / name).is_file()), None)


def read_split(path: pathlib.Path, split: str, schema: Schema) -> list[Row]:
    """Reads the rows of a file that `find_split` has found, in the published schema.

    Args:
      path: the path of the file.
      split: the name of the split.
      schema: the schema of the data set.

    Raises:
      ValueError: the file or a row cannot be read; the message names both.
    """
    file, reader = schema.others.get(split, ("", None))
    if reader and path.name == file:
        return reader(path)
    return list(converted(json_rows(path), schema.convert, path))


def converted(rows: Iterable[Row], convert: Callable[[Row, int], Row], path: str | pathlib.Path) -> Iterator[Row]:
    """Yields `convert(row, number)` for each row.

    Args:
      rows: the rows.
      convert: a function from a row and its number to a row.
      path: the name of the file in errors.

    Raises:
      ValueError: `convert` raised it; the message names the file and the row.
    """
    for number, row in enumerate(rows):
        try:
            yield convert(row, number)
        except ValueError as error:
            raise ValueError(f"{path}, row {number}: {error}") from None


def json_rows(path: pathlib.Path) -> Iterator[Row]:
    """Yields the rows of a Parquet file, a JSON list or a file of JSON lines.

    Raises:
      ValueError: the file is none of these; the message names the file and the row.
    """
    content = path.read_bytes()
    if content.startswith(b"PAR1"):
        yield from _parquet_rows(path, content)
        return
    yield from rows_of_text(path, content)


def rows_of_text(path: str | pathlib.Path, content: bytes) -> Iterator[Row]:
    """Yields the rows of a JSON list or of JSON lines.

    Args:
      path: the name of the file in errors.
      content: the bytes of the file.

    Raises:
      ValueError: the content is neither; the message names the file and the row.
    """
    text = decode_text(content, path)
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from None
        numbered = enumerate(rows)
    else:
        numbered = _parsed_lines(path, content)
    for number, row in numbered:
        if not isinstance(row, dict):
            raise ValueError(f"{path}, row {number}: expected a JSON object, got {type(row).__name__}")
        yield row


def _parquet_rows(path: pathlib.Path, content: bytes) -> list[Row]:
    import pyarrow  # slow to import
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is not a sound Parquet file: {error}") from None


def _parsed_lines(path: str | pathlib.Path, content: bytes) -> Iterator[tuple[int, Any]]:
    lines = ((number, line) for number, line in text_lines(io.BytesIO(content), path) if line.strip())
    for row, (number, line) in enumerate(lines):
        try:
            yield row, json.loads(line)
        except ValueError as error:
            raise MalformedLineError(path, number, f"not valid JSON: {error}") from None


def archive_rows(path: pathlib.Path, member: str) -> Iterator[Row]:
    """Yields the rows of a member of a zip or tar archive.

    Args:
      path: the path of the archive.
      member: the name of a file of JSON lines, or of a folder of MMLU's CSV files, which ends in a slash.

    Raises:
      ValueError: the file is not an archive, or the archive does not have the member.
    """
    found = False
    for name, content in _members(path, member):
        found = True
        label = f"{path}, {name}"
        yield from mmlu_rows(label, name, content) if name.endswith(".csv") else rows_of_text(label, content)
    if not found:
        raise ValueError(f"{path} has no {member} in it")


def _members(path: pathlib.Path, member: str) -> Iterator[tuple[str, bytes]]:
    """Yields the name and bytes of an archive's file `member` or, if `member` ends in a slash, of all files in it.

    The files are ordered by name.

    Raises:
      ValueError: the file is not an archive, or it is damaged.
    """
    chosen = lambda name: name.startswith(member) if member.endswith("/") else name == member  # noqa: E731
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for name in sorted(filter(chosen, archive.namelist())):
                    if not name.endswith("/"):
                        yield name, archive.read(name)
            return
        with tarfile.open(path) as archive:
            files = {entry.name: entry for entry in archive.getmembers() if entry.isfile() and chosen(entry.name)}
            for name in sorted(files):
                yield name, cast(IO[bytes], archive.extractfile(files[name])).read()  # None only for other entries
    except (tarfile.ReadError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{path} is neither a zip nor a tar archive that can be read: {error}") from None


def mmlu_rows(label: str, name: str, content: bytes) -> Iterator[Row]:
    """Yields the rows of one of MMLU's CSV files. A line has a question, four choices and a letter.

    Args:
      label: the name of the file in errors.
      name: the name of the file, which holds the subject.
      content: the bytes of the file.

    Raises:
      ValueError: a line has another form; the message has its number.
    """
    subject = re.sub(r"_(?:dev|val|test)$", "", pathlib.PurePosixPath(name).stem)
    for number, line in enumerate(csv.reader(io.StringIO(decode_text(content, label), newline=""))):
        if len(line) != 6 or line[5] not in ("A", "B", "C", "D"):
            raise ValueError(f"{label}, row {number}: expected question, four choices and a letter A..D, got {line!r}")
        yield {"question": line[0], "subject": subject, "choices": line[1:5], "answer": "ABCD".index(line[5])}


def arc_row(row: Row, number: int) -> Row:
    """Converts a row of ARC from its instruction form or from the form of the archive ARC-V1 to the published schema.

    The instruction form has neither labels nor an id, so the choices are labelled A, B, ... and the id is the number of
    the row.

    Args:
      row: a row in one of these forms, or in the published schema already.
      number: the number of the row.

    Raises:
      ValueError: the instruction does not have the known form, or the answer is none of its choices.

    >>> arc_row({"instruction": "Please choose the correct answer to the question: Is ice cold?\\n\\n"
    ...          "Answer1: yes Answer2: no\\n\\nAnswer format: answer1/answer2", "answer": "answer1"}, 7)
    {'id': '7', 'question': 'Is ice cold?', 'choices': {'text': ['yes', 'no'], 'label': ['A', 'B']}, 'answerKey': 'A'}
    """
    if isinstance(row.get("question"), dict):
        return _arc_archive_row(row)
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


def _arc_archive_row(row: Row) -> Row:
    question = row["question"]
    try:
        choices = {name: [choice[name] for choice in question["choices"]] for name in ("text", "label")}
        return {"id": row["id"], "question": question["stem"], "choices": choices, "answerKey": row["answerKey"]}
    except (KeyError, TypeError) as error:
        raise ValueError(f"not the form of the archive ARC-V1: {error!r}") from None


def hellaswag_rows(path: pathlib.Path) -> list[Row]:
    """Reads HellaSwag from a file with six lines per item: "ACTIVITY: CONTEXT", the label, and four endings.

    The fields ctx_a and ctx_b are missing, because this form does not say where ctx_a ends.

    Raises:
      ValueError: some lines are not an item; the message has the number of the first of them.
    """
    try:
        with bz2.open(path, "rb") as file:
            lines = [line for _, line in text_lines(file, path)]
    except (OSError, EOFError) as error:
        raise ValueError(f"{path} is not a sound bzip2 file: {error}") from None
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


_ARC = Schema(
    fields=("question", "choices", "answerKey"),
    evaluated="test",
    shots="train",
    validation="validation",
    convert=arc_row,
)
SCHEMAS: dict[str, Schema] = {
    "gsm8k": Schema(fields=("question", "answer"), evaluated="test", shots="train"),
    "arc_challenge": _ARC,
    "arc_easy": _ARC,
    "hellaswag": Schema(
        fields=("ctx_a", "ctx_b", "activity_label", "endings", "label"),
        evaluated="validation",
        shots="train",
        others={"validation": ("hellaswag_val_full.txt.bz2", hellaswag_rows)},
    ),
    "mmlu": Schema(
        fields=("question", "subject", "choices", "answer"),
        evaluated="test",
        shots="dev",
        training="auxiliary_train",
        validation="validation",
    ),
    "winogrande": Schema(fields=("sentence", "option1", "option2", "answer"), evaluated="validation", shots="train"),
}
