"""`python -m experiments.export`, the installed commands, and configs by name."""

import csv
import json
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from peft import PeftConfig

from mlora_jax.cli import export
from mlora_jax.cli.config_flags import find_config, read_config
from mlora_jax.core import RankHierarchy
from mlora_jax.run.inputs import model_folder  # noqa: F401  flags that grain defines inside a flagsaver would be lost
from mlora_jax.training.adapter_file import load_adapted, save_adapter
from tests.cli.commands import run_command
from tests.interop.models import PATHS, TOKENS, pairs, random_adapter, save_base
from tests.oracles.numpy_reference import best_approximation, profile_matryoshka, readouts
from tests.oracles.peft_logits import plain, with_deltas, with_peft

ROOT = pathlib.Path(__file__).parents[2]
S = (1, 2, 4, 6)
CLOSE = dict(rtol=0, atol=1e-4)
# PEFT 0.21 reads a property that transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(a run's folder with two trials of random adapters, the factors of each)."""
    folder = tmp_path_factory.mktemp("run")
    base = save_base(folder / "model")
    (folder / "config.json").write_text(json.dumps({"model": {"path": str(base), "dtype": "float32"}}))
    factors = {}
    for size, name in enumerate(("lora-r6", "matryoshka-r6"), start=1):
        adapter = jax.tree.map(lambda x, size=size: x / size, random_adapter(base)[1])
        description = {"base_model": str(base), "trial": {"method": name.split("-")[0]}, "task": "trec"}
        save_adapter(folder / "adapters" / name, adapter, RankHierarchy(S, "sqrt"), description)
        factors[name] = pairs(adapter)
    return folder, factors


def exported(capsys, folder, **values):
    """What the command prints with these flags, in this process."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(**values):
        export._run(["export", str(folder)])
    return capsys.readouterr().out


def expected(run, trial, p):
    """Logits of the base with ``A diag(p) B`` added, by torch."""
    return with_deltas(run[0] / "model", {name: (a * p) @ b for name, (a, b) in run[1][trial].items()}, TOKENS)


def test_a_folder_for_each_rank_as_a_user_types_it(run, tmp_path):
    out = tmp_path / "out"
    options = ["--trial=matryoshka-r6", "--to", "peft", "--rank=1,4,6", "--readout=nested", f"--output={out}"]
    done = run_command("export", run[0], *options, environment=os.environ)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout == "".join(f"PEFT adapter in {out}/rank-{rank}\n" for rank in (1, 4, 6))
    for rank in (1, 4, 6):
        p = readouts(S, rank, "sqrt")["nested"]
        logits, _ = with_peft(run[0] / "model", out / f"rank-{rank}", TOKENS)
        np.testing.assert_allclose(logits, expected(run, "matryoshka-r6", p), **CLOSE)
    config = json.loads((out / "rank-4/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(run[0] / "model")
    record = json.loads((out / "rank-4/mlora_jax.json").read_text())
    assert record["exported_from"] == {"trial": {"method": "matryoshka"}, "task": "trec", "readout": "nested"}


@pytest.mark.parametrize(("base", "revision"), [("owner/tiny", None), ("owner/tiny@v1", "v1")])
def test_a_base_of_the_hub_keeps_its_name(run, tmp_path, capsys, base, revision):
    """PEFT finds it on any machine; the cache's folder holds on this one only. Nothing is downloaded for it."""
    shutil.copytree(run[0] / "adapters/lora-r6", tmp_path / "adapter")
    described = json.loads((tmp_path / "adapter/adapter.json").read_text())
    (tmp_path / "adapter/adapter.json").write_text(json.dumps({**described, "base_model": base}))
    exported(capsys, tmp_path / "adapter", to="peft", rank=["2"], output=str(tmp_path / "out"))
    config = PeftConfig.from_pretrained(tmp_path / "out")
    assert (config.base_model_name_or_path, config.revision) == ("owner/tiny", revision)


