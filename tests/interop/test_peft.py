"""PEFT adapters out and in, against the real PEFT on real models of transformers."""

import json
import math
import shutil
import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file, save_file

from mlora_jax.adapters import adapt, split
from mlora_jax.core import RankHierarchy
from mlora_jax.interop import RANKS_FOR, accepted_rank, export_peft, import_peft, start_from_peft
from mlora_jax.models import load_decoder
from tests.interop.models import LAYERS, RANK, TOKENS, logits_as_is, our_logits, pairs, random_adapter, save_base
from tests.oracles.numpy_reference import best_approximation, profile_matryoshka, readouts
from tests.oracles.peft_logits import save_random_peft, with_deltas, with_peft

# PEFT 0.21 reads a property that transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
S = (1, 2, 4, RANK)
CLOSE = dict(rtol=0, atol=1e-4)
MODULES = {name for layer in range(LAYERS) for name in (
    f"model.layers.{layer}.self_attn.q_proj", f"model.layers.{layer}.self_attn.v_proj",
    f"model.layers.{layer}.mlp.down_proj",
)} | {"lm_head"}  # fmt: skip


@pytest.fixture(scope="module")
def decoder(base):
    return load_decoder(base)


def deltas(adapter, p):
    return {name: (a * p) @ b for name, (a, b) in pairs(adapter).items()}


CASES = [("prefix", "none"), ("prefix", "rank"), ("nested", "sqrt"), ("masked", "rank")]
OTHERS = [(readout, scaling) for readout in ("prefix", "nested", "masked") for scaling in ("none", "rank", "sqrt")]


