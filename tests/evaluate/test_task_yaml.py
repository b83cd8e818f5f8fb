"""Task files of a user's own, which the harness would read after training."""

import pytest

from mlora_jax.evaluate.task_files import check_names

GOOD = b"task: own\nname: caf\xc3\xa9\nprocess: !function own.process\n"


@pytest.mark.parametrize("content", [GOOD, b"\xef\xbb\xbf" + GOOD.replace(b"\n", b"\r\n"), GOOD[:-1]])
def test_a_task_file_that_can_be_read(tmp_path, content):
    (tmp_path / "own.yaml").write_bytes(content)
    check_names([str(tmp_path / "own.yaml")])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"task: own\nname: caf\xe9\n", r"own.yaml, line 2: byte 10 of the line, 0xE9, is not UTF-8 text"),
        (b"\xff\xfet\0", "own.yaml is UTF-16 text: save it as UTF-8"),
        (b"- task\n", "own.yaml is no task file of the harness: it names no task or group"),
        (b"output_type: generate_until\n", "own.yaml is no task file of the harness"),
        (b"task: [own\n", r"(?s)own.yaml is not valid YAML: while parsing a flow sequence.* line 1, column 7"),
    ],
)
def test_a_task_file_that_cannot(tmp_path, content, message):
    (tmp_path / "own.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        check_names([str(tmp_path / "own.yaml")])