def test_the_other_forms_and_their_places(run, tmp_path, capsys):
    folder, factors = run
    said = exported(capsys, folder, trial="lora-r6", to="hf", rank=["2"])
    target = folder / "exports/lora-r6/hf-prefix-rank-2"
    assert said == f"merged model in {target}\n"
    p = readouts(S, 2, "sqrt")["prefix"]
    np.testing.assert_allclose(plain(target, TOKENS), expected(run, "lora-r6", p), **CLOSE)
    small = exported(capsys, folder / "adapters/lora-r6", to="safetensors", rank=["2"])
    target = folder / "adapters/lora-r6/exports/safetensors-prefix-rank-2"
    assert small == f"adapter in {target}\n"
    # Squeeze keeps the function of the method that trained it.
    exported(
        capsys, folder, trial="matryoshka-r6", to="hf", rank=["3"], readout="squeeze", output=str(tmp_path / "out")
    )
    best = {
        name: best_approximation(a, b, profile_matryoshka(S, "sqrt"), 3)
        for name, (a, b) in factors["matryoshka-r6"].items()
    }
    np.testing.assert_allclose(plain(tmp_path / "out", TOKENS), with_deltas(folder / "model", best, TOKENS), **CLOSE)


def test_read_outs_that_were_made_of_data(run, tmp_path, capsys):
    """The profiles and the squeezed factors that a run leaves beside an adapter, in every form."""
    folder = tmp_path / "adapter"
    shutil.copytree(run[0] / "adapters/lora-r6", folder)
    with pytest.raises(FileNotFoundError, match="has no read-out 'calibrated', which is made of training data: run"):
        exported(capsys, folder, to="peft", rank=["2"], readout="calibrated")
    with pytest.raises(FileNotFoundError, match="has no read-out 'squeeze_inputs'"):
        exported(capsys, folder, to="peft", rank=["2"], readout="squeeze_inputs")
    profiles = np.tril(np.random.default_rng(0).normal(size=(6, 6)))[[0, 1, 3, 5]]
    (folder / "calibrated.json").write_text(json.dumps({"ranks": S, "profiles": profiles.tolist()}))
    for form, rank in (("peft", 2), ("hf", 4), ("safetensors", 2)):
        out = tmp_path / form
        exported(capsys, folder, to=form, rank=[str(rank)], readout="calibrated", output=str(out))
        logits = expected(run, "lora-r6", profiles[S.index(rank)])
        if form == "peft":
            made = with_peft(run[0] / "model", out, TOKENS)[0]
        else:
            merged = out if form == "hf" else tmp_path / "merged"
            if form == "safetensors":
                exported(capsys, out, to="hf", rank=["2"], output=str(merged))
            made = plain(merged, TOKENS)
        np.testing.assert_allclose(made, logits, **CLOSE)
        assert json.loads((out / "mlora_jax.json").read_text())["readout"] == "calibrated"
    with pytest.raises(ValueError, match="is calibrated at the ranks 1, 2, 4, 6, not at 3"):
        exported(capsys, folder, to="peft", rank=["1", "3"], readout="calibrated", output=str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()
    # Of the other read-out a run leaves another adapter: here that of the other trial.
    shutil.copytree(run[0] / "adapters/matryoshka-r6", folder / "squeeze_inputs")
    exported(capsys, folder, to="peft", rank=["3"], readout="squeeze_inputs", output=str(tmp_path / "squeezed"))
    logits = expected(run, "matryoshka-r6", readouts(S, 3, "sqrt")["prefix"])
    np.testing.assert_allclose(with_peft(run[0] / "model", tmp_path / "squeezed", TOKENS)[0], logits, **CLOSE)
    (folder / "calibrated.json").write_text("{")
    with pytest.raises(ValueError, match=r"calibrated\.json is damaged"):
        exported(capsys, folder, to="peft", rank=["2"], readout="calibrated")


def test_an_exported_adapter_is_what_every_command_takes(run, tmp_path, capsys):
    """It can be exported once more, and it is squeezed as the function that it is, not as what it was cut from."""
    from mlora_jax.models import load_decoder

    out = tmp_path / "small"
    exported(capsys, run[0], trial="matryoshka-r6", to="safetensors", rank=["4"], readout="masked", output=str(out))
    exported(capsys, out, to="hf", rank=["4"], readout="squeeze", output=str(tmp_path / "merged"))
    p = readouts(S, 4, "sqrt")["masked"]
    np.testing.assert_allclose(plain(tmp_path / "merged", TOKENS), expected(run, "matryoshka-r6", p), **CLOSE)
    assert load_adapted(out, load_decoder(run[0] / "model")).hierarchy.max_rank == 4


def test_ranks_for_vllm(run, tmp_path, capsys):
    out = tmp_path / "out"
    said = exported(
        capsys, run[0], **{"trial": "lora-r6", "to": "peft", "rank": ["2"], "ranks_for": "vllm", "output": str(out)}
    )
    assert said == f"PEFT adapter in {out}; serve it by vllm serve BASE --enable-lora --max-lora-rank 8 or more\n"
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 8
    np.testing.assert_allclose(
        with_peft(run[0] / "model", out, TOKENS)[0],
        expected(run, "lora-r6", readouts(S, 2, "sqrt")["prefix"]),
        **CLOSE,
    )
    # Without --rank those that it accepts, and R.
    with flagsaver.flagsaver(ranks_for="vllm", rank=None):
        assert export._ranks(RankHierarchy((1, 2, 4, 8, 16, 32))) == [8, 16, 32]
        assert export._ranks(RankHierarchy((1, 20))) == [8, 16, 20]
        assert export._ranks(RankHierarchy((1, 6))) == [6]


def test_ranks_per_layer_of_a_report(run, tmp_path, capsys):
    """From the ranks.csv that `experiments.ranks` writes, by the rank whose parameters they may have."""
    ranks = {"layers.self_attn.q_proj": (0, 2, 4), "layers.self_attn.v_proj": (1, 6, 1),
             "layers.mlp.down_proj": (0, 0, 2), "lm_head": (3,)}  # fmt: skip
    rows = [
        {"kind": "curve", "rank": 2, "readout": "prefix", "ranks": ""},
        {"kind": "uniform", "rank": 2, "readout": "prefix", "ranks": ""},
        {"kind": "allocated", "rank": 2, "readout": "prefix",
         "ranks": "; ".join(f"{path}: {' '.join(map(str, each))}" for path, each in ranks.items())},
    ]  # fmt: skip
    with (tmp_path / "ranks.csv").open("w", newline="", encoding="utf-8-sig") as file:  # as Excel saves it
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    given = dict(trial="lora-r6", to="peft", allocation=str(tmp_path / "ranks.csv"))
    exported(capsys, run[0], rank=["2"], output=str(tmp_path / "out"), **given)
    logits, layers = with_peft(run[0] / "model", tmp_path / "out", TOKENS)
    by_name = {PATHS[path].format(layer): r for path, each in ranks.items() for layer, r in enumerate(each) if r}
    assert layers == by_name
    deltas = {
        name: (run[1]["lora-r6"][name][0] * readouts(S, r, "sqrt")["prefix"]) @ run[1]["lora-r6"][name][1]
        for name, r in by_name.items()
    }
    np.testing.assert_allclose(logits, with_deltas(run[0] / "model", deltas, TOKENS), **CLOSE)
    with pytest.raises(ValueError, match=r"ranks\.csv has no ranks per layer for rank 4; it has 2"):
        exported(capsys, run[0], rank=["4"], **given)
    with pytest.raises(ValueError, match="for the read-out prefix: give --readout prefix"):
        exported(capsys, run[0], rank=["2"], readout="nested", **given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": ["7"]}, r"--rank must be an integer in 1\.\.6, got 7"),
        ({"rank": ["0"]}, r"--rank must be an integer in 1\.\.6, got 0"),
        ({"rank": ["x"]}, "--rank must be integers in 0..2147483647 with commas between them, got 'x'"),
        ({"rank": None}, "--rank is missing, for example --rank 1,8,32"),
        ({"trial": None}, "has several trials, name one by --trial: lora-r6, matryoshka-r6"),
        ({"trial": "lora"}, "has no trial 'lora'; trials there: lora-r6, matryoshka-r6"),
        ({"folder": "model"}, "holds no adapters"),
        ({"folder": "nowhere"}, "there is no folder .*nowhere"),
        ({"folder": "adapters/lora-r6"}, "--trial names an adapter of a run"),
        ({"to": "hf", "ranks_for": "vllm"}, "--ranks-for is of --to peft only, got --to hf"),
        ({"max_shard_size": "5GB"}, "--max_shard_size is of --to hf only, got --to peft"),
        ({"model": "nowhere"}, "there is no base model nowhere: give its folder by --model"),
        ({"allocation": "nothing.csv"}, "nothing.csv"),
    ],
)
def test_bad_input_names_the_thing(run, tmp_path, capsys, changes, message):
    given = {"trial": "lora-r6", "to": "peft", "rank": ["2"], "output": str(tmp_path / "out"), **changes}
    if changes.get("model"):
        given["to"] = "hf"
    folder = run[0] / given.pop("folder", "")
    with pytest.raises((ValueError, OSError), match=message):
        exported(capsys, folder, **given)
    assert not list(tmp_path.iterdir())