@pytest.mark.parametrize(
    ("readout", "scaling"), [*CASES, *(pytest.param(*o, marks=pytest.mark.slow) for o in OTHERS if o not in CASES)]
)
def test_every_rank_and_scaling_of_a_read_out(base, adapted, tmp_path, readout, scaling):
    """PEFT computes what the definition of the read-out says, and what our model computes."""
    model, adapter = adapted
    hierarchy = RankHierarchy(S, scaling)
    for rank in (1, 2, 3, 4, RANK)[:: 1 if scaling == "none" else 2]:
        folder = export_peft(tmp_path / str(rank), adapter, hierarchy, rank, readout=readout, base_model=str(base))
        logits, layers = with_peft(base, folder, TOKENS)
        p = readouts(S, rank, scaling)[readout]
        assert layers == dict.fromkeys(MODULES, rank)
        np.testing.assert_allclose(logits, with_deltas(base, deltas(adapter, p), TOKENS), **CLOSE)
        np.testing.assert_allclose(logits, our_logits(model, adapter, p), **CLOSE)
        config = json.loads((folder / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (rank, rank, {})
        assert config["target_modules"] == ["down_proj", "lm_head", "q_proj", "v_proj"]
        record = json.loads((folder / "mlora_jax.json").read_text())
        assert (record["rank"], record["readout"], record["hierarchy"]["scaling"]) == (rank, readout, scaling)


def test_squeeze_is_the_best_approximation_of_the_trained_function(base, adapted, tmp_path):
    _, adapter = adapted
    hierarchy = RankHierarchy(S, "sqrt")
    p = profile_matryoshka(S, "sqrt")
    for rank in (1, 3, RANK):
        folder = export_peft(
            tmp_path / str(rank), adapter, hierarchy, rank, readout="squeeze", trained_profile=p, base_model=str(base)
        )
        best = {name: best_approximation(a, b, p, rank) for name, (a, b) in pairs(adapter).items()}
        np.testing.assert_allclose(
            with_peft(base, folder, TOKENS)[0], with_deltas(base, best, TOKENS), **CLOSE, err_msg=str(rank)
        )


RANKS = {
    "layers.self_attn.q_proj": (0, 2, 4),
    "layers.self_attn.v_proj": (1, 1, 1),
    "layers.mlp.down_proj": (0, 0, 0),
    "lm_head": (RANK,),
}


@pytest.mark.parametrize("ranks_for", [None, "vllm"])
def test_a_rank_per_layer(base, adapted, tmp_path, ranks_for):
    """By `rank_pattern`, or padded to one rank; what has rank 0 is not in PEFT's model at all."""
    model, adapter = adapted
    hierarchy = RankHierarchy(S, "rank")
    folder = export_peft(tmp_path / "out", adapter, hierarchy, RANKS, base_model=str(base), ranks_for=ranks_for)
    logits, layers = with_peft(base, folder, TOKENS)  # warnings are errors: nothing missing, nothing unexpected
    ranks = {f"model.{path.replace('layers.', f'layers.{layer}.')}" if "." in path else path: rank
             for path, rows in RANKS.items() for layer, rank in enumerate(rows) if rank}  # fmt: skip
    assert layers == (ranks if ranks_for is None else dict.fromkeys(ranks, 8))
    p = {name: readouts(S, rank, "rank")["prefix"] for name, rank in ranks.items()}
    added = {name: (a * p[name]) @ b for name, (a, b) in pairs(adapter).items() if name in p}
    np.testing.assert_allclose(logits, with_deltas(base, added, TOKENS), **CLOSE)
    hierarchies = {path: np.stack([np.asarray(hierarchy.prefix(r)) for r in rows]) for path, rows in RANKS.items()}
    hierarchies["lm_head"] = hierarchies["lm_head"][0]
    np.testing.assert_allclose(logits, our_logits(model, adapter, hierarchies), **CLOSE)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["target_modules"] == [
        "lm_head", "model.layers.1.self_attn.q_proj", "model.layers.2.self_attn.q_proj", "v_proj"
    ]  # fmt: skip
    assert config["rank_pattern"] == config["alpha_pattern"] and (ranks_for is None) == bool(config["rank_pattern"])


def test_the_ranks_of_a_pattern_are_not_confused_between_layers_1_and_11(tmp_path):
    base = save_base(tmp_path / "base", num_hidden_layers=12, vocab_size=64)
    _, adapter = random_adapter(base, ("o_proj",), rank=2)
    ranks = {"layers.self_attn.o_proj": (0, 1, *(2,) * 9, 0)}
    folder = export_peft(tmp_path / "out", adapter, RankHierarchy((1, 2)), ranks, base_model=str(base))
    expected = {f"model.layers.{layer}.self_attn.o_proj": r for layer, r in enumerate(*ranks.values()) if r}
    assert with_peft(base, folder, TOKENS)[1] == expected


def test_padding_to_what_vllm_accepts(base, adapted, tmp_path):
    folder = export_peft(tmp_path / "out", adapted[1], RankHierarchy(S), 4, base_model=str(base), ranks_for="vllm")
    logits, layers = with_peft(base, folder, TOKENS)
    assert set(layers.values()) == {8}
    np.testing.assert_allclose(logits, with_deltas(base, deltas(adapted[1], readouts(S, 4)["prefix"]), TOKENS), **CLOSE)
    assert [accepted_rank(r, "vllm") for r in (1, 8, 9, 300, 512)] == [8, 8, 16, 320, 512]
    with pytest.raises(ValueError, match=r"rank 513 is above what vllm accepts: 8, 16, .*512"):
        accepted_rank(513, "vllm")
    with pytest.raises(ValueError, match="the ranks of 'tgi' are not known; known: vllm"):
        accepted_rank(4, "tgi")
    assert sorted(RANKS_FOR["vllm"]) == list(RANKS_FOR["vllm"])


PEFT_CONFIGS = {
    "plain": dict(r=3, lora_alpha=5, target_modules=["q_proj", "up_proj"]),
    "rslora": dict(r=4, lora_alpha=6, use_rslora=True, target_modules=["v_proj", "lm_head"]),
    "patterns": dict(
        r=2, lora_alpha=7, target_modules=["q_proj", "o_proj"],
        rank_pattern={"model.layers.0.self_attn.q_proj": 5, r"layers\.[12]\.self_attn\.o_proj": 1, "q_proj": 3},
        alpha_pattern={"o_proj": 4, "layers.1.self_attn.q_proj": 9},
    ),
    "patterns from the beginning": dict(
        r=2, lora_alpha=7, target_modules=["q_proj", "o_proj"],
        rank_pattern={"^model.layers.0.self_attn.q_proj": 5, "^q_proj": 6, "^layers.1.self_attn.o_proj": 3},
        alpha_pattern={"^model.layers.2.self_attn.o_proj": 4, "^o_proj": 11},
    ),
    "a regular expression": dict(r=2, lora_alpha=2, target_modules=r".*layers\.[02]\.mlp\.(up|down)_proj"),
    "full names and exclusions": dict(
        r=2, lora_alpha=3, target_modules=["model.layers.1.self_attn.k_proj", "gate_proj"],
        exclude_modules=["layers.2.mlp.gate_proj"],
    ),
    "all linear layers": dict(r=2, lora_alpha=3, target_modules="all-linear"),
    "gaussian": dict(r=2, lora_alpha=3, target_modules=["k_proj"], init_lora_weights="gaussian"),
}  # fmt: skip


# PEFT tells which keys that begin with ^ match nothing, because it puts what comes before a name in front of them.
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("name", PEFT_CONFIGS)
def test_an_adapter_that_peft_made(base, decoder, tmp_path, name):
    """Read in, it computes what PEFT computes; written out again, PEFT computes it once more."""
    with warnings.catch_warnings():
        # PEFT saves copies of embedding and head where one of them is adapted, and says so.
        warnings.filterwarnings("ignore", "Setting `save_embedding_layers`")
        theirs = save_random_peft(base, tmp_path / "theirs", **PEFT_CONFIGS[name])
    expected, layers = with_peft(base, theirs, TOKENS)
    model, hierarchy = import_peft(theirs, decoder, key=jax.random.key(0))
    assert hierarchy.max_rank == max(layers.values()) and hierarchy.scaling == "none"
    adapter = split(model)[2]
    if name in ("plain", "rslora"):  # each compiles a program of its own
        np.testing.assert_allclose(logits_as_is(model), expected, **CLOSE)  # as it is returned
        np.testing.assert_allclose(our_logits(model, adapter, hierarchy.prefix(hierarchy.max_rank)), expected, **CLOSE)
    again = export_peft(tmp_path / "again", adapter, hierarchy, hierarchy.max_rank, base_model=str(base))
    np.testing.assert_allclose(with_peft(base, again, TOKENS)[0], expected, **CLOSE)
    # Every column can be trained: A is nowhere zero.
    for path, leaf in nnx.to_flat_state(adapter):
        assert path[-1] == "b" or np.asarray(leaf[...]).any(axis=-2).all()


@pytest.mark.parametrize("ranks_for", [None, "vllm"])
def test_our_own_export_comes_back_with_its_hierarchy(base, decoder, adapted, tmp_path, ranks_for):
    """By prefix, every smaller rank reads out as before; padding is taken off again."""
    model, adapter = adapted
    hierarchy = RankHierarchy(S, "sqrt", (1.0, 2.0, 1.0, 1.0))
    folder = export_peft(tmp_path / "out", adapter, hierarchy, 4, base_model=str(base), ranks_for=ranks_for)
    back, found = import_peft(folder, decoder, key=jax.random.key(0))
    assert (found.ranks, found.scaling, found.weights, found.max_rank) == ((1, 2, 4), "sqrt", (1.0, 2.0, 1.0), 4)
    theirs = split(back)[2]
    for name, (a, b) in pairs(theirs).items():
        np.testing.assert_allclose(a, pairs(adapter)[name][0][:, :4])
        np.testing.assert_allclose(b, pairs(adapter)[name][1][:4], rtol=1e-6)
    for rank in (1, 3, 4):
        p = readouts(S, rank, "sqrt")["prefix"]
        np.testing.assert_allclose(our_logits(back, theirs, p[:4]), our_logits(model, adapter, p), **CLOSE)


@pytest.mark.parametrize(("readout", "rank"), [("nested", 4), ("masked", 4), ("squeeze", 4), ("prefix", RANKS)])
def test_any_other_export_comes_back_with_its_function(base, decoder, adapted, tmp_path, readout, rank):
    _, adapter = adapted
    hierarchy = RankHierarchy(S, "rank")
    folder = export_peft(tmp_path / "out", adapter, hierarchy, rank, readout=readout, base_model=str(base))
    expected, _ = with_peft(base, folder, TOKENS)
    back, found = import_peft(folder, decoder, key=jax.random.key(0))
    assert found.scaling == "none"
    np.testing.assert_allclose(logits_as_is(back), expected, **CLOSE)


def test_training_can_start_from_it(base, decoder, tmp_path):
    """Under the profile of the training function the model computes what PEFT computes; more rank and layers are ok."""
    theirs = save_random_peft(base, tmp_path / "theirs", r=3, lora_alpha=5, target_modules=["q_proj"])
    expected, _ = with_peft(base, theirs, TOKENS)
    model = adapt(decoder, 8, ("q_proj", "v_proj"), key=jax.random.key(0))
    fresh = split(model)[2]
    function = RankHierarchy((1, 2, 4, 8), "sqrt").matryoshka()
    adapter = start_from_peft(theirs, model, function)
    np.testing.assert_allclose(our_logits(model, adapter, function), expected, **CLOSE)
    attention = adapter["layers"]["self_attn"]
    np.testing.assert_array_equal(
        attention["q_proj"]["a"][...][..., 3:], fresh["layers"]["self_attn"]["q_proj"]["a"][...][..., 3:]
    )
    np.testing.assert_array_equal(attention["v_proj"]["a"][...], fresh["layers"]["self_attn"]["v_proj"]["a"][...])
    with pytest.raises(ValueError, match=r"factors for layers.self_attn.q_proj, which the targets leave out"):
        start_from_peft(theirs, adapt(decoder, 8, ("v_proj",), key=jax.random.key(0)), function)
    with pytest.raises(ValueError, match="has rank 3, above the rank 2 to train"):
        small = adapt(decoder, 2, ("q_proj",), key=jax.random.key(0))
        start_from_peft(theirs, small, np.ones(2))
    with pytest.raises(ValueError, match="has 3 columns, of which the profile"):
        start_from_peft(theirs, model, RankHierarchy((1, 2), max_rank=8).matryoshka())


def test_factors_of_other_dtypes_on_disk(base, decoder, tmp_path):
    theirs = save_random_peft(base, tmp_path / "theirs", r=2, lora_alpha=2, target_modules=["q_proj"])
    file = theirs / "adapter_model.safetensors"
    save_file({name: value.astype(ml_dtypes.bfloat16) for name, value in load_file(file).items()}, file)
    expected, _ = with_peft(base, theirs, TOKENS)
    model, _ = import_peft(theirs, decoder, key=jax.random.key(0))
    np.testing.assert_allclose(logits_as_is(model), expected, **CLOSE)


A = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


def edit_config(**values):
    def change(folder):
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def edit_tensors(edit):
    def change(folder):
        tensors = load_file(folder / "adapter_model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return change


def cut(folder):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])


def pickles_only(folder):
    torch.save({}, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


BAD = {
    "dora": (edit_config(use_dora=True), "adapter_config.json: use_dora=True is not supported"),
    "bias": (edit_config(bias="lora_only"), "bias='lora_only' is not supported"),
    "lora_bias": (edit_config(lora_bias=True), "lora_bias=True is not supported"),
    "whole modules": (
        edit_config(modules_to_save=["lm_head"]),
        r"base_model.model.lm_head.weight: expected shape \[61, 16\], found no such tensor",
    ),
    "some layers": (edit_config(layers_to_transform=[0]), r"layers_to_transform=\[0\] is not supported"),
    "a later version": (edit_config(use_mirrors={"n": 2}), r"use_mirrors={'n': 2} is not supported"),
    "another kind": (edit_config(peft_type="IA3"), "peft_type 'IA3' is not supported, only 'LORA' is"),
    "changed base": (edit_config(init_lora_weights="pissa"), "init_lora_weights='pissa' is not supported"),
    "other modules": (
        edit_config(target_modules=["q_proj", "c_attn"]),
        "target_modules 'c_attn' match no linear layer of this model; linear layers here: down_proj, gate_proj",
    ),
    "an embedding": (edit_config(target_modules=["embed_tokens"]), "target_modules 'embed_tokens' match no linear"),
    "no modules": (edit_config(target_modules=None), "names no target_modules"),
    "none left": (edit_config(exclude_modules=["q_proj"]), "exclude_modules leaves no module"),
    "no expression": (edit_config(target_modules="(q_proj"), "is no regular expression"),
    "rank": (edit_config(r=0), "the rank 'r' must be an integer in 1.., got 0"),
    "pattern rank": (edit_config(rank_pattern={"q_proj": 2.5}), "the rank 'q_proj' must be an integer in 1.., got 2.5"),
    "alpha": (edit_config(lora_alpha="x"), "the alpha 'lora_alpha' must be a number, got 'x'"),
    "json": (lambda folder: (folder / "adapter_config.json").write_text("{"), "adapter_config.json is not valid JSON"),
    "missing": (edit_tensors(lambda t: t.pop(A)), rf"{A}: expected shape \[3, 16\], found no such tensor"),
    "misshapen": (
        edit_tensors(lambda t: t.update({A: t[A][:2].copy()})),
        rf"{A}: expected shape \[3, 16\], found \(2, 16\)",
    ),
    "a changed embedding": (
        edit_tensors(lambda t: t.update({"base_model.model.model.embed_tokens.weight": np.ones((61, 16), np.float32)})),
        r"embed_tokens.weight: of its 61 rows, 61 differ from the base model's \(0, 1, 2, 3, \.\.\.\), by",
    ),
    "unexpected": (
        edit_tensors(lambda t: t.update({A.replace("q_proj", "k_proj"): t[A]})),
        r"k_proj.lora_A.weight: nothing in adapter_config.json asks for this tensor",
    ),
    "integers": (edit_tensors(lambda t: t.update({A: t[A].astype(np.int32)})), f"{A} in .* is stored as I32, not as"),
    "not finite": (edit_tensors(lambda t: t[A].fill(np.nan)), f"{A} in .* hold values that are not finite"),
    "cut short": (cut, "adapter_model.safetensors is not a complete safetensors file"),
    "pickles": (pickles_only, "has no adapter_model.safetensors but adapter_model.bin, pickles that are never opened"),
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), "it has no adapter_config.json"),
    "record": (lambda folder: (folder / "mlora_jax.json").write_text('{"format": 9}'), "has format 9; this version"),
}


