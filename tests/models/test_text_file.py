"""The reader of text files against Python's own text mode, codecs, csv and json, on files of every kind."""

import bz2
import csv
import gzip
import io
import itertools
import json
import tarfile
import zipfile

import pytest

from mlora_jax.cli.generate import read_prompts
from mlora_jax.data.builders.raw_files import RawFile
from mlora_jax.data.published import archive_rows, hellaswag_rows, json_rows
from mlora_jax.models.json_file import read_json_object
from mlora_jax.models.text_file import decode_text, read_lines, read_text, text_lines
from mlora_jax.models.tokenizer import Tokenizer
from tests.tiny import write_checkpoint

MARK = b"\xef\xbb\xbf"
# Characters at which str.splitlines cuts and text files do not.
WITHIN = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\x1dh\x1ei\0j"
ENDS = ("\n", "\r\n", "\r")


def text_mode(content: bytes, encoding: str = "utf-8-sig") -> list[str]:
    """The lines that Python's text mode gives."""
    return [line.removesuffix("\n") for line in io.TextIOWrapper(io.BytesIO(content), encoding=encoding)]


@pytest.mark.parametrize("mark", [b"", MARK], ids=["plain", "mark"])
def test_lines_are_those_of_pythons_text_mode(tmp_path, mark):
    file = tmp_path / "text"
    for parts in itertools.product(["", "x", "\r", "\n", "é"], repeat=4):
        content = mark + "".join(parts).encode()
        file.write_bytes(content)
        lines = list(read_lines(file))
        assert [line for _, line in lines] == text_mode(content), content
        assert [number for number, _ in lines] == list(range(1, len(lines) + 1))
        assert read_text(file) == io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig").read()
        assert decode_text(content, "x") == content.decode("utf-8-sig")


@pytest.mark.parametrize("end", ENDS, ids=["lf", "crlf", "cr"])
@pytest.mark.parametrize("last", [True, False], ids=["ended", "open"])
def test_only_line_ends_cut_lines(end, last):
    content = end.join([WITHIN, "b"]).encode() + end.encode() * last
    assert list(text_lines(io.BytesIO(content), "x")) == [(1, WITHIN), (2, "b")]
    latin = "caf\xe9\x85\xa0" + end + "b"
    assert [line for _, line in text_lines(io.BytesIO(latin.encode("latin-1")), "x", "latin-1")] == latin.split(end)


def test_a_byte_order_mark_names_the_encoding_whatever_the_data_set_is_published_in():
    assert list(text_lines([MARK + "café".encode()], "x", "latin-1")) == [(1, "café")]


OTHER_FILES = [
    ("é".encode("utf-16"), "is UTF-16 text: save it as UTF-8"),
    (b"\xfe\xff" + "é".encode("utf-16-be"), "is UTF-16 text: save it as UTF-8"),
    ("é".encode("utf-32"), "is UTF-32 text: save it as UTF-8"),
    (b"\0\0\xfe\xff" + "é".encode("utf-32-be"), "is UTF-32 text: save it as UTF-8"),
    (gzip.compress(b"a", mtime=0), "is compressed by gzip: decompress it"),
    (bz2.compress(b"a"), "is compressed by bzip2: decompress it"),
]


@pytest.mark.parametrize(("content", "message"), OTHER_FILES)
def test_files_that_are_no_utf8_text_are_named(tmp_path, content, message):
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    for read in (read_text, read_prompts, read_json_object, lambda path: list(json_rows(path))):
        with pytest.raises(ValueError, match=f"prompts.txt {message}$"):
            read(file)
    with pytest.raises(ValueError, match=f"prompts.txt {message}$"):
        list(RawFile.at(file).lines("latin-1"))


# Bytes of a line that are no UTF-8: the number of the byte at fault is that of Python's own decoder.
BROKEN = [b"caf\xe9 x", b"\x80", b"ab\xc3", b"a\xed\xa0\x80b", b"\xf5\x80\x80\x80", b"x\xc0\xaf"]


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"], ids=["lf", "crlf", "cr"])
@pytest.mark.parametrize("mark", [b"", MARK], ids=["plain", "mark"])
def test_bytes_that_are_no_utf8_are_named_by_file_line_and_byte(tmp_path, broken, end, mark):
    with pytest.raises(UnicodeDecodeError) as oracle:
        broken.decode("utf-8")
    at = oracle.value.start
    message = rf"data.txt, line 3: byte {at + 1} of the line, 0x{broken[at]:02X}, is not UTF-8 text \("
    file = tmp_path / "data.txt"
    file.write_bytes(mark + end.join(["é".encode(), b"", broken, b"z"]))
    for read in (read_text, read_prompts, read_json_object, lambda path: list(json_rows(path))):
        with pytest.raises(ValueError, match=message):
            read(file)


ROWS = [{"prompt": "é", "n": 1}, {"prompt": WITHIN, "n": 2}, {"prompt": " a\r", "n": 3}]


