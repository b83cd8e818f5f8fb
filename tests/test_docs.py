"""The commands of the pages on launching and on the paper: their configs, flags and keys exist."""

import ast
import functools
import importlib.util
import json
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from mlora_jax.cli.config_flags import read_config
from mlora_jax.config import check_key, resolve

ROOT = pathlib.Path(__file__).parents[1]
PAGES = ("docs/launching.md", "docs/paper.md", "docs/study.md")
SLURM = ROOT / "docs/launch/slurm.sh"
PLACEHOLDERS = {"CONFIG"}


def commands(page: str) -> list[str]:
    """Every `python -m experiments.X ...` and `sbatch SCRIPT ...` in a page, continued lines joined."""
    text = re.sub(r"\\\n\s*", " ", (ROOT / page).read_text(encoding="utf-8"))
    return re.findall(r"(?:-m experiments\.\w+|sbatch(?: --\S+)* \S+\.sh)[^`\n]*", text)


def words_of(command: str) -> list[str]:
    """The words of a command, without what follows it in a quoted line for another machine."""
    command = re.sub(r"#.*", "", command)
    try:
        return shlex.split(command)
    except ValueError:  # the closing quote of the line around it
        return shlex.split(command.rstrip().removesuffix('"'))


@functools.cache
def flags_of(module: str) -> set[str]:
    """The flags that a command defines, with absl's own."""
    script = (
        f"import importlib, json\nfrom absl import flags\nimportlib.import_module('mlora_jax.cli.{module}')\n"
        "print(json.dumps(sorted(flags.FLAGS)))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


def check_command(words: list[str]) -> None:
    """Raises where a command names what is not there."""
    if words[0] == "sbatch":
        script = next(word for word in words if word.endswith(".sh"))
        assert (ROOT / script).is_file(), script
        after = words[words.index(script) + 1 :]
        module, arguments = "run", ["--config", after[0], "--workdir", *after[1:]]
    else:
        module, arguments = words[1].removeprefix("experiments."), words[2:]
    assert importlib.util.find_spec(f"experiments.{module}"), module
    known = flags_of(module)
    for index, word in enumerate(arguments):
        if not word.startswith("--"):
            continue
        name, _, value = word.removeprefix("--").partition("=")
        if name.startswith("config."):
            if "KEY" not in name:
                check_key(name)
        elif name == "config":
            config = value or arguments[index + 1]
            if config not in PLACEHOLDERS:
                read_config(config)
        else:
            assert name in known, f"--{name} is no flag of experiments.{module}"


EVERY = [(page, command) for page in PAGES for command in commands(page)]


def test_the_pages_have_commands():
    found = [command for page, command in EVERY if page != "docs/study.md"]
    modules = {words_of(command)[1] for command in found if not command.startswith("sbatch")}
    assert modules >= {f"experiments.{name}" for name in ("run", "plan", "table", "export")}
    assert sum("--config paper_" in command for command in found) > 12
    assert any(command.startswith("sbatch") for command in found)


@pytest.mark.parametrize("page", PAGES)
def test_every_command_names_what_exists(page):
    for command in commands(page):
        check_command(words_of(command))


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("-m experiments.run --config paper_gsm8k_llama32_1b:r31", ValueError),
        ("-m experiments.run --config nothing", FileNotFoundError),
        ("-m experiments.run --config quickstart --config.train.epoch=1", ValueError),
        ("-m experiments.table a --choose test", AssertionError),
        ("-m experiments.nothing", AssertionError),
        ("sbatch docs/launch/none.sh quickstart DIR", AssertionError),
        ("sbatch docs/launch/slurm.sh quickstart DIR --config.train.epoch=1", ValueError),
    ],
)
def test_a_command_that_names_what_is_not_there_is_seen(command, error):
    with pytest.raises(error):
        check_command(words_of(command))


def test_values_of_the_pages_are_values():
    """The lists of trials that the pages show are lists that a config takes."""
    for page in PAGES:
        for text in re.findall(r'--config\.trials\.list="([^"]*)"', (ROOT / page).read_text(encoding="utf-8")):
            assert resolve({"trials": {"list": ast.literal_eval(text)}}).trials.list


def test_the_slurm_script_is_sound():
    assert subprocess.run(["bash", "-n", SLURM], check=False).returncode == 0
    text = re.sub(r"\\\n\s*", " ", SLURM.read_text())
    (command,) = re.findall(r"-m experiments\.\w+[^\n]*", text)
    words = shlex.split(command.replace("$config", "quickstart").replace("$@", ""))
    check_command([word for word in words if word])
    assert "--config.parallel.distributed=True" in words


@pytest.mark.parametrize(("status", "requeued"), [(143, True), (0, False), (1, False)])
def test_the_slurm_script_queues_up_again_when_it_was_stopped(status, requeued, tmp_path):
    """With an srun and an scontrol of our own."""
    for name, body in {"srun": f"echo srun $*\nexit {status}", "scontrol": "echo scontrol $*"}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["bash", SLURM, "quickstart", "DIR", "--config.trials.seed=(1, 2)"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "77"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == status and "--config quickstart --workdir DIR" in done.stdout
    assert "--config.trials.seed=(1, 2)" in done.stdout and ("scontrol requeue 77" in done.stdout) == requeued


def test_the_slurm_script_says_how_it_is_called():
    done = subprocess.run(["bash", SLURM, "quickstart"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "usage: sbatch docs/launch/slurm.sh CONFIG WORKDIR" in done.stderr


def test_pages_link_to_what_is_there():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text(encoding="utf-8")):
            assert (ROOT / page).parent.joinpath(target).exists(), f"{page}: {target}"
