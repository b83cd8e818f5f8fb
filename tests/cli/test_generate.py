"""`python -m experiments.generate` as a user types it."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from mlora_jax.adapters import adapt, split
from mlora_jax.cli import generate
from mlora_jax.core import RankHierarchy
from mlora_jax.models import Tokenizer, load_decoder
from mlora_jax.run.inputs import model_folder  # noqa: F401  flags that grain defines inside a flagsaver would be lost
from mlora_jax.training.adapter_file import save_adapter
from tests.cli.commands import run_command
from tests.oracles.torch_generate import greedy
from tests.tiny import random_like, write_checkpoint

PROMPTS = ["How far ?", "Natalia sold 48/2 =", "a"]
PATHS = {"q_proj": "self_attn.q_proj", "down_proj": "mlp.down_proj"}

command = functools.partial(run_command, "generate")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with two trials; their adapters are random, and `run.factors` holds the first's."""
    folder = tmp_path_factory.mktemp("run")
    model = write_checkpoint(folder / "model")
    (folder / "config.json").write_text(json.dumps({"model": {"path": str(model), "dtype": "float32"}}))
    _, _, template, _ = split(adapt(load_decoder(model), 4, tuple(PATHS), key=jax.random.key(0)))
    for seed, name in enumerate(("lora-r4", "matryoshka-r4")):
        adapter = random_like(template, seed=seed, scale=0.4)
        trial = {"method": name.split("-")[0]}
        description = {"base_model": str(model), "targets": list(PATHS), "trial": trial}
        save_adapter(folder / "adapters" / name, adapter, RankHierarchy((1, 2, 4), "sqrt"), description)
    return folder


def expected(run, trial, p, prompts=PROMPTS, new=10):
    """Texts by transformers with the adapter of a trial added to the weights."""
    from safetensors.numpy import load_file

    tensors = load_file(run / "adapters" / trial / "adapter.safetensors")
    factors = {path: (tensors[f"layers.{path}.a"], tensors[f"layers.{path}.b"]) for path in PATHS.values()}
    tokenizer = Tokenizer.load(run / "model")
    encoded = [tokenizer.encode(prompt, bos=True) for prompt in prompts]
    answers, gaps = greedy(run / "model", factors, p, encoded, max_new_tokens=new, eos=[2])
    assert min(gaps) > 1e-3
    return [tokenizer.decode(made) for made in answers]


