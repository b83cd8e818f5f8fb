"""`python -m experiments.run` as a user types it."""

import functools
import pathlib
import sys

import pytest

from mlora_jax.cli import config_flags
from mlora_jax.cli.config_flags import read_config, run_with_config, take_config_path
from mlora_jax.trials import expand_trials
from tests.cli.commands import run_command
from tests.tiny import write_checkpoint, write_trec

ROOT = pathlib.Path(__file__).parents[2]
run = functools.partial(run_command, "run")


def test_a_shipped_config_with_overrides(tmp_path):
    model, raw = write_checkpoint(tmp_path / "model"), write_trec(tmp_path / "raw")
    done = run(
        "--config",
        "configs/trec_stories_3m.py",
        "--workdir",
        tmp_path / "run",
        f"--config.model.path={model}",
        f"--config.data.raw_dir={raw}",
        f"--config.data.cache_dir={tmp_path / 'cache'}",
        "--config.trials.rank=(3,)",
        "--config.methods.mine=(('lora', 0.5), ('per_example', 0.5), 'rotate')",
        "--config.evaluation.readouts.mine=('prefix', 'squeeze')",
        "--config.trials.method=('matryoshka', 'mine')",
        "--config.trials.seed=(7,)",
        "--config.train.clip=0.5",
        "--config.train.epochs=4",
        "--config.data.max_length=128",
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "base accuracy" in done.stdout and "| matryoshka (masked) | 0.001 |" in done.stdout
    assert "| mine + squeeze | 0.001 |" in done.stdout
    for method in ("matryoshka", "mine"):
        assert (tmp_path / f"run/adapters/{method}-r3-none-lr0.001-seed7/adapter.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.train.clp=1"], "unknown config key config.train.clp; did you mean config.train.clip?"),
        (["--config.trials.method=('lor',)"], "unknown method 'lor'; did you mean 'lora'?"),
        (["--config.methods.mine=(('lora', 1.0), 'turn')"], "unknown word 'turn'; known: reset, rotate, restart, gate"),
        (
            ["--config.trials.scaling=('half',)"],
            "an entry of config.trials.scaling must be one of 'none', 'rank', 'sqrt', got 'half'",
        ),
        (["--config.adapter.ranks=(4,2)"], "ranks must be strictly increasing without repeats, got (4, 2)"),
        (["--config.adapter.ranks=(1,64)"], "rank 64 of S is above the adapter's rank R = 32"),
        (["--config.model.path=nowhere"], "nowhere"),
        (["config.train.epochs=1"], "what is 'config.train.epochs=1'? Options begin with --"),
        (["--config.trials.learning_rate=1e-4,", "3e-4"], "what is '3e-4'?"),
    ],
)
def test_bad_input_is_one_line(tmp_path, arguments, message):
    done = run("--config=configs/trec_stories_3m.py", "--workdir", tmp_path, *arguments)
    assert done.returncode == 1
    assert message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "error",
    [
        ModuleNotFoundError("config.records.wandb_project='x' needs wandb"),
        OSError("the checkpoint of step 5 in x was not written"),
    ],
)
def test_what_a_user_can_mend_is_one_line(monkeypatch, error):
    def fail(config):
        raise error

    monkeypatch.setattr(sys, "argv", ["run", "--config=configs/trec_stories_3m.py"])
    monkeypatch.setattr(config_flags.config_flags, "DEFINE_config_dict", lambda *arguments, **named: None)
    monkeypatch.setattr(config_flags.app, "run", lambda *arguments, **named: fail(None))
    with pytest.raises(SystemExit, match=f"error: {error}"):
        run_with_config(fail)


def test_config_path_is_required_and_found():
    assert take_config_path(["run", "--config=a.py", "--config.x=1"]) == ("a.py", ["run", "--config.x=1"])
    assert take_config_path(["run", "--workdir", "w", "--config", "a.py"]) == ("a.py", ["run", "--workdir", "w"])
    for arguments in (["run"], ["run", "--config"], ["run", "--config.model.path=x"]):
        with pytest.raises(SystemExit, match="--config PATH is required"):
            take_config_path(arguments)


OTHERS = ("pretrain", "kv_cache")  # configs of other commands
SHIPPED = [path for path in sorted((ROOT / "configs").glob("[!_]*.py")) if not path.stem.startswith(OTHERS)]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configs_resolve(path):
    config = read_config(str(path))
    assert config.trials.method


PAPER = sorted(path.stem for path in (ROOT / "configs").glob("paper_*.py"))


def test_the_papers_grids_are_its_settings():
    assert len(PAPER) == 4
    rates = [
        f"{digit}e-{power}" for power, digits in ((6, "56789"), (5, "123456789"), (4, "12345689")) for digit in digits
    ]
    for name in PAPER:
        for variant, rank in (("r32", 32), ("r256", 256)):
            config = read_config(f"{name}:{variant}")
            assert (len(expand_trials(config)), config.trials.rank) == (3 * 3 * 3 * 23, (rank,))
            assert config.trials.learning_rate == (*map(float, rates), 1e-3)
            assert config.trials.seed == (42, 666, 2408) and set(config.trials.scaling) == {"none", "rank", "sqrt"}
            assert config.model.path.endswith("1B-Instruct" if "1b" in name else "8B-Instruct")
            assert (config.train.batch_size, config.train.accumulation, config.train.epochs) == (32, 8, 3)
            shots = dict(config.evaluation.tasks)
            expected = {"arc_challenge": 25, "hellaswag": 10, "mmlu": 5, "winogrande": 5}
            assert shots == (expected if "platypus" in name else {"gsm8k": 8})
    assert read_config("paper_gsm8k_llama32_1b:r32").evaluation.tasks == (("gsm8k", 3), ("gsm8k", 8))


def test_a_variant_stands_behind_a_colon(tmp_path):
    assert read_config(PAPER[0]) == read_config(f"{PAPER[0]}:r32") == read_config(f"configs/{PAPER[0]}.py:r32")
    assert len(expand_trials(read_config(f"{PAPER[0]}:smoke"))) == 12
    with pytest.raises(ValueError, match="unknown variant 'r64' of the config, expected one of r32, r256, smoke"):
        read_config(f"{PAPER[0]}:r64")
    with pytest.raises(ValueError, match="the config quickstart has no variants, got quickstart:r32"):
        read_config("quickstart:r32")
    with pytest.raises(FileNotFoundError, match="there is no config file paper; configs that can be given by name"):
        read_config("paper:r32")
    file = tmp_path / "a:b.py"  # a file of such a name is that file
    file.write_text("def get_config():\n    return {'trials': {'rank': (3,)}}\n")
    assert read_config(str(file)).trials.rank == (3,)
