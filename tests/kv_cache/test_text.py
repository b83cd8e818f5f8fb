"""Plain text: the forms of files, pieces of documents, and rows of one text."""

import json

import pytest

from mlora_jax.kv_cache.text import encode, packed_rows, read_documents, single_rows
from mlora_jax.models import Tokenizer
from tests.tiny import write_checkpoint


def test_three_forms_hold_the_same_documents(tmp_path):
    texts = ["How far ?", "line\nline"]
    (tmp_path / "a.json").write_text(json.dumps([*texts, " "]))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n\n" for text in texts))
    (tmp_path / "a.txt").write_text(texts[1])
    assert read_documents(tmp_path / "a.json") == read_documents(tmp_path / "a.jsonl") == texts
    assert read_documents(tmp_path / "a.txt") == texts[1:]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "is not JSON"),
        ("a.json", '{"text": "a"}', "must be a list of texts"),
        ("a.jsonl", '{"text": "a"}\n{"prompt": "a"}\n', 'line 2: it must be an object like {"text": "some text"}'),
        ("a.txt", " \n", "holds no text"),
    ],
)
def test_files_that_hold_no_documents(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_documents(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="there is no file of text"):
        read_documents(tmp_path / "absent.json")


def test_long_documents_become_pieces(tmp_path):
    tokenizer = Tokenizer.load(write_checkpoint(tmp_path))
    whole = [*tokenizer.encode("Who wrote Hamlet ?", bos=True), tokenizer.eos_id]
    pieces = encode(["Who wrote Hamlet ?"], tokenizer, 4)
    assert [token for piece in pieces for token in piece] == whole[: 4 * len(pieces)]
    assert max(map(len, pieces)) == 4 and min(map(len, pieces)) > 1
    rows = packed_rows(pieces, 8)
    assert rows.tokens.shape[1] == 8 and int((rows.segments > 0).sum()) == sum(map(len, pieces))
    (tokens, lengths), *_ = single_rows(pieces, 4, 3)
    assert tokens.shape == (3, 4) and tokens[0, : lengths[0]].tolist() == pieces[0]