def answered(capsys, **values):
    """What the command prints with these flags, in this process."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(**{"max_new_tokens": 10, **values}):
        generate._run(["generate"])
    return capsys.readouterr().out


def test_a_file_of_prompts_at_several_ranks(run, tmp_path):
    (tmp_path / "ask.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n\n" for prompt in PROMPTS))
    out = tmp_path / "answers.jsonl"
    options = ("--prompts", tmp_path / "ask.jsonl", "--max_new_tokens=10", f"--output={out}")
    done = command("--run", run, "--trial=matryoshka-r4", "--rank=4,0,2", *options)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and done.stdout == f"9 answers in {out}\n"
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(record["prompt"], record["rank"]) for record in records] == [(p, r) for p in PROMPTS for r in (4, 0, 2)]
    for rank in (0, 2, 4):
        p = np.where(np.arange(4) < rank, max(rank, 1) ** -0.5, 0)
        texts = [record["answer"] for record in records if record["rank"] == rank]
        assert texts == expected(run, "matryoshka-r4", p)
    assert {record["tokens"] for record in records} == {10}
    assert len({record["answer"] for record in records}) > 6


def test_one_prompt_of_an_adapter_whose_base_has_moved(run, tmp_path, capsys):
    """The answer and nothing else; the base that the adapter names is not there."""
    adapter, moved = tmp_path / "adapter", tmp_path / "moved"
    shutil.copytree(run / "adapters/lora-r4", adapter)
    shutil.copytree(run / "model", moved)
    text = json.loads((adapter / "adapter.json").read_text()) | {"base_model": str(tmp_path / "gone")}
    (adapter / "adapter.json").write_text(json.dumps(text))
    (whole,) = expected(run, "lora-r4", np.full(4, 0.5), PROMPTS[:1])
    done = command("--adapter", adapter, "--model", moved, "--rank=4", "--prompt", PROMPTS[0], "--max_new_tokens=10")
    assert (done.returncode, done.stderr, done.stdout) == (0, "", f"{whole}\n")
    with pytest.raises(FileNotFoundError, match=r"there is no base model .*gone: give its folder by --model"):
        answered(capsys, adapter=str(adapter), rank=["4"], prompt=PROMPTS[0])


def test_a_read_out_that_was_fitted(run, tmp_path, capsys):
    adapter = tmp_path / "adapter"
    shutil.copytree(run / "adapters/lora-r4", adapter)
    p = [0.7, -0.4, 0.0, 0.0]
    (adapter / "calibrated.json").write_text(json.dumps({"ranks": [2], "profiles": [p]}))
    asked = {"adapter": str(adapter), "prompt": PROMPTS[0], "readout": "calibrated"}
    assert answered(capsys, rank=["2"], **asked) == f"{expected(run, 'lora-r4', np.array(p), PROMPTS[:1])[0]}\n"
    assert answered(capsys, rank=["0"], **asked) == f"{expected(run, 'lora-r4', np.zeros(4), PROMPTS[:1])[0]}\n"
    with pytest.raises(ValueError, match="is calibrated at the ranks 2, not at 4"):
        answered(capsys, rank=["4"], **asked)


def test_readouts_stops_and_draws(run, tmp_path, capsys):
    (tmp_path / "ask.txt").write_text("\n".join((*PROMPTS, "")))
    shared = {"run": str(run), "trial": "matryoshka-r4", "rank": ["2", "4"], "prompts": str(tmp_path / "ask.txt")}
    plain = answered(capsys, **shared)
    p = np.where(np.arange(4) < 2, 2**-0.5, 0)
    first = expected(run, "matryoshka-r4", p)
    assert plain.startswith(f"--- rank 2: {PROMPTS[0]}\n{first[0]}\n--- rank 4: {PROMPTS[0]}\n")
    nested = answered(capsys, **{**shared, "rank": ["2"], "readout": "nested"})
    p = np.array([1 + 2**-0.5, 2**-0.5, 0, 0])
    assert nested.split("\n--- ")[0] == f"--- rank 2: {PROMPTS[0]}\n{expected(run, 'matryoshka-r4', p)[0]}"
    squeezed = answered(capsys, **{**shared, "rank": ["4"], "readout": "squeeze"})
    p = np.array([1 + 2**-0.5 + 0.5, 2**-0.5 + 0.5, 0.5, 0.5])  # the trained function, whole
    assert squeezed.split("\n--- ")[0] == f"--- rank 4: {PROMPTS[0]}\n{expected(run, 'matryoshka-r4', p)[0]}"
    cut = answered(capsys, **{**shared, "stop": [first[0][3:5], "never"]})
    assert cut.startswith(f"--- rank 2: {PROMPTS[0]}\n{first[0].partition(first[0][3:5])[0]}\n--- rank 4")
    warm = {**shared, "temperature": 1.2, "top_p": 0.95}
    both = answered(capsys, **warm, seed=3)
    assert both != plain
    alone = answered(capsys, **{**warm, "rank": ["4"]}, seed=3)
    assert all(block in both for block in alone.split("\n--- "))


def test_settings_of_generation_of_the_base(run, tmp_path, capsys):
    """Those that change logits are applied as in transformers, those of draws are not, others are refused."""
    model, p = tmp_path / "model", np.full(4, 0.5)
    shutil.copytree(run / "model", model)
    shutil.copytree(run / "adapters", tmp_path / "adapters")
    asked = {"run": str(tmp_path), "trial": "lora-r4", "model": str(model), "rank": ["4"], "prompt": PROMPTS[0]}
    settings = {"repetition_penalty": 1.6, "no_repeat_ngram_size": 2, "do_sample": True, "top_k": 3, "temperature": 0.7}
    (model / "generation_config.json").write_text(json.dumps(settings))
    text = answered(capsys, **asked)
    assert text == f"{expected(tmp_path, 'lora-r4', p, PROMPTS[:1])[0]}\n"
    assert text != f"{expected(run, 'lora-r4', p, PROMPTS[:1])[0]}\n"
    (model / "generation_config.json").write_text(json.dumps({"num_beams": 2}))
    with pytest.raises(ValueError, match=r"generation_config.json: num_beams=2 is not supported \(there is no beam"):
        answered(capsys, **asked)


def test_a_run_of_one_trial_needs_no_name(run, tmp_path):
    shutil.copytree(run / "adapters/lora-r4", tmp_path / "adapters/lora-r4")
    assert generate.find_adapter(str(tmp_path), None) == tmp_path / "adapters/lora-r4"
    with pytest.raises(ValueError, match=r"has several trials, name one by --trial: lora-r4, matryoshka-r4$"):
        generate.find_adapter(str(run), None)
    with pytest.raises(ValueError, match=r"has no trial 'lora'; trials there: lora-r4, matryoshka-r4$"):
        generate.find_adapter(str(run), "lora")
    with pytest.raises(FileNotFoundError, match="holds no adapters"):
        generate.find_adapter(str(run / "model"), None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": ["5"]}, r"--rank for the adapter in .*lora-r4 must be an integer in 0\.\.4, got 5"),
        ({"rank": ["-1"]}, "--rank must be integers in 0..2147483647 with commas between them, got '-1'"),
        ({"rank": []}, "--rank must be integers in"),
        ({"trial": None, "run": None}, "give either --run or --adapter"),
        ({"adapter": "x"}, "give either --run or --adapter"),
        ({"adapter": "x", "run": None}, "--trial names an adapter of a run"),
        ({"adapter": "{run}/model", "run": None, "trial": None}, "holds no adapter: adapter.safetensors is missing"),
        ({"prompts": "x"}, "give either --prompt or --prompts"),
        ({"prompt": None}, "give either --prompt or --prompts"),
        ({"prompt": None, "prompts": "{run}/none.txt"}, "there is no file of prompts .*none.txt"),
        ({"prompt": None, "prompts": "{run}/empty.txt"}, "empty.txt holds no prompt"),
        ({"prompt": None, "prompts": "{run}/bad.jsonl"}, 'bad.jsonl, line 2: it must be an object like {"prompt": "te'),
        ({"prompt": None, "prompts": "{run}/long.txt"}, r"prompt 2 of .*long.txt has 1\d\d tokens, which leaves no ro"),
        ({"prompt": "7" * 200}, "the prompt has .* tokens, .* in the model's context of 128 tokens: shorten it"),
        ({"stop": [""]}, "a stop string must not be empty"),
        ({"model": "{run}/nowhere"}, "there is no base model .*nowhere: give its folder by --model"),
    ],
)
def test_bad_input_names_the_thing(run, capsys, changes, message):
    (run / "empty.txt").write_text("\n \n")
    (run / "bad.jsonl").write_text('{"prompt": "a"}\n{"question": "a"}\n')
    (run / "long.txt").write_text("short\n" + "7" * 150 + "\n")
    given = {"run": "{run}", "trial": "lora-r4", "rank": ["4"], "prompt": "a"} | changes
    given = {name: value.format(run=run) if isinstance(value, str) else value for name, value in given.items()}
    with pytest.raises((ValueError, OSError), match=message):
        answered(capsys, **given)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt=a"], "flag --rank=None: Flag --rank must have a value other than None."),
        (["--rank=1", "--prompt", "How", "far"], "error: what is 'far'? Options begin with --"),
        (
            ["--rank=1,x", "--prompt=a"],
            "error: --rank must be integers in 0..2147483647 with commas between them, got '1,x'",
        ),
    ],
)
def test_bad_input_is_one_line(run, arguments, message):
    done = command("--run", run, *arguments)
    assert done.returncode == 1
    assert message in done.stderr and "Traceback" not in done.stderr