def test_a_damaged_adapter_is_named(run, tmp_path, capsys):
    from safetensors.numpy import load_file, save_file

    broken = tmp_path / "adapter"
    broken.mkdir()
    for name in ("adapter.json", "adapter.safetensors"):
        (broken / name).write_bytes((run[0] / "adapters/lora-r6" / name).read_bytes())
    tensors = load_file(broken / "adapter.safetensors")
    save_file({k: v for k, v in tensors.items() if k != "lm_head.b"}, broken / "adapter.safetensors")
    with pytest.raises(ValueError, match=r"holds no factors of rank 6 for lm_head, but a \(16, 6\)"):
        exported(capsys, broken, to="peft", rank=["2"])
    (broken / "adapter.safetensors").write_bytes((broken / "adapter.safetensors").read_bytes()[:-9])
    with pytest.raises(ValueError, match="is damaged"):
        exported(capsys, broken, to="peft", rank=["2"])


def test_a_config_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config("quickstart") == ROOT / "configs/quickstart.py"
    assert read_config("quickstart").trials.rank == (16,)
    (tmp_path / "quickstart").write_text("")
    assert find_config("quickstart") == pathlib.Path("quickstart")  # a file that is there
    names = "gsm8k_stories_3m, paper_gsm8k_llama31_8b, paper_gsm8k_llama32_1b, .*, trec_stories_3m"
    for missing in ("quickstar", "configs/quickstart.py", "pretrain_quickstart", "__init__", ""):
        with pytest.raises(FileNotFoundError, match=f"there is no config file {missing}; .* by name: {names}$"):
            find_config(missing)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A wheel of the package, unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a build leaves its files beside the sources
    for name in ("mlora_jax", "experiments", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(folder),
        str(ROOT),
    ]
    subprocess.run(pip, check=True, capture_output=True, text=True, timeout=300)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder / "site")
    return folder / "site"