@pytest.mark.parametrize("end", ENDS, ids=["lf", "crlf", "cr"])
@pytest.mark.parametrize("mark", [b"", MARK], ids=["plain", "mark"])
@pytest.mark.parametrize("last", [True, False], ids=["ended", "open"])
def test_every_reader_of_json_and_prompts(tmp_path, end, mark, last):
    lines = [json.dumps(row, ensure_ascii=False).replace("\0", "\\u0000") for row in ROWS]
    lines = [line.translate({ord(c): f"\\u{ord(c):04x}" for c in "\x0b\x0c\x1c\x1d\x1e"}) for line in lines]
    content = mark + (end.join(lines) + end * last).encode()
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    assert list(json_rows(file)) == ROWS == [json.loads(line) for line in text_mode(content)]
    assert [json.loads(line) for _, line in RawFile.at(file).lines()] == ROWS
    assert read_prompts(file) == [row["prompt"] for row in ROWS]
    file.rename(tmp_path / "ROWS.JSONL")
    assert read_prompts(tmp_path / "ROWS.JSONL") == [row["prompt"] for row in ROWS]
    (tmp_path / "rows.txt").write_bytes(mark + end.join(["é", " ", WITHIN, " b" * last]).encode())
    assert read_prompts(tmp_path / "rows.txt") == ["é", WITHIN, *[" b"] * last]
    (tmp_path / "rows.json").write_bytes(mark + json.dumps(ROWS, indent=1).replace("\n", end).encode())
    assert list(json_rows(tmp_path / "rows.json")) == ROWS
    (tmp_path / "object.json").write_bytes(mark + json.dumps(ROWS[1], indent=1).replace("\n", end).encode())
    assert read_json_object(tmp_path / "object.json") == ROWS[1]


def test_half_a_surrogate_pair_in_a_prompt_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n{"prompt": "\\ud800"}\n')
    with pytest.raises(ValueError, match=r"a.jsonl, line 2: the prompt holds half a surrogate pair"):
        read_prompts(tmp_path / "a.jsonl")


def test_a_line_of_json_that_cannot_be_parsed_is_named_by_its_number_in_the_file(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n\n{"a": }\n')
    with pytest.raises(ValueError, match=r"a.jsonl, line 4: not valid JSON: Expecting value: line 1 column 7"):
        list(json_rows(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("end", ENDS, ids=["lf", "crlf", "cr"])
@pytest.mark.parametrize("mark", [b"", MARK], ids=["plain", "mark"])
def test_compressed_files_and_archives(tmp_path, end, mark):
    item = ["Cooking: He turns the", "2", "a", "b", f"c {WITHIN}", "d"]
    content = mark + end.join([*item, *item]).encode()
    file = tmp_path / "val.bz2"
    file.write_bytes(bz2.compress(content))
    assert text_mode(bz2.decompress(file.read_bytes())) == [*item, *item]
    first, second = hellaswag_rows(file)
    assert (first["activity_label"], first["ctx"], first["label"]) == ("Cooking", "He turns the", "2")
    assert first["endings"] == item[2:] == second["endings"]
    table = [['Is "it"\r\nso?', "1", "2", "3", "4", "B"], ["q", "1", "2", "3", "4", "D"]]
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator=end).writerows(table)
    jsonl = mark + end.join(['{"a": "é"}', '{"a": 2}']).encode()
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("data/x_test.csv", mark + text.getvalue().encode())
        archive.writestr("rows.jsonl", jsonl)
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        for name, data in (("data/x_test.csv", mark + text.getvalue().encode()), ("rows.jsonl", jsonl)):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    for name in ("a.zip", "a.tar.gz"):
        rows = list(archive_rows(tmp_path / name, "data/"))
        assert [[row["question"], *row["choices"], "ABCD"[row["answer"]]] for row in rows] == table
        assert list(archive_rows(tmp_path / name, "rows.jsonl")) == [{"a": "é"}, {"a": 2}]


def test_damaged_archives_are_named(tmp_path):
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w:gz") as archive:
        entry = tarfile.TarInfo("rows.jsonl")
        entry.size = 100_000
        archive.addfile(entry, io.BytesIO(bytes(range(256)) * 400))
    (tmp_path / "a.tar.gz").write_bytes(whole.getvalue()[:200])
    (tmp_path / "a.bz2").write_bytes(bz2.compress(b"a: b\n" * 1000)[:-9])
    with pytest.raises(ValueError, match=r"a.tar.gz is neither a zip nor a tar archive that can be read"):
        list(archive_rows(tmp_path / "a.tar.gz", "rows.jsonl"))
    with pytest.raises(ValueError, match=r"a.bz2 is not a sound bzip2 file"):
        hellaswag_rows(tmp_path / "a.bz2")


def test_bytes_in_compressed_files_are_named_too(tmp_path):
    (tmp_path / "a.bz2").write_bytes(bz2.compress(b"Cooking: x\n1\ncaf\xe9\nb\nc\nd\n"))
    with pytest.raises(ValueError, match=r"a.bz2, line 3: byte 4 of the line, 0xE9, is not UTF-8 text"):
        hellaswag_rows(tmp_path / "a.bz2")


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json"])
def test_the_chat_template_and_the_files_of_a_checkpoint(tmp_path, name):
    folder = write_checkpoint(tmp_path / "model")
    template = "{% for m in messages %}\n{{ m.content }}!\n{% endfor %}"
    if name.endswith(".jinja"):
        (folder / name).write_bytes(MARK + template.replace("\n", "\r\n").encode())
    else:
        settings = json.loads((folder / name).read_text()) | {"chat_template": template}
        (folder / name).write_bytes(MARK + json.dumps(settings, indent=1).replace("\n", "\r\n").encode())
    for file in ("config.json", "generation_config.json"):
        if (folder / file).is_file():
            (folder / file).write_bytes(MARK + (folder / file).read_bytes())
    messages = [{"role": "user", "content": "é"}]
    assert Tokenizer.load(folder).render_chat(messages, add_generation_prompt=False) == "é!\n"
    (folder / name).write_bytes(b"\xff\xfe{\0")
    with pytest.raises(ValueError, match=f"{name} is UTF-16 text: save it as UTF-8"):
        Tokenizer.load(folder)