@pytest.fixture(scope="module")
def theirs(base, tmp_path_factory):
    return save_random_peft(base, tmp_path_factory.mktemp("theirs"), r=3, lora_alpha=3, target_modules=["q_proj"])


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_named(decoder, theirs, tmp_path, name):
    change, message = BAD[name]
    shutil.copytree(theirs, tmp_path / "bad")
    change(tmp_path / "bad")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        import_peft(tmp_path / "bad", decoder, key=jax.random.key(0))


def test_a_rank_of_its_own_choice(base, decoder, theirs):
    model, hierarchy = import_peft(theirs, decoder, key=jax.random.key(0), rank=8)
    assert hierarchy.ranks == (1, 2, 4, 8)
    np.testing.assert_allclose(logits_as_is(model), with_peft(base, theirs, TOKENS)[0], **CLOSE)
    with pytest.raises(ValueError, match=r"the rank for .* must be an integer in 3\.\., got 2"):
        import_peft(theirs, decoder, key=jax.random.key(0), rank=2)
    with pytest.raises(ValueError, match="decoders of load_decoder only"):
        import_peft(theirs, nnx.Linear(2, 2, rngs=nnx.Rngs(0)), key=jax.random.key(0))


@pytest.mark.parametrize(
    ("rank", "options", "message"),
    [
        (0, {}, "every layer has rank 0, which is the base model itself"),
        (7, {}, r"the rank of .* must be an integer in 0\.\.6, got 7"),
        (1, {"readout": "suffix"}, "unknown read-out 'suffix'. Known read-outs: prefix, squeeze, nested, masked"),
        ({"lm_head": (1,)}, {}, "ranks must name the modules layers.mlp.down_proj, .*; got lm_head"),
        (RANKS | {"lm_head": (1, 2)}, {}, r"lm_head has 1 layers, got the ranks \(1, 2\)"),
        (1, {"hierarchy": RankHierarchy((1, 2))}, "has rank 6, but the hierarchy's R is 2"),
        (1, {"adapter": {"blocks": {"a": np.ones((2, 6)), "b": np.ones((6, 2))}}}, "blocks has no name in a Hugging"),
        (1, {"adapter": {}}, "this tree is no adapter"),
    ],
)
def test_what_cannot_be_written_leaves_nothing(adapted, tmp_path, rank, options, message):
    given = {"adapter": adapted[1], "hierarchy": RankHierarchy(S), "base_model": "base", **options}
    with pytest.raises(ValueError, match=message):
        export_peft(tmp_path / "some/out", rank=rank, **given)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_there_whole_or_not_at_all(adapted, tmp_path, monkeypatch):
    """A failure in the middle leaves an earlier export as it was; other people's files are never touched."""
    out, hierarchy = tmp_path / "out", RankHierarchy(S)
    export_peft(out, adapted[1], hierarchy, 2, base_model="base")
    before = {file.name: file.read_bytes() for file in out.iterdir()}

    def full(*arguments, **options):
        raise OSError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("mlora_jax.interop.peft_export.write_record", full)
        with pytest.raises(OSError, match="No space left"):
            export_peft(out, adapted[1], hierarchy, 4, base_model="base")
        with pytest.raises(OSError, match="No space left"):
            export_peft(tmp_path / "new", adapted[1], hierarchy, 4, base_model="base")
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    export_peft(out, adapted[1], hierarchy, 4, base_model="base")
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 4
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert all(file.stat().st_mode & 0o777 == 0o644 for file in out.iterdir())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="mine holds other files"):
        export_peft(tmp_path / "mine", adapted[1], hierarchy, 4, base_model="base")
    with pytest.raises(FileExistsError, match=r"notes.txt is a file: give the name of a folder"):
        export_peft(tmp_path / "mine/notes.txt", adapted[1], hierarchy, 4, base_model="base")


