"""docs/config.md and the list of `--help`: every key with its meaning, default and what is allowed."""

import pathlib

import pytest

from mlora_jax.cli.config_flags import read_config, run_with_config
from mlora_jax.cli.keys_page import text, write
from mlora_jax.config import KEYS, help_text
from mlora_jax.study.keys import STUDY

PAGE = pathlib.Path(__file__).parents[2] / "docs/config.md"


def test_the_page_is_that_of_the_table():
    assert PAGE.read_text(encoding="utf-8") == text(), "run python -m experiments.keys --out docs/config.md"


def test_the_page_has_every_key():
    section, rows = "", {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## config.")
        elif line.startswith("| `"):
            cells = [cell.strip() for cell in line.strip("|").split(" | ")]
            assert len(cells) == 5, line
            rows[f"{section}.{cells[0].strip('`')}"] = cells
    named = {"methods.NAME", "evaluation.readouts.NAME"}
    assert set(rows) == {name for name, _ in (*KEYS.leaves(), *STUDY.leaves("study."))} | named
    assert rows["train.epochs"][1:] == [
        "`3`",
        "an integer, at least 1",
        "no",
        "Every training row is seen this many times.",
    ]
    assert rows["trials.learning_rate"][2].startswith("a tuple of numbers, each positive and finite")
    assert [rows[name][3] for name in ("trials.seed", "evaluation.readouts.lora", "data.task")] == ["yes", "yes", "no"]


def test_help_has_every_key_and_the_values_of_the_config():
    shown = " ".join(help_text(KEYS.keys, read_config("quickstart").to_dict()).split())
    for name, key in KEYS.leaves():
        assert f"--config.{name}: " in shown, name
        assert " ".join(key.doc.split()) in shown, name
    assert "[an integer, at least 1; default 3; this config 2]" in shown  # train.epochs
    assert "default 1; may change in a begun run]" in shown
    assert all(len(line) <= 100 for line in help_text(KEYS.keys).splitlines())


@pytest.mark.parametrize("arguments", [["--help"], ["--config", "quickstart", "--help"], ["--config=quickstart", "-h"]])
def test_help_is_printed_with_and_without_a_config(arguments, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["run", *arguments])
    with pytest.raises(SystemExit) as left:
        run_with_config(lambda config: pytest.fail("help runs nothing"))
    assert left.value.code == 0
    printed = capsys.readouterr().out
    assert "--config.train.epochs: Every training row is seen this many times." in printed
    assert ("this config 2" in printed) == (len(arguments) > 1)


def test_the_command_writes_the_page(tmp_path, capsys):
    write(None)
    assert capsys.readouterr().out == text()
    write(str(tmp_path / "config.md"))
    assert (tmp_path / "config.md").read_text(encoding="utf-8") == text()
