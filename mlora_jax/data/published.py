"""Other people's data sets in the forms in which they lie around, as rows of one published schema each.

The harness's tasks on local files and our own builders read the same files: what is known of their forms stands here.
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
from collections.abc import Callable, Iterator, Mapping
from typing import Any

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
    """What is needed of a data set.

    Attributes:
      fields: of every row.
      evaluated: the split that is scored.
      shots: the split that few-shot examples are drawn from.
      training: the split to train on.
      validation: a further labelled split; empty: none.
      convert: row in another form -> row in the published schema; a published one is returned as it is.
      others: split -> (file, reader) of further forms.
    """

    fields: tuple[str, ...]
    evaluated: str
    shots: str
    training: str = "train"
    validation: str = ""
    convert: Callable[[Row, int], Row] = lambda row, number: row
    others: Mapping[str, tuple[str, Callable[[pathlib.Path], list[Row]]]] = dataclasses.field(default_factory=dict)


def find_split(folder: pathlib.Path, split: str, schema: Schema | None = None) -> pathlib.Path | None:
    """The file of a split: SPLIT.jsonl, SPLIT.json, SPLIT.parquet, or one of the schema's further forms; else None."""
    files = [f"{split}.{ending}" for ending in ENDINGS]
    if schema and split in schema.others:
        files.append(schema.others[split][0])
    return next((folder / name for name in files if (folder / name).is_file()), None)


def read_split(path: pathlib.Path, split: str, schema: Schema) -> list[Row]:
    """The rows of a file that `find_split` has found, in the published schema.

    Raises:
      ValueError: a file or a row that cannot be read; the message names both.
    """
    file, reader = schema.others.get(split, ("", None))
    if reader and path.name == file:
        return reader(path)
    return list(converted(json_rows(path), schema.convert, path))


def converted(rows, convert: Callable[[Row, int], Row], path) -> Iterator[Row]:
    """Rows as `convert(row, number)` makes them; its ValueError is given file and row."""
    for number, row in enumerate(rows):
        try:
            yield convert(row, number)
        except ValueError as error:
            raise ValueError(f"{path}, row {number}: {error}") from None


def json_rows(path: pathlib.Path) -> Iterator[Row]:
    """The rows of a Parquet file, of a JSON list, or one of each line.

    Raises:
      ValueError: it is none of them; the message names file and row.
    """
    content = path.read_bytes()
    if content.startswith(b"PAR1"):
        yield from _parquet_rows(path, content)
        return
    yield from rows_of_text(path, content)


def rows_of_text(path, content: bytes) -> Iterator[Row]:
    """The rows of a JSON list, or one of each line; `path` is what errors call it."""
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


def _parquet_rows(path, content: bytes) -> list[Row]:
    import pyarrow  # slow to import
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is not a sound Parquet file: {error}") from None


def _parsed_lines(path, content: bytes) -> Iterator[tuple[int, Any]]:
    lines = ((number, line) for number, line in text_lines(io.BytesIO(content), path) if line.strip())
    for row, (number, line) in enumerate(lines):
        try:
            yield row, json.loads(line)
        except ValueError as error:
            raise MalformedLineError(path, number, f"not valid JSON: {error}") from None


def archive_rows(path: pathlib.Path, member: str) -> Iterator[Row]:
    """The rows of a member of a zip or tar archive: a file of JSON lines, or a folder of MMLU's CSV files.

    Raises:
      ValueError: no archive, or none with that member.
    """
    found = False
    for name, content in _members(path, member):
        found = True
        label = f"{path}, {name}"
        yield from mmlu_rows(label, name, content) if name.endswith(".csv") else rows_of_text(label, content)
    if not found:
        raise ValueError(f"{path} has no {member} in it")


def _members(path: pathlib.Path, member: str) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of an archive's files that are `member` or, if it ends in a slash, lie in it; by name.

    Raises:
      ValueError: the file is no archive, or a damaged one.
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
                yield name, archive.extractfile(files[name]).read()
    except (tarfile.ReadError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{path} is neither a zip nor a tar archive that can be read: {error}") from None


def mmlu_rows(label: str, name: str, content: bytes) -> Iterator[Row]:
    """The rows of one of MMLU's CSV files: question, four choices, letter; the subject is in the file's name.

    Raises:
      ValueError: a line of another form; the message has its number.
    """
    subject = re.sub(r"_(?:dev|val|test)$", "", pathlib.PurePosixPath(name).stem)
    for number, line in enumerate(csv.reader(io.StringIO(decode_text(content, label), newline=""))):
        if len(line) != 6 or line[5] not in ("A", "B", "C", "D"):
            raise ValueError(f"{label}, row {number}: expected question, four choices and a letter A..D, got {line!r}")
        yield {"question": line[0], "subject": subject, "choices": line[1:5], "answer": "ABCD".index(line[5])}


def arc_row(row: Row, number: int) -> Row:
    """A row of ARC in the published schema from its instruction form, or from that of the archive ARC-V1.

    The choices of the instruction form are labelled A, B, ... and the id is the row's number: it keeps neither.

    Raises:
      ValueError: another instruction than this form's, or an answer that is none of its choices.

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
    """HellaSwag from six lines an item: "ACTIVITY: CONTEXT", the label, four endings.

    The fields ctx_a and ctx_b are missing: this form keeps no trace of where one ends.

    Raises:
      ValueError: lines that are no item; the message has the first one's number.
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