def test_alpha_over_the_root_of_the_rank():
    """The scales that the tests above rest on, by their definitions."""
    assert math.isclose(readouts(S, 4, "sqrt")["prefix"][0], 0.5) and readouts(S, 4, "rank")["prefix"][3] == 0.25


def test_the_scaling_sqrt_is_the_rslora_of_peft(base, tmp_path):
    """PEFT's factors under `use_rslora` with lora_alpha 1, and the same factors under our s_R = 1/sqrt(R)."""
    folder = save_random_peft(
        base, tmp_path / "rslora", r=RANK, lora_alpha=1, use_rslora=True, target_modules=["v_proj"]
    )
    expected, _ = with_peft(base, folder, TOKENS)
    tensors = load_file(folder / "adapter_model.safetensors")
    name = "base_model.model.model.layers.{}.self_attn.v_proj.lora_{}.weight"
    pair = {
        leaf.lower(): jnp.asarray(np.stack([tensors[name.format(layer, leaf)].T for layer in range(LAYERS)]))
        for leaf in "AB"
    }
    model, adapter = random_adapter(base, targets=("v_proj",))
    adapter = jax.tree_util.tree_map_with_path(lambda path, leaf: pair["a" if "'a'" in str(path) else "b"], adapter)
    hierarchy = RankHierarchy((1, 2, RANK), "sqrt")
    np.testing.assert_allclose(our_logits(model, adapter, hierarchy.lora()), expected, atol=1e-4)
    assert np.abs(our_logits(model, adapter, np.ones(RANK)) - expected).max() > 1e-2