@pytest.mark.slow
def test_the_installed_commands(installed, tmp_path):
    """Each starts from another folder, and a shipped config is found by its name."""
    (entries,) = installed.glob("*.dist-info/entry_points.txt")
    lines = [line for line in entries.read_text().splitlines() if " = " in line]
    commands = dict(line.split(" = ") for line in lines)
    names = ("compile-report", "export", "generate", "kv-cache", "lm-eval", "plan", "ranks", "run", "study", "table")
    assert sorted(commands) == [f"mlora-{name}" for name in names]
    environment = os.environ | {"PYTHONPATH": str(installed)}

    def start(command, *arguments):
        module, function = commands[command].split(":")
        script = f"import sys; sys.argv[0] = {command!r}; from {module} import {function}; sys.exit({function}())"
        return subprocess.run(
            [sys.executable, "-c", script, *arguments],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip

    flag = {"export": "--ranks-for", "generate": "--prompt:", "plan": "--timed_steps", "ranks": "--budget",
            "run": "--workdir", "study": "--cells", "table": "--choose_on",
            "lm-eval": "--tasks", "compile-report": "--topology", "kv-cache": "--out"}  # fmt: skip
    for name in names:
        arguments = ["run", "--help"] if name == "lm-eval" else ["--help"]
        arguments += ["--config=quickstart"] if name in ("run", "plan", "compile-report") else []
        done = start(f"mlora-{name}", *arguments)
        assert flag[name] in done.stdout, (name, done.stdout, done.stderr)
    done = start("mlora-run", "--config", "quickstart", "--workdir", "out", "--config.model.path=nowhere")
    assert done.returncode == 1 and "'nowhere' is neither a folder" in done.stderr, done.stderr
    few = ("--config.train.epochs=1", "--config.trials.method=('lora',)", "--config.evaluation.limit=8")
    done = start("mlora-plan", "--config", "quickstart", *few, "--timed_steps=1")
    assert done.returncode == 0 and "2 trials of 150 steps" in done.stdout, (done.stdout, done.stderr)
