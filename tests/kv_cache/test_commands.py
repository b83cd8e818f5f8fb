"""The command, and its folder in the harness's model and in `experiments.generate`, as users type them."""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from flax import nnx
from safetensors.numpy import load_file

from configs.kv_cache_smollm2 import get_config
from mlora_jax.adapters import adapt, split
from mlora_jax.cli import generate
from mlora_jax.core import RankHierarchy
from mlora_jax.evaluate.harness import NestedLM
from mlora_jax.evaluate.loading import load_adapted
from mlora_jax.kv_cache import load_projections, run
from mlora_jax.kv_cache.run import RANGES, make_projections
from mlora_jax.models import Tokenizer, load_decoder
from mlora_jax.run.inputs import model_folder  # noqa: F401  flags that grain defines inside a flagsaver would be lost
from mlora_jax.training.adapter_file import save_adapter
from tests.cli.commands import run_command
from tests.evaluate.requests import instances
from tests.kv_cache.made import compressor
from tests.oracles import numpy_decoder
from tests.tiny import random_like, write_checkpoint

WORDS = ("ab", "cd", "ef", "gh", "ij", "kl", "mn", "op", "qr", "st")
TEXTS = [f"Who wrote {word} ? It was the king of {word} and a city." for word in WORDS]
TINY = {
    "data.length": 24, "data.held_out_documents": 3, "levels": 3, "budgets": (1.0, 0.5), "pca.texts": 4,
    "train.steps": 2, "train.warmup_steps": 1, "train.learning_rate": 0.05, "train.batch_size": 2,
    "train.accumulation": 1, "train.remat": "none", "search.budget": 0.5, "search.share": 0.5, "search.rows": 1,
    "search.batch_size": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model"), head_dim=6, num_layers=1)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.json"
    file.write_text(json.dumps(TEXTS))
    return file


def settings(checkpoint, text, **changes):
    """The shipped config with tiny values; dots in keys are written as "__"."""
    config = get_config()
    values = TINY | {"model.path": str(checkpoint), "data.train": str(text)}
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    config.update_from_flattened_dict(copy.deepcopy(values))
    return config


@pytest.fixture(scope="module")
def made(checkpoint, text, tmp_path_factory):
    """The folder that the command writes, in a process of its own."""
    folder = tmp_path_factory.mktemp("kv") / "out"
    values = TINY | {"model.path": checkpoint, "data.train": text}
    keys = [f"--config.{key}={value}" for key, value in values.items()]
    done = run_command("kv_cache", "--config", "configs/kv_cache_smollm2.py", "--out", folder, *keys)
    assert done.returncode == 0, done.stderr
    assert "50% of the cache, searched: divergence" in done.stdout
    assert done.stdout.splitlines()[-1].startswith(f"projections of {checkpoint.name}, orthogonal to")
    return folder


@pytest.fixture(scope="module")
def adapter(checkpoint, tmp_path_factory):
    """An adapter of rank 6, on the values and the outputs of attention too, under a scaling."""
    made = split(adapt(load_decoder(checkpoint), 6, ("v_proj", "o_proj", "down_proj"), key=jax.random.key(0)))[2]
    folder, values = tmp_path_factory.mktemp("adapter"), random_like(made, seed=0, scale=0.3)
    description = {"base_model": str(checkpoint), "trial": {"method": "matryoshka"}}
    return save_adapter(folder, values, RankHierarchy((1, 3, 6), "sqrt"), description)


def test_the_record_says_how_to_make_it_again(made, checkpoint):
    record = json.loads((made / "kv_cache.json").read_text())
    assert record["base_model"] == checkpoint.name and record["shape"] == {"layers": 1, "heads": 2, "head_dim": 6}
    assert record["config"]["train"]["steps"] == 2 and record["orthogonality_error"] < 1e-5
    ways = {(each["budget"], each["way"]): each for each in record["measures"]}
    assert set(ways) == {(budget, way) for budget in (1.0, 0.5) for way in ("pca", "trained", "searched")}
    assert ways[1.0, "searched"]["divergence"] < 1e-6 and ways[0.5, "searched"]["divergence"] > 1e-4
    assert {ways[0.5, way]["entries_per_token"] for way in ("pca", "trained", "searched")} == {12}
    assert ways[1.0, "pca"]["entries_per_token"] == 24


PAIRS = [("Who wrote Hamlet ?", " the king"), ("It was a", " city")]


def likelihoods(lm):
    return [value for value, _ in lm.loglikelihood(instances("loglikelihood", PAIRS))]


def texts(lm):
    asked = [(context, {"max_gen_toks": 6, "until": ["\n\n"]}) for context, _ in PAIRS]
    return lm.generate_until(instances("generate_until", asked))


def test_the_whole_budget_is_the_base(checkpoint, made):
    base, whole = (
        NestedLM.load(checkpoint=str(checkpoint), batch_size=2, **options)
        for options in ({}, {"kv": str(made), "kv_budget": 1.0})
    )
    np.testing.assert_allclose(likelihoods(whole), likelihoods(base), atol=1e-4)
    assert texts(whole) == texts(base)
    assert whole.name == f"{checkpoint} with 1.0 of the cache by {made} (searched)"


@pytest.mark.parametrize("rates", ["searched", "uniform"])
def test_the_harness_takes_a_budget_and_an_adapter_at_a_rank(checkpoint, made, adapter, rates):
    for further in ({}, {"adapter": str(adapter), "rank": 3}):
        options = {"checkpoint": str(checkpoint), "kv": str(made), "kv_budget": 0.5, "kv_rates": rates} | further
        found = likelihoods(NestedLM.load(batch_size=2, **options))
        np.testing.assert_allclose(found, in_numpy(checkpoint, made, rates, **further), rtol=0, atol=1e-4)
        assert np.abs(np.subtract(found, in_numpy(checkpoint, made, None, **further))).min() > 1e-3


def in_numpy(checkpoint, made, rates, adapter=None, rank=0):
    """The same log-likelihoods in NumPy, with the adapter added to the weights; rates None: those of a full cache."""
    model, tokenizer = load_decoder(checkpoint), Tokenizer.load(checkpoint)
    weights = {".".join(path): np.asarray(x[...], np.float64) for path, x in nnx.to_flat_state(nnx.state(model))}
    if adapter is not None:
        factors = load_file(f"{adapter}/adapter.safetensors")
        for path in {name.rpartition(".")[0] for name in factors}:
            a, b = factors[f"{path}.a"][..., :rank], factors[f"{path}.b"][..., :rank, :]
            weights[f"{path}.kernel"] = weights[f"{path}.kernel"] + a.astype(np.float64) @ b / np.sqrt(rank)
    saved = load_projections(made, model)
    compress = compressor(saved.projections, saved.ranks(0.5, rates)) if rates else None
    found = []
    for context, rest in PAIRS:
        start = tokenizer.encode(context, bos=True)
        ids = tokenizer.encode(context + rest, bos=True)
        assert ids[: len(start)] == start
        logits = numpy_decoder.logits(weights, model.config, [ids], compress)[0]
        likelihoods = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        found.append(sum(likelihoods[t - 1, ids[t]] for t in range(len(start), len(ids))))
    return found


def test_a_quantised_base_takes_a_budget(checkpoint, made):
    pytest.importorskip("qwix")
    found = load_adapted(checkpoint=str(checkpoint), kv=str(made), kv_budget=0.5, quantization="int8")
    tokens = jnp.arange(3, 11, dtype=jnp.int32)[None]
    dense = load_adapted(checkpoint=str(checkpoint), kv=str(made), kv_budget=0.5)
    logits = [
        np.asarray(nnx.merge(each.graphdef, each.base, each.adapter, each.profile)(tokens)) for each in (found, dense)
    ]
    assert 0 < np.abs(logits[0] - logits[1]).max() < 0.1 * np.abs(logits[1]).max()


def test_generate_takes_a_budget(checkpoint, made, adapter, capsys):
    def printed(**values):
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        with flagsaver.flagsaver(adapter=str(adapter), rank=["0", "3"], prompt="Who wrote", max_new_tokens=8, **values):
            generate._run(["generate"])
        return capsys.readouterr().out

    full = printed()
    cut = {rates: printed(kv=str(made), kv_budget=0.5, kv_rates=rates) for rates in ("searched", "uniform")}
    assert len({full, *cut.values()}) == 3
    done = run_command("generate", "--adapter", adapter, "--rank=1", "--prompt=a", "--kv", made, "--kv_budget=1.5")
    assert done.returncode == 1 and "kv_budget" in done.stderr and "Traceback" not in done.stderr


def test_arguments_that_cannot_be(checkpoint, made):
    for options, message in (
        ({"kv": str(made)}, "needs kv_budget, the fraction of the cache's bytes, above 0 and at most 1"),
        ({"kv_budget": 0.5}, "kv_budget=0.5 needs kv=FOLDER, the projections of keys and values"),
        ({"kv": str(made), "kv_budget": 2}, "kv_budget must be a number above 0 and at most 1, got 2"),
        ({"kv": str(made), "kv_budgets": 0.5}, "unknown model argument 'kv_budgets': did you mean kv_budget"),
    ):
        with pytest.raises(ValueError, match=message):
            load_adapted(checkpoint=str(checkpoint), **options)


def changed(checkpoint, text, folder, **changes):
    """The projections [2, L, KV, Hd, Hd], the order of the search, and the measures, with other settings."""
    record = make_projections(settings(checkpoint, text, **changes), folder)
    saved = load_projections(folder, load_decoder(checkpoint))
    order = None if saved.path is None else saved.path.order.tolist()
    return np.stack([saved.projections.u_k, saved.projections.u_v]), order, record["measures"]


@pytest.mark.slow
def test_every_key_changes_the_folder(checkpoint, text, tmp_path):
    (tmp_path / "other.json").write_text(json.dumps(["one more city and a king", "how far is it to Nice from here ?"]))
    u, order, measures = changed(checkpoint, text, tmp_path / "first")
    bases = {
        "model__dtype": "bfloat16", "data__train": str(tmp_path / "other.json"), "data__held_out_documents": 5,
        "data__length": 12, "levels": 2, "pca__texts": 1, "seed": 1, "train__steps": 3, "train__batch_size": 1,
        "train__kl_weight": 1.0,
    }  # fmt: skip
    for key, value in bases.items():
        more = {"data__held_out_documents": 1, "train__batch_size": 1} if key == "data__train" else {}
        other, _, _ = changed(checkpoint, text, tmp_path / key, **{key: value} | more)
        assert np.abs(other - u).max() > 1e-4, key
    searches = {"search__budget": 0.7, "search__share": 1.0, "search__rows": 2, "data__held_out": "other"}
    for key, value in searches.items():
        value = str(tmp_path / "other.json") if value == "other" else value
        same = {"data__held_out_documents": 3}
        _, other_order, other_measures = changed(checkpoint, text, tmp_path / key, **{key: value} | same)
        assert other_order != order or other_measures != measures, key
    assert [each["budget"] for each in changed(checkpoint, text, tmp_path / "b", budgets=(0.6,))[2]] == [0.6] * 3
    # The rows that are measured at one time, and what is computed again, change time and memory only.
    for key, value in {"search__batch_size": 2, "train__remat": "full"}.items():
        same, same_order, _ = changed(checkpoint, text, tmp_path / key, **{key: value})
        np.testing.assert_allclose(same, u, rtol=0, atol=1e-5)
        assert same_order == order
    other = write_checkpoint(tmp_path / "model", seed=1, head_dim=6, num_layers=1)
    with pytest.raises(ValueError, match="another base"):
        load_projections(tmp_path / "first", load_decoder(other))
    make_projections(settings(other, text), tmp_path / "first")
    load_projections(tmp_path / "first", load_decoder(other))


def test_a_search_can_be_repeated_without_training(checkpoint, text, tmp_path, monkeypatch):
    first, _, _ = changed(checkpoint, text, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(run, "train_projections", None)  # a call would be a TypeError
        again, order, measures = changed(checkpoint, text, tmp_path, search__budget=0.7, budgets=(0.7,))
        assert (again == first).all() and len(order) == 4 and measures[0]["budget"] == 0.7
        patch.setattr(run, "search_ranks", None)
        for changes in ({"train__learning_rate": 0.06}, {"data__held_out_documents": 4}, {"seed": 1}):
            with pytest.raises(TypeError):  # it would train
                changed(checkpoint, text, tmp_path, **changes)
    # A search that is stopped leaves what was trained, without ranks.
    with monkeypatch.context() as patch:
        patch.setattr(run, "search_ranks", None)
        with pytest.raises(TypeError):
            make_projections(settings(checkpoint, text), tmp_path)
    left = load_projections(tmp_path, load_decoder(checkpoint))
    assert left.path is None and (left.projections.u_k == first[0]).all()


@pytest.mark.parametrize("key", RANGES)
def test_numbers_outside_their_range_are_refused(checkpoint, text, tmp_path, key):
    with pytest.raises(ValueError, match=f"config.{key} must be"):
        make_projections(settings(checkpoint, text, **{key: type(get_config_value(key))(-1)}), tmp_path)


def get_config_value(key):
    group, _, name = key.rpartition(".")
    config = get_config()
    return (config[group] if group else config)[name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budgets": (0.0,)}, "config.budgets must be a number above 0 and at most 1, got 0.0"),
        ({"train.remat": "some"}, "config.train.remat must be one of none, dots, full, got 'some'"),
        ({"data.train": ""}, "give --config.data.train: it is empty"),
        ({"model.path": ""}, "give --config.model.path: it is empty"),
        ({"levels": 4}, "levels=4 does not divide the 6 features of a head; allowed: 1, 2, 3, 6"),
        ({"data.length": 4096}, "data.length=4096 is above the 128 of the base"),
        ({"data.held_out_documents": 10}, "data.held_out_documents=10 leaves none of the 10 documents"),
        ({"search.budget": 0.1}, r"search.budget=0.1 is below 1/levels = 0.3333"),
    ],
)
def test_values_that_cannot_be(checkpoint, text, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        make_projections(settings(checkpoint, text, **changes), tmp_path)


def test_bad_input_of_the_command_is_one_line(checkpoint, text, tmp_path):
    arguments = ("--config", "configs/kv_cache_smollm2.py", "--out", tmp_path, f"--config.model.path={checkpoint}")
    done = run_command("kv_cache", *arguments, "--config.levels=3", "--config.data.train=absent.json")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1] == "error: there is no file of text absent.json"
